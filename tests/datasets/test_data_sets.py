"""The table of data sets: each is one class, and one of one's own needs no more than its file and its line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from two_folders import TwoFolders

import mu
from mu.config import override
from mu.datasets.data_sets import DATASETS, data_set_of, described
from mu.datasets.index import DataError
from mu.unlearning.config import DataKeys
from tests.datasets.drawing import data_set, draw

# What adds a data set: its file (tests/importable/two_folders.py), and its line in the table.
LINE = """
import json, sys
from mu.datasets.data_sets import DATASETS
from two_folders import TwoFolders
DATASETS["twofolders"] = TwoFolders
"""
ROOT = Path(__file__).parents[1] / "importable"


def added(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, in which the table has that line before anything else is imported."""
    code = f"{LINE}{program}\nassert 'torch' not in sys.modules\n"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_a_data_set_of_ones_own_is_checked_and_read(tmp_path: Path) -> None:
    draw(tmp_path / "forget/1.png", 1)
    draw(tmp_path / "keep/1.png", 2)
    (tmp_path / "keep/film.mp4").write_bytes(b"x")
    program = """
from pathlib import Path
from mu.config import ConfigError, load_config
from mu.unlearning.config import DataKeys
keys = {"dataset_type": "twofolders", "template_name": "dog", "raw_dataset_dir": sys.argv[1]}
config = load_config(DataKeys, overrides=keys)
data_set = DATASETS["twofolders"](config)
assert not list(data_set.disk_problems())
rows = data_set.rows(None)
sampled = load_config(DataKeys, overrides={**keys, "retain_set": "generated", "retain_prompts": ["a cat"]})
both = DATASETS["twofolders"](sampled).rows(Path("sampled"))
told = [str(row.image) for row in (*both.forget, *both.retain)]
wrong = {**keys, "styles": ["A"], "forget_prompts": ["x"], "retain_prompts": ["x"], "missing_images": "skip"}
try:
    load_config(DataKeys, overrides=wrong)
except ConfigError as error:
    mistakes = list(error.mistakes)
absent = load_config(DataKeys, overrides={**keys, "raw_dataset_dir": "absent"})
missing = [message for _, message in DATASETS["twofolders"](absent).disk_problems()]
print(json.dumps([[row.prompt for row in rows.forget], [row.relative for row in rows.retain], rows.notes, told,
                  mistakes, missing]))
"""
    done = added(program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    forget, retain, notes, sampled, mistakes, missing = json.loads(done.stdout)
    assert (forget, retain) == (["a picture of dog"], ["keep/1.png"])
    assert "film.mp4" in notes[0]
    assert sampled[0] == str(tmp_path / "forget/1.png")
    assert sampled[1].startswith("sampled/a-cat-")
    assert [mistake.partition(":")[0] for mistake in mistakes] == [
        "forget_prompts",
        "retain_prompts",
        "missing_images",
    ]
    assert mistakes[0].startswith("forget_prompts: dataset_type twofolders has its own prompts")
    assert missing == ["there is no folder absent/forget. It holds the folders forget and keep."]


def test_a_data_set_of_ones_own_is_in_the_help() -> None:
    program = """
from mu.algorithms.saliency_unlearning.scripts import train
try:
    train.main(["--help"])
except SystemExit as ended:
    assert not ended.code
"""
    done = added(program)
    assert done.returncode == 0, done.stderr
    assert f"twofolders: {TwoFolders.about}" in " ".join(done.stdout.split())


def test_the_table_is_the_only_place_that_lists_data_sets() -> None:
    """No module asks which one it is; a new one would be forgotten there."""
    asks = re.compile(r"(dataset_type|self\.kind)\)?\s*(==|!=|in\s*[(\[{]|not in\b)")
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(mu.__path__[0]).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if asks.search(line) and path.name != "config_keys.py"  # whose kind is that of a key
    ]
    assert found == []


def test_each_says_what_it_is() -> None:
    assert described().startswith("unlearncanvas: folders of images")
    for name, cls in DATASETS.items():
        assert f"{name}: {cls.about}" in described()
        assert cls.about.endswith(".")


def test_a_name_that_is_none_is_told_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'unlearn_canvas' is not one of: .* Did you mean 'unlearncanvas'"):
        data_set("unlearn_canvas")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dataset_type": "unlearncanvas"}, "missing_images"),
        ({"dataset_type": "generated", "template_name": "Noto"}, "missing_images"),
    ],
)
def test_a_key_without_meaning_is_refused(changes: dict[str, Any], key: str) -> None:
    config = DataKeys(**changes)
    assert list(data_set_of(config).conflicts()) == []
    with pytest.raises(ValueError, match=f"{key}: only tables of prompts"):
        override(config, **{key: "skip"})


def test_the_folder_of_what_was_made_tells_models_apart() -> None:
    images = Path("processed/generated/0123-4567")
    grid, folder = data_set("generated", template_name="Noto"), data_set("folder", Path("x"))
    assert grid.cache_name(images) == "generated-0123-4567"
    assert folder.cache_name(images) == folder.cache_name(None) == "folder"
