"""Properties of every config class, whatever it is given."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import parse_cli
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mu.algorithms.saliency_unlearning import configs
from mu.cli import HelpAsked, command_line
from mu.commands.apply_patch import ApplyPatchConfig
from mu.config import Config, ConfigError, as_dict, assemble, dump, keys_of, load_config, override
from mu.config_keys import Key
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.config import EvaluateConfig, SampleConfig

CLASSES: list[type[Config]] = [
    configs.MaskConfig,
    configs.TrainConfig,
    SampleConfig,
    EvaluateConfig,
    AttackConfig,
    ApplyPatchConfig,
]
REQUIRED: dict[type[Config], dict[str, Any]] = {
    ApplyPatchConfig: {"input_path": "in.ckpt", "output_path": "out.ckpt", "patches": ("p",)},
    SampleConfig: {"prompts": ("a cat",)},
}
"""Without which there is no config of a class."""
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.tuples(inner)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=6,
)
SIGNS = st.characters(exclude_categories=("Cc", "Cs", "Cf", "Zs", "Zl", "Zp", "Co", "Cn"))
WORDS = st.text(SIGNS, min_size=1, max_size=12)


def valid(key: Key) -> st.SearchStrategy[Any]:
    """Values that a key takes by itself, as far as its rule tells."""
    rule = key.rule
    item: st.SearchStrategy[Any]
    if rule.choices is not None:
        item = st.sampled_from(rule.choices)
    elif key.item is bool:
        item = st.booleans()
    elif key.item is str:
        item = st.just(key.default) if rule.pattern is not None else WORDS | st.just("null") | st.just("a, b")
    else:
        low = max(x for x in (rule.gt, rule.ge, -(10**6)) if x is not None)
        high = min(x for x in (rule.lt, rule.le, 10**6) if x is not None)
        whole = st.integers(math.ceil(low), math.floor(high)).map(lambda n: n - n % (rule.multiple_of or 1))
        item = whole if key.item is int else st.floats(low, high)
    forms = [item] if key.scalar else []
    if key.listed:
        forms.append(st.lists(item, min_size=1, max_size=4, unique=True).map(tuple))
    if key.optional:
        forms.append(st.none())
    return st.one_of(forms)


@st.composite
def some_values(draw: st.DrawFn, cls: type[Config]) -> dict[str, Any]:
    """Values of a few keys, each right by itself; and of those without which there is no config."""
    keys = draw(st.lists(st.sampled_from(keys_of(cls)), max_size=6, unique_by=lambda key: key.name))
    values = dict(REQUIRED.get(cls, {}))
    for key in keys:
        value = draw(valid(key))
        try:
            assemble(cls, [(name, given, "") for name, given in (values | {key.name: value}).items()])
        except ConfigError:  # outside of what a rule says in numbers, or in conflict with a default
            continue
        values[key.name] = value
    return values


def made(cls: type[Config], values: dict[str, Any]) -> Config:
    try:
        return load_config(cls, overrides=values)
    except ConfigError:
        assume(False)  # right one by one, but not together
        raise


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@QUICK
@given(data=st.data())
def test_a_config_comes_back_from_its_yaml_and_from_its_command(
    cls: type[Config], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = made(cls, data.draw(some_values(cls)))
    path = tmp_path_factory.getbasetemp() / f"{cls.__name__}.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load_config(cls, config_path=path) == config
    write_yaml(path, dict(reversed(as_dict(config).items())))  # the order of the lines does not matter
    assert load_config(cls, config_path=path) == config
    assert override(config) == config
    assert load_config(cls, base=as_dict(config)) == config


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@QUICK
@given(data=st.data())
def test_the_last_of_base_file_and_overrides_wins(
    cls: type[Config], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And the other of a pair (`Config.replaces`) goes with what was below."""
    base, in_file, overrides = (data.draw(some_values(cls)) for _ in range(3))
    merged: dict[str, Any] = {}
    for level in (base, in_file, overrides):
        others = {other for key in level if level[key] is not None for other in cls.replaces.get(key, ())}
        merged = {key: value for key, value in merged.items() if key not in others} | level
    expected = made(cls, merged)
    path = tmp_path_factory.getbasetemp() / f"{cls.__name__}.yaml"
    write_yaml(path, in_file)
    assert load_config(cls, base=base, config_path=path, overrides=overrides) == expected


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@QUICK
@given(data=st.data())
def test_promise_25_any_junk_is_a_config_error_or_a_config(cls: type[Config], data: st.DataObject) -> None:
    names = st.sampled_from([key.name for key in keys_of(cls)]) | st.text(max_size=10)
    junk = data.draw(st.dictionaries(names, JUNK, max_size=4))
    try:
        config = load_config(cls, overrides=junk)
    except ConfigError:
        return
    assert set(junk) <= set(as_dict(config))


@pytest.mark.parametrize("cls", CLASSES[:3], ids=lambda cls: cls.__name__)
@QUICK
@given(
    text=st.text(max_size=200) | st.binary(max_size=100),
    start=st.sampled_from(["", "lr: ", "template_name: ["]),
)
def test_promise_25_any_file_is_a_config_error_or_a_config(
    cls: type[Config], text: str | bytes, start: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    content = text if isinstance(text, bytes) else (start + text).encode("utf-8", errors="surrogatepass")
    path.write_bytes(content)
    try:
        config = load_config(cls, config_path=path)
    except ConfigError:
        return
    assert isinstance(config, cls)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@QUICK
@given(data=st.data())
def test_promise_25_any_arguments_are_a_config_error_or_a_config(
    cls: type[Config], data: st.DataObject
) -> None:
    flags = [f"--{key.name}" for key in keys_of(cls)] + [
        "--config_path",
        "--quiet",
        "--log_level",
        "--help",
        "--",
    ]
    words = (
        st.sampled_from(flags)
        | st.text(max_size=12)
        | st.sampled_from(["[", "[a, b]", "null", "nan", "1e999", "-1"])
    )
    argv = data.draw(st.lists(words, max_size=6))
    assume(
        "--config_path" not in argv or not os.path.exists(argv[(argv.index("--config_path") + 1) % len(argv)])
    )
    try:
        config = parse_cli(cls, argv)
    except (ConfigError, HelpAsked):
        return
    assert isinstance(config, cls)


def test_a_command_gives_its_config_back() -> None:
    """The one that `--help` and messages show; paths are looked at, so the bundled model is used."""
    config = configs.saliency_unlearning_generate_mask_emoji_canvas
    words = command_line("mu.x", type(config), as_dict(config)).split()
    assert parse_cli(type(config), words[3:]) == config
