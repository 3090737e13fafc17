"""The command lines: quick, light, with exit codes that say what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mu.commands import create_env, download_data, download_model

HEAVY = (
    "torch",
    "transformers",
    "pytorch_lightning",
    "open_clip",
    "huggingface_hub",
    "gdown",
    "wandb",
    "numpy",
)


@pytest.mark.parametrize("name", ["download_data", "download_model", "create_env"])
def test_help_loads_nothing_heavy(name: str) -> None:
    program = (
        f"import sys, mu.commands.{name} as door\n"
        "try: door.main(['--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        f"print('loaded', *sorted(set(sys.modules) & {set(HEAVY)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"
    assert "exit codes:" in done.stdout


def test_scripts_of_the_package_are_these_commands() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for module in (create_env, download_data, download_model):
        name = module.__name__.rpartition(".")[2]
        assert f'{name} = "mu.commands.{name}:main"' in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sampel", "i2p"], "'sampel' is not one of: sample, full. Did you mean 'sample'?"),
        (["full", "quick-canvas"], "Did you mean 'quick_canvas'?"),
        (["full"], "required"),
        (["full", "i2p", "--sha256", "abc"], "64 hexadecimal digits"),
        (["full", "i2p", "--max_files", "0"], "not a whole number above 0"),
    ],
)
def test_a_mistake_in_the_arguments_is_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        download_data.main(arguments)
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_summary_lists_what_is_there(
    server: Any,
    canvas_zip: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", "unlearn_canvas", "--url", server.put("x.zip", canvas_zip), "--no_progress"]
    assert download_data.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"{tmp_path}/data/quick-canvas-dataset/sample: 12 files, 10.5 KiB (downloaded from"
    )
    assert [line.split() for line in lines[1:]] == [
        ["Cubism/", "5.3", "KiB", "6", "files"],
        ["Seed_Images/", "5.3", "KiB", "6", "files"],
    ]
    assert download_data.main(command) == 0
    assert "nothing was downloaded" in capsys.readouterr().out


def test_a_failure_is_exit_code_1_and_one_message(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert download_model.main(["compvis", "--url", server.url("gone.zip")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {server.url('gone.zip')}: the server answered 404")


def test_quiet_prints_the_folder_alone_and_errors_and_json_all_of_it(
    server: Any,
    canvas_zip: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", "unlearn_canvas", "--quiet"]
    assert download_data.main([*command, "--url", server.put("x.zip", canvas_zip)]) == 0
    folder = tmp_path / "data/quick-canvas-dataset/sample"
    assert capsys.readouterr() == (f"{folder}\n", "")
    as_json = [*command[:2], "--json", "--no_progress"]
    assert download_data.main([*as_json, "--url", server.put("x.zip", canvas_zip)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["folder"], len(found["files"])) == (str(folder), 12)
    assert found["bytes"] == sum(found["files"].values())
    assert download_data.main([*command, "--url", server.url("gone.zip")]) == 1
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("error: ")
