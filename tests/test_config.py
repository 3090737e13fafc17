from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.config import (
    Config,
    ConfigError,
    assemble,
    check_paths,
    config_of,
    dump,
    keys_of,
    load_config,
    override,
    plain,
    require_paths,
    resolve_path,
    setting,
)
from mu.config_file import MAX_BYTES, ConfigFileError, config_folders, find_config
from mu.errors import MuError
from mu.evaluation.config import SampleConfig


class Toy(Config):
    lr: float = setting(1e-5, "step size", gt=0)
    batch_size: int = setting(8, "images a batch", ge=1)
    threshold: float | tuple[float, ...] = setting(0.5, "kept fraction", gt=0, le=1)
    method: str = setting("full", "what moves", choices=("full", "xattn", "noxattn"))
    template_name: str = setting("Noto", "concept", kind="name")
    styles: tuple[str, ...] | None = setting(None, "styles", kind="name")
    prompts: tuple[str, ...] = setting((), "prompts", split=False, may_be_empty=True)
    seeds: tuple[int, ...] = setting((1, 2), "seeds", ge=0)
    use_sample: bool = setting(True, "layout")
    path: str | None = setting(None, "a file", kind="path")
    size: int | None = setting(None, "pixels", multiple_of=8, ge=8)

    def conflicts(self):
        if self.batch_size > 64 and self.lr < 1e-3:
            yield ("lr", "batch_size"), "too small for this batch"

    def disk_problems(self):
        if self.path is not None and not Path(self.path).exists():
            yield ("path",), f"there is no {self.path}; `make it` makes it"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def from_yaml(tmp_path: Path, text: str, **overrides: object) -> Toy:
    return load_config(Toy, config_path=write(tmp_path, text), overrides=overrides)


def mistakes_of(tmp_path: Path, text: str, **overrides: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, text, **overrides)
    return caught.value.mistakes


def test_order_is_defaults_then_base_then_yaml_then_overrides(tmp_path):
    path = write(tmp_path, "lr: 0.2\nbatch_size: 3\n")
    config = load_config(
        Toy, base={"lr": 0.1, "method": "xattn", "size": 16}, config_path=path, overrides={"batch_size": 4}
    )
    assert (config.lr, config.batch_size, config.method, config.size) == (0.2, 4, "xattn", 16)
    assert config.seeds == (1, 2)


def test_a_value_is_read_as_its_key_takes_it(tmp_path):
    config = from_yaml(
        tmp_path,
        "lr: 1e-4\nthreshold: [0.3, 5.0e-1]\ntemplate_name: 007\nstyles: off\nprompts: A cat, sitting\n"
        "seeds: 5, 6\nuse_sample: False\npath: null\nsize: ~\n",
    )
    assert config.lr == 1e-4
    assert config.threshold == (0.3, 0.5)
    assert config.template_name == "007"
    assert config.styles == ("off",)
    assert config.prompts == ("A cat, sitting",)
    assert config.seeds == (5, 6)
    assert config.use_sample is False
    assert config.path is None
    assert config.size is None


def test_a_scalar_stays_a_scalar_where_both_are_taken(tmp_path):
    assert from_yaml(tmp_path, "threshold: 0.25").threshold == 0.25
    assert Toy(threshold=[0.25]).threshold == (0.25,)


def test_quoted_null_is_a_word(tmp_path):
    assert from_yaml(tmp_path, "path: 'null'").path == "null"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lr: fast", "lr: must be a number, got 'fast'"),
        ("lr: -1", "lr: must be > 0, got -1"),
        ("lr: 0", "lr: must be > 0, got 0"),
        ("lr: .nan", "lr: must be finite"),
        ("lr: nan", "lr: must be finite"),
        ("lr: .inf", "lr: must be finite"),
        ("lr: 1e999", "lr: must be finite"),
        ("lr: null", "lr: must not be null"),
        ("lr: [0.1, 0.2]", "lr: takes one value"),
        ("batch_size: 2.5", "batch_size: must be a whole number, got '2.5'"),
        ("batch_size: 1e3", "batch_size: must be a whole number"),
        ("threshold: [0.5, 1.5]", "threshold: must be > 0 and <= 1, got 1.5"),
        ("method: ful", "Did you mean 'full'?"),
        ("use_sample: yes", "use_sample: must be true or false, got 'yes'"),
        ("styles: []", "styles: the list is empty"),
        ("styles: [Noto, null]", "styles: an item of the list must not be null"),
        ("seeds: [1, 1]", "seeds: given more than once: 1"),
        ("size: 12", "size: must be >= 8 and a multiple of 8, got 12"),
        ("learning_rate: 1", "learning_rate: there is no such key."),
        ("bach_size: 1", "bach_size: there is no such key. Did you mean 'batch_size'?"),
        ("lr: 1\nlr: 2", "lr: given twice (lines 1 and 2)"),
        ("lr: {a: 1}", "lr: must be one value or a list of values"),
        ("lr: !!python/object/apply:os.getcwd []", "lr: "),
        ("lr: &a 1\nbatch_size: *a", "tags and anchors are not read"),
        ("- lr", "write `key: value` lines"),
        ("lr: 1\n---\nlr: 2", "another document"),
        ("lr: 1\n? [a, b]\n: 2", "line 2: a key must be a plain word"),
        ("lr: [[1]]", "without further levels (line 1)"),
        ('path: "\\UFFFFFFFF"', "not a YAML file"),
        ("lr: [", "not a YAML file"),
        ("path: ''", "path: must not be empty"),
        ('path: "a\\0b"', "path: 'a\\x00b' contains a control character"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(tmp_path, line, expected):
    assert any(expected in mistake for mistake in mistakes_of(tmp_path, line)), mistakes_of(tmp_path, line)


def test_all_mistakes_come_in_one_message_with_their_places(tmp_path):
    found = mistakes_of(
        tmp_path, "lr: -1\nmehtod: full\nbatch_size: x\n", styles="../up", path=tmp_path / "absent"
    )
    assert len(found) == 4  # whether a path exists is asked only on demand
    assert any("method" in mistake and "run.yaml line 2" in mistake for mistake in found)
    with pytest.raises(ConfigError, match=r"2 mistakes in the configuration:\n  .*\n  .*`make it` makes it"):
        assemble(Toy, [("lr", -1, ""), ("path", str(tmp_path / "absent"), "--path")], on_disk=True)


def test_the_lines_of_one_mistake_stand_further_in_than_the_mistakes():
    error = ConfigError(["raw_dataset_dir: 1 file:\n  1.jpg: empty\nReplace it.", "lr: too small"])
    assert str(error).splitlines()[1:] == [
        "  raw_dataset_dir: 1 file:",
        "    1.jpg: empty",
        "  Replace it.",
        "  lr: too small",
    ]


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${env:HOME}", "a${lr}", "${.lr}", "$${lr}"])
def test_nothing_is_interpolated(tmp_path, value, monkeypatch):
    monkeypatch.setenv("HOME", "/secret-place")
    (mistake,) = mistakes_of(tmp_path, f"template_name: '{value}'")
    assert "not interpolated" in mistake
    assert "secret-place" not in mistake
    assert mistakes_of(tmp_path, f"lr: {value}")
    assert mistakes_of(tmp_path, f"prompts: ['{value}']")
    with pytest.raises(ConfigError):
        Toy(path=value)


def test_omegaconf_containers_are_taken_anywhere():
    config = OmegaConf.create({"lr": 0.25, "seeds": [3, 4], "styles": None, "size": 16})
    expected = Toy(lr=0.25, seeds=(3, 4), size=16)
    assert load_config(Toy, base=config) == load_config(Toy, overrides=config) == expected
    assert config_of(Toy, config, lr=0.5) == override(expected, lr=0.5)
    assert config_of(Toy, expected, seeds=OmegaConf.create([5])).seeds == (5,)
    assert Toy(threshold=OmegaConf.create([0.25, 0.5])).threshold == (0.25, 0.5)
    assert plain(config) == {"lr": 0.25, "seeds": [3, 4], "styles": None, "size": 16}


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${lr}", "a ${oc.env:HOME}"])
def test_an_omegaconf_config_is_not_interpolated(value, monkeypatch):
    monkeypatch.setenv("HOME", "/secret-place")
    for key, written in (("template_name", value), ("prompts", ["a cat", value])):
        with pytest.raises(ConfigError, match="not interpolated") as caught:
            load_config(Toy, base=OmegaConf.create({"lr": 0.5, key: written}))
        assert "secret-place" not in str(caught.value)
    for key in ("batch_size", "use_sample"):
        with pytest.raises(ConfigError, match=f"{key}: must be"):
            load_config(Toy, base=OmegaConf.create({"lr": 0.5, key: value}))


def test_what_an_omegaconf_config_lacks_is_named():
    with pytest.raises(ConfigError, match=r"lr: the value is missing \('\?\?\?'\)"):
        load_config(Toy, base=OmegaConf.create({"seeds": [1], "lr": "???"}))
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(Toy, base=OmegaConf.create([1]))
    with pytest.raises(ConfigError, match="lr: must be a number, got"):
        load_config(Toy, base=OmegaConf.create({"lr": {"value": 1}}))


def test_omegaconf_is_not_loaded_for_plain_values():
    code = (
        "import sys; from mu.algorithms.saliency_unlearning.configs import TrainConfig\n"
        "from mu.config import override; override(TrainConfig(), seed=1); print('omegaconf' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "a/b",
        "a\\b",
        "..",
        ".",
        "a..b",
        "/abs",
        "",
        " a",
        "a ",
        "a\nb",
        "a\tb",
        "a\u202eb",
        "x" * 101,
    ],
)
def test_a_name_cannot_leave_its_folder(name):
    with pytest.raises(ConfigError):
        Toy(template_name=name)
    with pytest.raises(ConfigError):
        Toy(styles=["Noto", name])


@pytest.mark.parametrize("name", ["Noto", "Van_Gogh", "self-harm", "illegal activity", "Ukiyo-é", "St. Ives"])
def test_an_ordinary_name_is_taken(name):
    assert Toy(template_name=name).template_name == name


def test_python_values_are_not_guessed():
    for wrong in ({"lr": "1e-5"}, {"lr": True}, {"batch_size": 8.0}, {"batch_size": True}, {"use_sample": 1}):
        with pytest.raises(ConfigError):
            Toy(**wrong)
    with pytest.raises(ConfigError, match="path: must be a path"):
        Toy(path=3)
    assert Toy(path=Path("a") / "b").path == "a/b"
    assert Toy(lr=1).lr == 1.0
    assert isinstance(Toy(lr=1).lr, float)
    with pytest.raises(ConfigError, match="finite"):
        Toy(lr=10**400)


def test_a_config_is_immutable_and_override_makes_another():
    config = Toy(seeds=[3, 4])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    assert isinstance(config.seeds, tuple)
    other = override(config, lr=0.5)
    assert (config.lr, other.lr, other.seeds) == (1e-5, 0.5, (3, 4))
    with pytest.raises(ConfigError, match="Did you mean 'lr'"):
        override(config, lrr=1)
    with pytest.raises(ConfigError):
        config.model_copy(update={"lr": -1.0})
    assert config.model_copy(update={"lr": 0.5}) == Toy(seeds=[3, 4], lr=0.5)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config.model_copy() == config
    assert len({config, Toy(seeds=[3, 4])}) == 1


def test_conflicts_between_keys_are_told_only_when_the_keys_are_right():
    with pytest.raises(ConfigError, match="lr: too small for this batch"):
        Toy(batch_size=65)
    with pytest.raises(ConfigError) as caught:
        Toy(batch_size=65, lr=-1)
    assert len(caught.value.mistakes) == 1


def test_paths_are_asked_for_on_demand(tmp_path):
    config = Toy(path=str(tmp_path / "absent"))
    assert check_paths(config) == [f"path: there is no {tmp_path / 'absent'}; `make it` makes it"]
    with pytest.raises(ConfigError, match="make it"):
        require_paths(config)
    require_paths(Toy(path=tmp_path))


def test_the_error_is_the_packages_own_and_can_be_pickled():
    error = ConfigError(["a: b", "c: d"])
    assert isinstance(error, (MuError, ValueError))
    assert pickle.loads(pickle.dumps(error)).mistakes == ("a: b", "c: d")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"lr: " + b"[" * 5000 + b"]" * 5000, b"#" * (MAX_BYTES + 1)]
)
def test_a_file_that_is_no_config_is_one_clean_mistake(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Toy, config_path=path)
    assert len(caught.value.mistakes) == 1


def test_a_folder_or_absent_file_is_a_mistake_beside_the_others(tmp_path):
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(ConfigError) as caught:
            load_config(Toy, config_path=path, overrides={"lr": -1})
        assert len(caught.value.mistakes) == 2


def test_an_empty_file_sets_nothing(tmp_path):
    assert from_yaml(tmp_path, "# only a comment\n") == Toy()


@pytest.mark.parametrize(
    "name",
    [
        "emoji_canvas/sample.yaml",
        "configs/emoji_canvas/sample.yaml",
        "./configs/emoji_canvas/sample.yaml",
        "emoji_canvas/sample",
        "mu/algorithms/saliency_unlearning/configs/emoji_canvas/sample.yaml",
        "a/b/configs/emoji_canvas/sample.yaml",
    ],
)
def test_a_packaged_config_is_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == config_folders()[0] / "emoji_canvas/sample.yaml"


def test_what_is_no_packaged_config_is_told_with_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigFileError,
        match=r"emoji_canvas/train_style.yaml, .*\. Did you mean 'emoji_canvas/train_style.yaml'",
    ):
        find_config("emoji_canvas/trian_style.yaml")
    for outside in ("../train_config.yaml", "elsewhere/train_config.yaml", "model_config.yaml"):
        with pytest.raises(ConfigFileError):
            find_config(outside)


def test_the_yaml_of_a_method_is_found_at_its_path_and_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = "mu/algorithms/saliency_unlearning/configs/mask_config.yaml"
    assert find_config(path) == find_config("mask_config.yaml")
    assert find_config(path).as_posix().endswith(path)


def test_a_package_that_stands_alone_has_the_files_of_its_methods(tmp_path, monkeypatch):
    """`mu/` was copied without the `configs/` beside it."""
    own = tmp_path / "mu/algorithms/esd/configs"
    own.mkdir(parents=True)
    monkeypatch.setattr("mu.config_file._PACKAGE", tmp_path / "mu")
    assert config_folders() == [own]


def test_a_file_on_disk_comes_before_a_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(TrainConfig, config_path="train_config.yaml").lr == 1e-5
    (tmp_path / "train_config.yaml").write_text("lr: 0.25\n")
    assert load_config(TrainConfig, config_path="train_config.yaml").lr == 0.25


def test_package_paths_are_resolved_inside_the_package():
    import mu

    assert resolve_path("package:assets/x.yaml") == Path(mu.__file__).parent / "assets/x.yaml"
    assert resolve_path("assets/x.yaml") == Path("assets/x.yaml")
    with pytest.raises(ConfigError, match="leaves"):
        Toy(path="package:../../etc/passwd")


SIGNS = st.characters(exclude_categories=("Cc", "Cs"))
TEXT = st.text(SIGNS, max_size=30).filter(lambda text: "${" not in text)
NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_ ,.'-]{0,20}[A-Za-z0-9_]", fullmatch=True).filter(
    lambda name: ".." not in name
)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
FRACTION = st.floats(min_value=1e-9, max_value=1)


@given(
    lr=POSITIVE,
    batch_size=st.integers(1, 64),
    threshold=FRACTION | st.lists(FRACTION, min_size=1, unique=True).map(tuple),
    method=st.sampled_from(["full", "xattn", "noxattn"]),
    template_name=NAME | st.sampled_from(["null", "true", "1e5", "off", "~x", "1_000", "12:30"]),
    styles=st.none() | st.lists(NAME, min_size=1, unique=True).map(tuple),
    prompts=st.lists(TEXT.filter(bool), unique=True).map(tuple),
    seeds=st.lists(st.integers(0, 2**62), min_size=1, unique=True).map(tuple),
    use_sample=st.booleans(),
    path=st.none() | TEXT.filter(lambda text: text and not text.startswith(("package:", "~"))),
    size=st.none() | st.integers(1, 100).map(lambda n: 8 * n),
)
def test_what_is_dumped_is_loaded_again(tmp_path_factory, **values):
    config = Toy(**values)
    for key, value in values.items():
        assert getattr(config, key) == value
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load_config(Toy, config_path=path) == config


def test_every_key_has_its_type_in_words():
    words = {key.name: key.type_words for key in keys_of(Toy)}
    assert words["threshold"] == "a number or a list of numbers"
    assert words["styles"] == "a list of names or null"
    assert words["use_sample"] == "true or false"
    assert words["path"] == "a path or null"
    assert words["prompts"] == "a list of text"


def test_the_module_imports_no_heavy_package():
    code = "import sys, mu.config, mu.run_folder, mu.cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_numbers_are_dumped_on_one_line_and_texts_on_a_line_each():
    config = SampleConfig(prompts=("a cat", "a dog"), seeds=(1, 2, 3))
    assert "prompts:\n- a cat\n- a dog\n" in dump(config)
    assert "\nseeds: [1, 2, 3]\n" in dump(config)
