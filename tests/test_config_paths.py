"""Every path key of every config class, given what a file system does not look for, or a null that it does not take."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

import benchmarks
import mu
from mu.cli import run_door
from mu.config import Config, ConfigError, check_paths, keys_of, load_config
from mu.config_keys import Key
from mu.evaluation.config import EvaluateConfig

_CLASS = re.compile(r"^class (\w+Config)\(.*(Config|Keys)\b.*\):", re.MULTILINE)


def config_classes() -> list[type[Config]]:
    """All that a command takes, wherever they are: a new one is tested without a word here."""
    found = []
    for package in (mu, benchmarks):
        (root,) = map(Path, package.__path__)
        for path in sorted(root.rglob("*.py")):
            name = ".".join((package.__name__, *path.relative_to(root).with_suffix("").parts))
            for own in _CLASS.findall(path.read_text(encoding="utf-8")):
                found.append(getattr(importlib.import_module(name.removesuffix(".__init__")), own[0]))
    return [cls for cls in found if issubclass(cls, Config)]


CLASSES = config_classes()
KEYS = [(cls, key) for cls in CLASSES for key in keys_of(cls)]
PATHS = [
    pytest.param(cls, key, id=f"{cls.__name__}-{key.name}") for cls, key in KEYS if key.rule.kind == "path"
]


def told(cls: type[Config], key: Key, text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the command says of the key; it ends with exit code 2, and nothing is run."""

    def run(_: Config) -> object:
        raise AssertionError("nothing may be run")

    assert run_door(cls, run, module="mu.command", summary="", argv=[f"--{key.name}", text]) == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    return [line for line in lines if line.startswith(f"{key.name}: ")]


def test_all_classes_are_found() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert names >= {"MaskConfig", "TrainConfig", "ESDConfig", "UCEConfig", "SampleConfig", "EvaluateConfig"}
    assert names >= {"ConvertConfig", "ApplyPatchConfig", "TableConfig"}


@pytest.mark.parametrize(("cls", "key"), PATHS)
def test_promise_25_a_path_that_no_file_can_have_is_a_mistake_of_its_key(
    cls: type[Config],
    key: Key,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text in ("x" * 300, "y/" * 3000, "package:" + "z" * 300, "mu/" + "x" * 300):
        (message,) = told(cls, key, text, capsys)
        assert f"{text[:50]}" in message
        assert "File name too long" in message
        assert "give a shorter path" in message
        assert f"--{key.name}" in message
        assert len(message) < 300  # the path itself is cut
    for text in ("a\0b", "a\nb"):
        (message,) = told(cls, key, text, capsys)
        assert "contains a control character" in message
    monkeypatch.chdir(tmp_path)
    os.symlink("l", "l")
    for text in ("l", "l/m/n"):
        (message,) = told(cls, key, text, capsys)
        assert "links in it lead in a circle" in message


def test_other_mistakes_are_told_beside_it(tmp_path: Path) -> None:
    wrong = EvaluateConfig(
        images_dir="x" * 300, ckpt_path=str(tmp_path / "absent.ckpt"), output_dir="y" * 5000
    )
    problems = check_paths(wrong)
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        "ckpt_path",
        "images_dir",
        "output_dir",
    ]


def test_a_folder_that_may_not_be_entered_is_a_mistake(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:  # whom permissions do not bind
        os.seteuid(65534)
    try:
        problems = check_paths(EvaluateConfig(images_dir=str(closed / "images")))
    finally:
        os.seteuid(user)
    assert f"images_dir: '{closed / 'images'}' cannot be looked for (Permission denied); give" in problems[0]


# ---- null


@pytest.mark.parametrize(("cls", "key"), PATHS)
def test_a_null_path_is_taken_or_told(cls: type[Config], key: Key) -> None:
    try:
        config = load_config(cls, overrides={key.name: None}, on_disk=True)
    except ConfigError as error:  # also of what else is missing
        wrong = [mistake for mistake in error.mistakes if mistake.startswith(f"{key.name}: must not be null")]
        assert bool(wrong) == (not key.optional)
    else:
        assert getattr(config, key.name) is None


NEVER_NULL = [
    pytest.param(cls, key, id=f"{cls.__name__}-{key.name}")
    for cls, key in KEYS
    if not key.optional and (key.rule.choices is not None or key.rule.pattern is not None)
]


@pytest.mark.parametrize(("cls", "key"), NEVER_NULL)
def test_a_null_that_is_not_taken_lists_what_is(
    cls: type[Config], key: Key, capsys: pytest.CaptureFixture[str]
) -> None:
    (message,) = told(cls, key, "null", capsys)
    listed = ", ".join(key.rule.choices) if key.rule.choices is not None else key.rule.help[:40]
    assert message.startswith(f"{key.name}: must not be null; give ")
    assert listed in message


def test_a_value_of_another_type_is_told_the_choices_too() -> None:
    listed = "one of these: none, base, base_other_seeds, folder"
    for value, said in (
        (5, f"must be {listed}, got 5"),
        (["none"], f"takes one value, {listed}, not a list"),
    ):
        with pytest.raises(ConfigError, match=f"fid_reference: {said}"):
            EvaluateConfig(fid_reference=value)
