from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import parse_cli

from mu.bars import loading
from mu.cli import HelpAsked, command_line, help_text, recipe_beside, run_door
from mu.config import Config, ConfigError, load_config, setting
from mu.console import Answer, duration
from mu.errors import MuError, Terminated
from mu.run_folder import RunFolder
from mu.verbosity import bars_off


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


@pytest.mark.parametrize("text", ["[{concept}]", "[{concept}, art by {concept}]"])
def test_a_list_with_braces_says_that_they_need_quotes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"seeds: not a YAML list.* needs quotes: \['{concept}', 'art by"):
        parse_cli(Toy, ["--seeds", text])


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


def test_a_packaged_file_is_used_and_that_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text("lr: 0.5\n")
    monkeypatch.setattr("mu.config_file.config_folders", lambda: [tmp_path])
    assert parse_cli(Toy, ["--config_path", "configs/train.yaml"]).lr == 0.5
    said = capsys.readouterr().out
    assert f"train.yaml is not on disk; using {tmp_path / 'train.yaml'}" in said
    assert parse_cli(Toy, ["--config_path", "train.yaml"]).lr == 0.5
    assert capsys.readouterr().out == ""


def test_help_lists_the_packaged_files_of_the_command(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.yaml").write_text("# python -m mu.toy --config_path a/one.yaml\nlr: 0.5\n")
    (tmp_path / "two.yaml").write_text("# python -m mu.toys --config_path two.yaml\nlr: 0.5\n")
    monkeypatch.setattr("mu.config_file.config_folders", lambda: [tmp_path])
    text = help_text(Toy, module="mu.toy", summary="Does it.")
    assert "      a/one.yaml\n--log_level" in text
    assert "two.yaml" not in text
    assert "is looked up among the packaged:\n      a/one.yaml" in text


def test_help_of_a_command_without_packaged_files_speaks_of_none():
    text = help_text(Toy, module="mu.of_nothing", summary="Does it.")
    assert "    YAML file of `key: value` lines.\n--log_level" in text


def test_a_config_path_that_cannot_be_looked_at_is_one_mistake(capsys):
    """The system refuses to look for a name of 300 letters; it is none of a file that could be there."""
    for name in ("x" * 300, "mu/" + "x" * 300, "x" * 300 + "/train.yaml"):
        assert door(lambda _: None, "--config_path", name) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"1 mistake in the configuration:\n  config_path: there is no file {name!r}. ")


def test_numbers_that_are_written_as_python_alone_reads_them_are_mistakes(capsys):
    for text in ("1_0", " 1", "1 ", "\u0661", "0x10", "infinity", "1e999999"):
        assert door(lambda _: None, f"--lr={text}") == 2
        assert capsys.readouterr().err.endswith(f"lr: must be a number, got {text!r} (--lr)\n")
    for text in ("1_0", " 1", "\u0661", "9" * 400, "1.0"):
        assert door(lambda _: None, f"--seeds={text}") == 2
        shown = repr(text) if len(text) < 60 else "'" + "9" * 56 + "..."
        assert capsys.readouterr().err.endswith(
            f"seeds: must be a list of whole numbers, got {shown} (--seeds)\n"
        )


def test_numbers_out_of_range_are_shown_as_they_are():
    for value, shown in ((-1, "-1"), (-1.0000001, "-1.0000001"), (-0.0, "-0"), (-1e300, "-1e+300")):
        with pytest.raises(ConfigError, match=re.escape(f"lr: must be > 0, got {shown}") + "$"):
            Toy(lr=value)
    for value, shown in ((-1234567, "-1234567"), (-(10**400), "-1" + "0" * 55 + "...")):
        with pytest.raises(ConfigError, match=re.escape(f"seeds: must be >= 0, got {shown}") + "$"):
            Toy(seeds=(value,))
    with pytest.raises(ConfigError, match="seeds: must be >= 0, got a value of type int that is too long"):
        Toy(seeds=(-(10**5000),))


def test_the_door_prints_the_result_and_at_debug_the_merged_config(capsys, tmp_path):
    outcome = {"path": "x.safetensors", "loss": 0.123456789, "row": {"UA": 1}}
    assert door(lambda _: outcome, "--lr", "0.5") == 0
    result = "path: x.safetensors\nloss: 0.123457\nrow:\n  UA: 1\n"
    assert capsys.readouterr() == (result, "")
    assert door(lambda _: outcome, "--lr", "0.5", "--log_level", "debug") == 0
    printed, said = capsys.readouterr()
    config_text, _, after = printed.partition("\n\n")
    (tmp_path / "printed.yaml").write_text(config_text)
    assert load_config(Toy, config_path=tmp_path / "printed.yaml") == Toy(lr=0.5)
    assert (after, said) == (result, "")


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


def test_quiet_and_log_level_decide_what_the_console_hears(capsys, tmp_path):
    """log.txt has all of it, whatever is asked for; the bars go with quiet alone."""

    def run(_):
        with RunFolder.create(tmp_path, "run") as folder:
            for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
                folder.logger.log(level, "at level %d", level)
        log = (folder.path / "log.txt").read_text()
        assert {level for level in (20, 30, 40) if f"at level {level}\n" in log} == {20, 30, 40}
        return {"off": bars_off()}

    for flags, heard, off in (
        ([], {20, 30, 40}, False),
        (["--log_level", "debug"], {10, 20, 30, 40}, False),
        (["--log_level=warning"], {30, 40}, False),
        (["--log_level", "error"], {40}, False),
        (["--quiet"], {30, 40}, True),
        (["--quiet", "--log_level", "error", "--lr", "0.5"], {40}, True),
        (["--quiet", "false"], {20, 30, 40}, False),
    ):
        assert door(run, *flags) == 0
        printed, said = capsys.readouterr()
        assert {level for level in (10, 20, 30, 40) if f"at level {level}\n" in said} == heard, flags
        assert printed.endswith(f"off: {off}\n")
        assert ("# settings of python -m mu.toy: defaults < config file < flags\nlr: " in printed) == (
            10 in heard
        )
    assert not bars_off()


def test_quiet_prints_paths_alone_and_json_the_whole_result_alone(capsys, tmp_path):
    (tmp_path / "x.yaml").write_text("lr: 0.25\n")

    def run(_):
        print("somebody else's note")
        return {"run": tmp_path, "loss": float("nan"), "kept": {0.5: 3}, "off": bars_off()}

    def answer(config, result, config_path):
        return Answer(
            [f"Done at {config.lr}, as {Path(config_path).name} says."],
            made={"model": result["run"] / "m", "patch": None, "numbers": result["run"] / "n"},
            following=[("To look", "look at it")],
        )

    def said(*flags):
        argv = ["--config_path", str(tmp_path / "x.yaml"), *flags]
        assert run_door(Toy, run, module="m", summary="s", argv=argv, answer=answer) == 0
        return capsys.readouterr()

    assert said().out.endswith(
        f"somebody else's note\n\nDone at 0.25, as x.yaml says.\n  model    {tmp_path}/m\n  numbers  {tmp_path}/n\n"
        "To look:\n  look at it\n"
    )
    assert said("--quiet").out == f"somebody else's note\n{tmp_path}/m\n{tmp_path}/n\n"
    printed, error = said("--json")
    assert json.loads(printed) == {"run": str(tmp_path), "loss": None, "kept": {"0.5": 3}, "off": True}
    assert error == "somebody else's note\n"
    assert json.loads(said("--json", "--quiet").out)["off"] is True

    assert door(run, "--json", "--lr", "0") == 2
    printed, error = capsys.readouterr()
    assert (printed, "lr: must be > 0" in error) == ("", True)


def test_paths_are_quoted_where_they_are_copied_and_not_where_programs_read_them():
    said = Answer(["Done."], made={"model": Path("my runs/it's/m"), "patch": Path("plain/p")})
    assert str(said).splitlines()[1:] == ["""  model  'my runs/it'"'"'s/m'""", "  patch  plain/p"]
    assert said.paths == ["my runs/it's/m", "plain/p"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_a_command_while_it_imports_is_heard_afterwards(signum, capsys):
    """Raised within an import it would come out as an import that failed."""
    done = []

    def run(_):
        with loading():
            os.kill(os.getpid(), signum)
            done.append("imported")
        done.append("run")

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a test in the background
    try:
        code = run_door(Toy, run, module="m", summary="s", argv=["--lr", "0.5"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (code, done) == (128 + signum, ["imported"])
    assert capsys.readouterr().err.splitlines()[-1] == {
        signal.SIGINT: "interrupted",
        signal.SIGTERM: "terminated",
    }.get(signum)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (99.4, "99 s"),
        (123, "2 min 3 s"),
        (180.2, "3 min"),
        (3900, "1 h 5 min"),
    ],
)
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_settings_of_the_next_command_lie_beside_those_that_were_given(tmp_path):
    assert recipe_beside("emoji_canvas/mask_style.yaml", "train") == "emoji_canvas/train_style.yaml"
    assert recipe_beside("emoji_canvas/esd_style.yaml", "evaluate") == "emoji_canvas/evaluate_style.yaml"
    assert recipe_beside("emoji_canvas/sample.yaml", "train") is None
    assert recipe_beside(None, "train") is None
    for name in ("mask_mine.yaml", "train_mine.yaml"):
        (tmp_path / name).write_text("")
    assert recipe_beside(str(tmp_path / "mask_mine.yaml"), "train") == str(tmp_path / "train_mine.yaml")
    assert recipe_beside(str(tmp_path / "mask_mine.yaml"), "evaluate") is None


def test_the_note_on_keys_without_effect_heeds_quiet_and_log_level(caplog, tmp_path):
    class Older(Toy):
        without_effect = ("steps_of_old",)

    (tmp_path / "x.yaml").write_text("steps_of_old: 3\n")
    for flags, told in (
        ([], True),
        (["--log_level", "warning"], True),
        (["--log_level", "error"], False),
        (["--quiet"], False),
    ):
        caplog.clear()
        argv = ["--config_path", str(tmp_path / "x.yaml"), *flags]
        assert run_door(Older, lambda _: None, module="m", summary="s", argv=argv) == 0
        assert ("steps_of_old: taken because existing files have it" in caplog.text) == told, flags


def test_a_wrong_verbosity_is_a_mistake_among_the_others(capsys):
    assert door(lambda _: None, "--log_level", "warn", "--quiet", "yes", "--lr", "0") == 2
    said = capsys.readouterr().err
    assert "3 mistakes" in said
    assert "log_level: 'warn' is not one of: debug, info, warning, error. Did you mean 'warning'?" in said


def test_at_debug_an_error_shows_where_it_came_from(capsys):
    def run(_):
        raise MuError("the mask is of another model")

    assert door(run, "--log_level", "debug") == 1
    assert "Traceback" in capsys.readouterr().err
    assert door(run) == 1
    assert "Traceback" not in capsys.readouterr().err


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "3"}


@pytest.mark.parametrize("by", ["torchrun", "slurm"])
def test_of_processes_started_together_the_first_speaks_and_the_others_of_what_they_alone_have_met(
    monkeypatch, capsys, tmp_path, by
):
    def run(error=None):
        with RunFolder.create(tmp_path, "run") as folder:
            folder.logger.warning("heard")
        logging.getLogger("mu.somewhere").warning("also without a folder")
        if error is not None:
            raise error
        return {"loss": 0.5, "bars off": bars_off()}

    def of_all(error):
        error.in_all_processes = True
        return error

    def said_by(rank, *flags, error=None, local_rank=rank_of_machine):
        together = TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(local_rank(rank))}
        if by == "slurm":
            together = SLURM | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank(rank))}
        for name, value in together.items():
            monkeypatch.setenv(name, value)
        code = run_door(
            Toy, lambda _: run(error), module="mu.toy", summary="Does it.", argv=flags, shares_work=True
        )
        return (code, *capsys.readouterr())

    code, printed, said = said_by(0, "--log_level", "debug")
    assert code == 0
    assert "defaults < config file < flags" in printed
    assert "loss: 0.5" in printed
    assert "heard" in said
    assert said_by(1) == (0, "", "")
    assert said_by(2, "--log_level", "debug") == (0, "", "")
    assert said_by(1, "--help") == (0, "", "")

    for error, code, text in (
        (MuError("no image"), 1, "error: no image\n"),
        (ConfigError(["run_name: taken"]), 2, "1 mistake in the configuration:\n  run_name: taken\n"),
    ):
        found = said_by(1, error=error)
        assert (found[0], found[2]) == (code, text), "what one alone has met"
        assert said_by(1, error=of_all(error)) == (code, "", "")
        found = said_by(0, error=error)
        assert (found[0], found[2].endswith(text)) == (code, True)
    assert "Traceback" in said_by(2, "--log_level", "debug", error=MuError("mine"))[2]
    assert said_by(2, "--log_level", "debug", error=of_all(MuError("ours"))) == (1, "", "")
    assert said_by(1, error=KeyboardInterrupt()) == (130, "", "")
    assert said_by(1, error=Terminated()) == (143, "", "")

    assert said_by(1, "--lr", "0") == (2, "", "")
    code, _, said = said_by(2, "--lr", "0", local_rank=lambda _: 0)
    assert (code, "lr: must be > 0" in said) == (2, True), "on another machine, files may differ"


def rank_of_machine(rank):
    """That of a process when there is one machine."""
    return rank


def test_a_door_that_is_one_process_is_not_started_several_times(monkeypatch, capsys):
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert door(lambda _: pytest.fail("it ran")) == 2
    assert "mu.toy is one process and was started as 3: leave out torchrun or srun" in capsys.readouterr().err
    assert door(lambda _: pytest.fail("it ran"), "--help") == 0
    assert "--lr" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert door(lambda _: pytest.fail("it ran")) == 2
    assert capsys.readouterr() == ("", "")


DOOR = "from test_cli import door; sys.exit(door(lambda _: print('begun', file=sys.stderr), *sys.argv[1:]))"
PARSER = "from mu.console import ArgumentParser; ArgumentParser(epilog='x ' * 90_000).parse_args()"


@pytest.mark.parametrize(
    ("program", "argv", "code"),
    [(DOOR, ["--help"], 0), (DOOR, ["--lr", "0.5"], 141), (PARSER, ["--help"], 0)],
)
def test_a_reader_that_has_gone_ends_a_door_quietly(program, argv, code):
    """As in `--help | head`: the pipe has no reader any more when the door prints."""
    program = f"import sys; sys.path.append('importable'); sys.stdin.read(); {program}"
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


def test_promise_22_memory_that_runs_out_anywhere_is_an_error_with_advice(capsys):
    code = door(lambda _: bytearray(2**60), "--quiet", "true")
    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith(
        "error: out of memory in this run (MemoryError). What saves memory: a smaller batch_size"
    )
    assert "Traceback" not in said
