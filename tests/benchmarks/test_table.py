"""The command of the results table: its help, and its YAML files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.table_config import CONCEPTS, TableConfig
from benchmarks.table_rows import planned_rows
from mu.config import keys_of, load_config

ROOT = Path(__file__).parents[2]
FILES = sorted(
    set((ROOT / "benchmarks").glob("*.yaml")) - {ROOT / "benchmarks" / "emoji_canvas_robustness.yaml"}
)
PROGRAM = """
import runpy, sys
try:
    runpy.run_module("benchmarks.table", run_name="__main__", alter_sys=True)
finally:
    print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


def test_help_names_every_key_and_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert all(f"\n--{key.name}  " in done.stdout for key in keys_of(TableConfig))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_opens_with_its_command_and_has_a_row_for_each_method(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# python -m benchmarks.table --config_path benchmarks/{path.name}"
    config = load_config(TableConfig, config_path=path)
    for concept in CONCEPTS:
        assert [row.name for row in planned_rows(config, concept)] == list(config.methods)


def test_each_threshold_has_a_folder_of_its_own() -> None:
    """Also where two are equal in their first six digits; that of 1 is named as it always was."""
    thresholds = (0.5, 0.1234567, 0.12345671, 1.0)
    rows = planned_rows(TableConfig(methods=("salun",), thresholds=thresholds), CONCEPTS[0])
    names = [row.folder.name for row in rows]
    assert names == ["salun-0.5", "salun-0.1234567", "salun-0.12345671", "salun-1"]


def test_a_mistake_is_told_and_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--methods", "saln", "--output_dir", str(tmp_path / "out")]) == 2
    assert "Did you mean 'salun'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
