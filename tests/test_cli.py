from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from mu.cli import HelpAsked, command_line, help_text, parse_cli, run_door
from mu.config import Config, ConfigError, load_config, setting
from mu.errors import MuError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Config):
    lr: float = setting(1e-5, "Step size.", gt=0)
    name: str | None = setting("Noto", "Concept.", kind="name")
    method: str = setting("full", "What moves.", choices=("full", "xattn"))
    seeds: tuple[int, ...] = setting((1, 2), "Seeds.", ge=0)
    prompts: tuple[str, ...] = setting((), "Prompts.", split=False, may_be_empty=True)
    verbose: bool = setting(False, "Say more.")


def door(run, *argv):
    return run_door(Toy, run, module="mu.toy", summary="Does it.", argv=argv)


def test_both_spellings_of_a_flag():
    config = parse_cli(Toy, ["--lr", "1e-3", "--method=xattn", "--seeds", "3,4", "--verbose=true"])
    assert (config.lr, config.method, config.seeds, config.verbose) == (1e-3, "xattn", (3, 4), True)


def test_lists_null_and_texts():
    assert parse_cli(Toy, ["--seeds", "[5, 6]"]).seeds == (5, 6)
    assert parse_cli(Toy, ["--name", "null"]).name is None
    assert parse_cli(Toy, ["--prompts", "a cat, sitting"]).prompts == ("a cat, sitting",)
    assert parse_cli(Toy, ["--prompts", '["a, b", c]']).prompts == ("a, b", "c")
    assert parse_cli(Toy, ["--prompts=--x = y"]).prompts == ("--x = y",)
    assert parse_cli(Toy, ["--prompts", "[]"]).prompts == ()


def test_flags_come_after_the_file_and_the_file_after_the_defaults(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("lr: 0.5\nmethod: xattn\n")
    config = parse_cli(Toy, ["--lr", "0.25", "--config_path", str(path)])
    assert (config.lr, config.method, config.name) == (0.25, "xattn", "Noto")


def test_mistakes_of_file_and_flags_come_together(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("lrr: 0.5\nmethod: 3\n")
    argv = [
        "--config_path",
        str(path),
        "stray",
        "--nam",
        "x",
        "--lr",
        "-1",
        "--lr",
        "2",
        "--seeds",
        "[1",
        "--verbose",
    ]
    with pytest.raises(ConfigError) as caught:
        parse_cli(Toy, argv)
    found = caught.value.mistakes
    expected = [
        "'stray' belongs to no flag",
        "--nam: there is no such flag. Did you mean 'name'?",
        "--lr: given twice",
        "--verbose: a value is missing",
        "seeds: not a YAML list",
        "lrr: there is no such key. Did you mean 'lr'? (x.yaml line 1)",
        "lr: must be > 0, got -1 (--lr)",
        "method: '3' is not one of: full, xattn. (x.yaml line 2)",
    ]
    assert len(found) == len(expected)
    for mistake, beginning in zip(found, expected, strict=True):
        assert mistake.startswith(beginning)


def test_a_negative_number_is_a_value():
    with pytest.raises(ConfigError, match="seeds: must be >= 0, got -3"):
        parse_cli(Toy, ["--seeds", "-3"])


def test_help_is_asked_for_anywhere_and_names_every_key():
    for argv in (["--help"], ["-h"], ["--lr", "wrong", "--help"]):
        with pytest.raises(HelpAsked):
            parse_cli(Toy, argv)
    text = help_text(Toy, module="mu.toy", summary="Does it.")
    assert "--lr  a number, > 0; default: 1e-05\n    Step size." in text
    assert "--method  text; default: full\n    one of: full, xattn\n    What moves." in text
    assert "--seeds  a list of whole numbers, >= 0; default: 1,2" in text
    assert "--name  a name or null; default: Noto" in text


def test_a_packaged_file_is_used_and_that_is_said(tmp_path, capsys):
    (tmp_path / "train.yaml").write_text("lr: 0.5\n")
    assert parse_cli(Toy, ["--config_path", "train.yaml"], packaged=tmp_path).lr == 0.5
    said = capsys.readouterr().out
    assert "train.yaml is not on disk; using" in said
    assert parse_cli(Toy, ["--config_path", str(tmp_path / "train.yaml")], packaged=tmp_path).lr == 0.5
    assert capsys.readouterr().out == ""


def test_the_door_prints_the_merged_config_and_the_result(capsys, tmp_path):
    outcome = {"path": "x.safetensors", "loss": 0.123456789, "row": {"UA": 1}}
    assert door(lambda _: outcome, "--lr", "0.5") == 0
    printed, said = capsys.readouterr()
    config_text, _, result = printed.partition("\n\n")
    (tmp_path / "printed.yaml").write_text(config_text)
    assert load_config(Toy, config_path=tmp_path / "printed.yaml") == Toy(lr=0.5)
    assert result == "path: x.safetensors\nloss: 0.123457\nrow:\n  UA: 1\n"
    assert said == ""


def test_exit_codes(capsys):
    def fail(error):
        def run(_):
            raise error

        return run

    class RunError(MuError, ValueError):
        pass

    assert door(fail(AssertionError), "--help") == 0
    assert door(fail(AssertionError), "--lr", "0") == 2
    assert capsys.readouterr().err == "1 mistake in the configuration:\n  lr: must be > 0, got 0 (--lr)\n"
    assert door(fail(ConfigError(["name: it is gone"]))) == 2
    capsys.readouterr()
    assert door(fail(RunError("the mask is of another model"))) == 1
    assert capsys.readouterr().err == "error: the mask is of another model\n"
    assert door(fail(OSError(errno.ENOSPC, "No space left on device", "/x/model.ckpt"))) == 1
    assert capsys.readouterr().err == "error: the disk is full: /x/model.ckpt\n"
    assert door(fail(KeyboardInterrupt())) == 130
    with pytest.raises(OSError, match="permission"):  # what nobody foresaw keeps its traceback
        door(fail(OSError(errno.EACCES, "permission denied")))
    with pytest.raises(ZeroDivisionError):
        door(fail(ZeroDivisionError()))


DOOR = "from test_cli import door; sys.exit(door(lambda _: print('begun', file=sys.stderr), *sys.argv[1:]))"
PARSER = "from mu.cli import ArgumentParser; ArgumentParser(epilog='x ' * 90_000).parse_args()"


@pytest.mark.parametrize(
    ("program", "argv", "code"),
    [(DOOR, ["--help"], 0), (DOOR, ["--lr", "0.5"], 141), (PARSER, ["--help"], 0)],
)
def test_a_reader_that_has_gone_ends_a_door_quietly(program, argv, code):
    """As in `--help | head`: the pipe has no reader any more when the door prints."""
    program = f"import sys; sys.stdin.read(); {program}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent,  # of this module, which the program may import
    )
    process.stdout.close()
    _, said = process.communicate()
    assert (said, process.returncode) == (b"", code)


def test_a_printed_command_gives_the_same_config():
    values = {
        "lr": 0.5,
        "name": None,
        "seeds": (7,),
        "prompts": ("it's a, b", "c"),
        "verbose": False,
        "other": 3,
    }
    command = command_line("mu.toy", Toy, values)
    assert command.startswith("python -m mu.toy --lr 0.5 --name null --seeds 7 --prompts ")
    import shlex

    config = parse_cli(Toy, shlex.split(command)[3:])
    assert config == Toy(lr=0.5, name=None, seeds=(7,), prompts=("it's a, b", "c"))
