"""The console script: every command by its short name, quick, and each help opens with what can be typed."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mu
from mu.commands import main as script
from mu.config import keys_of
from mu.config_file import packaged_configs

DOORS = {name: module for group in script.COMMANDS.values() for name, (module, _) in group.items()}
METHODS = {f"train --method {name}": module for name, module in script.train_doors().items()}
PROGRAM = """
import json, sys
from mu.commands.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "numpy", "pydantic", "omegaconf", "yaml", "tqdm", "pytorch_lightning"}
print(json.dumps([code, sorted(heavy & set(sys.modules))]))
"""


def apart(*argv: str) -> tuple[int, list[str], str]:
    """(exit code, packages that were imported, what was printed) of the script in its own process."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    code, loaded = json.loads(last)
    return code, loaded, "\n".join(printed)


def examples(printed: str) -> list[list[str]]:
    """The commands that a help opens with."""
    lines = printed.splitlines()
    assert lines[0].startswith("Try:   unlearn_diff ")
    opening = [lines[0], *(line for line in lines[1:4] if line.startswith("       unlearn_diff "))]
    return [shlex.split(line)[2 if line.startswith("Try") else 1 :] for line in opening]


def test_help_names_every_command_and_loads_nothing() -> None:
    code, loaded, printed = apart("--help")
    assert (code, loaded) == (0, [])
    for group, commands in script.COMMANDS.items():
        assert f"\n{group}:\n" in printed
        for name, (_, line) in commands.items():
            assert any(row.split(maxsplit=1) == [name, line] for row in printed.splitlines())
    assert max(map(len, printed.splitlines())) <= 100
    assert apart() == (0, [], printed)
    assert apart("--version") == (0, [], f"unlearn_diff {mu.__version__}")


@pytest.mark.parametrize("command", [*DOORS, *METHODS])
def test_each_help_opens_with_what_can_be_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*command.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    *_, last = examples(printed)
    own = (
        command.split() if command in METHODS and not command.endswith(script.METHOD) else command.split()[:1]
    )
    assert last[: len(own)] == own
    usage = next(line for line in printed.splitlines() if line.casefold().startswith("usage: "))
    assert usage.split()[1 : 2 + len(own)] == ["unlearn_diff", *own]
    assert "python -m" not in usage
    if command.startswith("train"):
        others = {name for name in script.train_doors() if f"--method {name}" not in command}
        if command == "train":
            others = {"esd", "uce"}
        assert all(f"unlearn_diff train --method {name} --help" in printed for name in others)


def test_help_of_a_command_loads_neither_torch_nor_transformers() -> None:
    for command in ("mask", "report", "patch"):
        code, loaded, _ = apart(command, "--help")
        assert code == 0
        assert not {"torch", "transformers", "numpy", "pytorch_lightning"} & set(loaded), command


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["generate_maks"], "Did you mean 'generate-mask'?"),
        (["train", "--method", "ecd"], "method: 'ecd' is not one of: saliency_unlearning, esd, uce, salun."),
        (["train", "--method"], "method: '' is not one of: "),
    ],
)
def test_a_wrong_command_or_method_is_exit_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(argv) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert said in error


def test_commands_answer_to_the_names_of_their_modules_too(capsys: pytest.CaptureFixture[str]) -> None:
    for name, usage in (("generate_mask", "mask"), ("apply_patch", "patch")):
        assert script.main([name, "--help"]) == 0
        assert f"Usage: unlearn_diff {usage} " in capsys.readouterr().out


def test_a_method_stands_anywhere_among_the_arguments_and_has_a_short_name() -> None:
    assert script.method_of(["--lr", "1", "--method", "esd", "--quiet"]) == ("esd", ["--lr", "1", "--quiet"])
    assert script.method_of(["--method=salun"]) == ("saliency_unlearning", [])
    assert script.method_of([]) == ("saliency_unlearning", [])
    for module in script.train_doors().values():
        name = {"saliency_unlearning": "TrainConfig", "esd": "ESDConfig", "uce": "UCEConfig"}
        cls = getattr(importlib.import_module(module), name[module.split(".")[2]])
        assert "method" not in {key.name for key in keys_of(cls)}


def test_the_script_is_installed_under_its_name() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'unlearn_diff = "mu.commands.main:main"' in text


def test_what_a_door_prints_can_be_typed_where_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "bin/unlearn_diff"
    called.parent.mkdir()
    called.write_text("#!/bin/sh\n")
    called.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(called)])
    assert script.program_name() == str(called), "not on the PATH"
    monkeypatch.setenv("PATH", str(called.parent))
    assert script.program_name() == "unlearn_diff"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert script.program_name() == "unlearn_diff"


def test_the_packaged_files_of_a_train_door_are_listed_by_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "emoji_canvas/esd_style.yaml" in packaged_configs()
    assert script.main(["train", "--method", "esd", "--help"]) == 0
    assert "\n      emoji_canvas/esd_style.yaml\n" in capsys.readouterr().out


def test_the_openings_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a few seconds with pictures of two steps, which take the longest; of others the plan is made."""
    monkeypatch.chdir(tmp_path)
    opening: dict[str, list[list[str]]] = {}
    for command in (*DOORS, *METHODS):
        if command.startswith(("download", "create")):
            continue
        assert script.main([*command.split(), "--help"]) == 0
        opening[command] = examples(capsys.readouterr().out)

    def run(words: list[str], *more: str) -> None:
        assert script.main([*words, *more]) == 0, (words, capsys.readouterr().err)

    done: set[str] = set()
    short = {"train": ["--sample_steps", "2"], "sample": ["--sample_steps", "2", "--seeds", "1"]}
    short["evaluate"] = ["--sample_steps", "1", "--styles", "Noto,Blob", "--objects", "Cats,Dogs"]
    short["attack"] = [
        "--sample_steps",
        "1",
        "--objects",
        "Cats,Dogs",
        "--seeds",
        "1",
        "--inversion_steps",
        "1",
    ]
    for command, lines in opening.items():
        for words in lines:
            if shlex.join(words) in done:
                continue
            done.add(shlex.join(words))
            is_long = words[0] in ("forget", "mask", "train") and "uce" not in words
            if command == "train" and words[0] == "train":
                continue  # needs the mask: see the slow test
            run(words, *(["--dry_run"] if is_long else short.get(words[0], [])))
    assert (tmp_path / "forgotten.safetensors").is_file()
    assert (tmp_path / "emoji_diffusers/model_index.json").is_file()
    (run_folder,) = (tmp_path / "outputs/uce").glob("*/report.html")
    assert run_folder.stat().st_size > 10_000


@pytest.mark.slow
def test_the_openings_of_salun_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["mask"], ["train"], ["evaluate", "--seeds", "188"]):
        name = f"emoji_canvas/{words[0]}_style.yaml"
        assert script.main([words[0], "--config_path", name, *words[1:]]) == 0
    shutil.rmtree(tmp_path / "outputs")


def test_a_report_is_made_again_or_it_is_told_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["report", "nowhere"]) == 2
    assert "run: nowhere is not the folder of a finished run" in capsys.readouterr().err
    assert script.main(["report"]) == 2
    assert "is missing; write: unlearn_diff report RUN_FOLDER" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("template: style\n")
    (tmp_path / "run/metrics.json").write_text('{"masks": {}}')
    assert script.main(["report", "run"]) == 1
    assert "holds no metrics.json of an evaluation" in capsys.readouterr().err
    (tmp_path / "run/metrics.json").write_text("{")
    assert script.main(["report", "run"]) == 1
    assert "a file of the run is damaged" in capsys.readouterr().err
