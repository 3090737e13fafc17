"""Command lines from config classes: `--config_path X.yaml --key value ...`, `--help`, exit codes.

Exit codes: 0 done, 1 a run that failed with a message, 2 a mistake in the settings, 130 interrupted (SIGINT), 141 not
begun because nobody reads its output any more, 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mu.config import (
    Config,
    ConfigError,
    Entry,
    as_text,
    assemble,
    dump,
    file_entries,
    find_config,
    keys_of,
    nearest,
    packaged_configs,
    upon,
)
from mu.config_file import Text, read_list
from mu.config_names import hint, meant
from mu.config_values import Key
from mu.errors import MuError, Terminated
from mu.memory import telling
from mu.ranks import leave, started_local_rank, started_rank, started_world_size
from mu.verbosity import LEVELS, console_level, is_quiet, verbosity

C = TypeVar("C", bound=Config)
_log = logging.getLogger(__name__)
_WIDTH = 110
_COMMON = {"log_level": LEVELS, "quiet": ("true", "false")}
"""Flags of every command that are no keys of its config -> what they take."""
_DRY_RUN = {"dry_run": ("true", "false")}
"""The flag of commands that have a plan."""
_DRY_RUN_HELP = (
    "--dry_run",
    "    Make and write nothing: print what would be written, with sizes, and all that stands in its way.",
)
_ALONE = ("quiet", *_DRY_RUN)
"""Flags that mean true without a value."""


class Planned(Protocol):
    """What a command would do; its text is printed."""

    @property
    def exit_code(self) -> int: ...


class OutputClosed(Exception):
    """Who read the output has gone, as in `--help | head`."""


class HelpAsked(Exception):
    """`--help` stood among the arguments."""


def parse_cli(
    cls: type[C],
    argv: Sequence[str],
    *,
    packaged: Path | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
    notes: list[str] | None = None,
) -> C:
    """A checked config from arguments: defaults < the file of `--config_path` < flags, see `upon`; paths must be there.

    Args:
        more: flags of this command that are no keys of its config -> what they take.
        notes: what is to be said of keys without effect is added to it; None: it is logged.

    Raises ConfigError with all mistakes together, HelpAsked for `--help` or `-h`.
    """
    if "--help" in argv or "-h" in argv:
        raise HelpAsked
    mistakes: list[str] = []
    unsure: set[str] = set()
    flags = _flags(cls, argv, mistakes, more or {}, unsure)
    config_path = flags.pop("config_path", None)
    quiet = flags.get("quiet") == "true"
    for name, allowed in {**_COMMON, **(more or {})}.items():
        if (text := flags.pop(name, allowed[0])) not in allowed:
            mistakes.append(
                f"{name}: {text!r} is not one of: {', '.join(allowed)}.{nearest(text, allowed)} (--{name})"
            )
    read: list[Entry] | None = []
    if config_path is not None:
        read = file_entries(config_path, packaged=packaged, mistakes=mistakes)
        if read and not os.path.exists(os.path.expanduser(config_path)) and not quiet:
            say(f"config_path: {config_path} is not on disk; using {find_config(config_path, packaged)}")
    keys = {key.name: key for key in keys_of(cls)}
    given: list[Entry] = []
    for name, text in flags.items():
        try:
            given.append((name, _flag_value(keys[name], text) if name in keys else text, f"--{name}"))
        except ValueError as error:
            mistakes.append(f"{name}: {error} (--{name})")
    entries = upon(cls, read or (), given)
    return assemble(
        cls,
        entries,
        mistakes=mistakes,
        on_disk=True,
        whole=read is not None,
        unsure=unsure,
        notes=notes,
    )


def run_door(
    cls: type[C],
    run: Callable[[C], object],
    *,
    module: str,
    summary: str,
    packaged: Path | None = None,
    argv: Sequence[str] | None = None,
    first_words: Sequence[str] = (),
    shares_work: bool = False,
    plan: Callable[[C], Planned] | None = None,
) -> int:
    """A whole command: settings, their print, the run, its result; returns the exit code.

    Under torchrun and srun all processes come here, and rank 0 speaks for them. An error that another one alone has met
    is printed there; a mistake in the settings once on each machine, as their files may differ.

    Args:
        run: does the work and returns what is printed at the end, a mapping of names to paths and numbers. It
            imports what is heavy itself, so that mistakes and help come without the wait.
        module: name after `python -m`.
        first_words: keys whose values may come first without their names, in this order.
        shares_work: `run` works in as many processes as are started together; otherwise they are refused.
        plan: what `--dry_run` prints in the place of a run, and then ends with the exit code that the run would.
    """
    more = _DRY_RUN if plan is not None else {}
    arguments = _named(sys.argv[1:] if argv is None else argv, first_words)
    config: C | None = None
    notes: list[str] = []
    try:
        config = parse_cli(cls, arguments, packaged=packaged, more=more, notes=notes)
        if not shares_work:
            _check_alone(module)
        with _asked_verbosity(cls, arguments, more), terminable(), telling("in this run"):
            if not is_quiet() and console_level() <= logging.WARNING:
                for note in notes:
                    _log.warning("%s", note)
            if plan is not None and _flags(cls, arguments, [], more).get("dry_run") == "true":
                planned = plan(config)
                say(str(planned))
                return planned.exit_code
            if not is_quiet():
                say(f"# {module.rpartition('.')[2]}: defaults < config file < flags\n{dump(config)}")
            result = run(config)
        leave()
    except HelpAsked:
        with contextlib.suppress(OutputClosed):
            say(help_text(cls, module=module, summary=summary, packaged=packaged, has_plan=plan is not None))
        return 0
    except OutputClosed:
        return 141
    except ConfigError as error:
        if started_local_rank() == 0 if config is None else _is_to_print(error):
            print(error, file=sys.stderr)
        return 2
    except MuError as error:
        if _is_to_print(error):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full: {error.filename or error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stopped:
        word, code = ("terminated", 143) if isinstance(stopped, Terminated) else ("interrupted", 130)
        if started_rank() == 0:
            print(word, file=sys.stderr)
        return code
    if isinstance(result, Mapping):
        with contextlib.suppress(OutputClosed):
            say("\n".join(_result_lines(result)))
    return 0


def _named(argv: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Arguments with the names of `keys` before their first words, as far as these are no flags."""
    words, named = list(argv), []
    for key in keys:
        if words and not words[0].startswith("-"):
            named += [f"--{key}", words.pop(0)]
    return [*named, *words]


@contextlib.contextmanager
def _asked_verbosity(
    cls: type[Config], argv: Sequence[str], more: Mapping[str, Sequence[str]]
) -> Iterator[None]:
    """What `--log_level` and `--quiet` among checked arguments ask for; at debug, errors show where they came from."""
    flags = _flags(cls, argv, [], more)
    with verbosity(flags.get("log_level", "info"), quiet=flags.get("quiet") == "true"):
        try:
            yield
        except MuError as error:
            if flags.get("log_level") == "debug" and _is_to_print(error):
                traceback.print_exc()
            raise


def _check_alone(module: str) -> None:
    if (count := started_world_size()) > 1:
        error = ConfigError(
            [f"{module} is one process and was started as {count}: leave out torchrun or srun"]
        )
        error.in_all_processes = True
        raise error


def _is_to_print(error: MuError) -> bool:
    """Whether no other process of the run prints it."""
    return started_rank() == 0 or not error.in_all_processes


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is raised as Terminated while the block lasts, so that files that are half written are removed."""

    def terminate(*_: object) -> None:
        raise Terminated

    # Only the main thread may set handlers; one that a caller has set is his to keep.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say(text: str) -> None:
    """Print a text; of the processes of a run, the first one does.

    Raises OutputClosed, once and quietly, when nobody reads it any more.
    """
    if started_rank() > 0:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputClosed from None


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own, whose `--help` ends quietly when nobody reads it any more."""

    def print_help(self, file: Any = None) -> None:
        if file is not None:
            super().print_help(file)
            return
        with contextlib.suppress(OutputClosed):
            say(self.format_help().removesuffix("\n"))


def help_text(
    cls: type[Config], *, module: str, summary: str, packaged: Path | None = None, has_plan: bool = False
) -> str:
    """What `--help` prints: every key with its type, range or choices, default and help."""
    lines = [
        f"python -m {module} [--config_path X.yaml] [--key value ...]",
        "",
        *_wrapped(summary, ""),
        "",
        "Values: defaults < config file < flags. Lists: a,b or '[a, b]'. `--key null` for no value.",
        "",
        "--config_path  a path or null",
        *_wrapped(
            "YAML file of `key: value` lines. A name that is not on disk is looked up among the packaged:",
            "    ",
        ),
        *(f"      {name}" for name in (packaged_configs(packaged) if packaged is not None else [])),
        f"--log_level  one of: {', '.join(LEVELS)}; default: info",
        "    Log lines on the console from this level on; debug also gives errors their traceback. log.txt has all.",
        "--quiet",
        "    No settings, no progress bars, of the log only warnings: errors and the result.",
        *(_DRY_RUN_HELP if has_plan else ()),
        "--help",
    ]
    for key in keys_of(cls):
        limits = f", {key.rule.limits}" if key.rule.limits else ""
        lines.append(f"--{key.name}  {key.type_words}{limits}; default: {key.default_text or repr('')}")
        if key.rule.choices is not None:
            lines += _wrapped(f"one of: {', '.join(key.rule.choices)}", "    ")
        lines += _wrapped(key.rule.help, "    ")
    if cls.without_effect:
        lines += _wrapped(
            f"Taken without effect, because existing files have them: {', '.join(cls.without_effect)}.", ""
        )
    if any("docs/" in line for line in lines):
        lines.append("docs/ is a folder of the source repository.")
    return "\n".join(lines)


def command_line(module: str, cls: type[Config], values: Mapping[str, object]) -> str:
    """The command that runs `module` with `values`, of which `cls`' defaults and other classes' keys are left out."""
    words = ["python", "-m", module]
    for key in keys_of(cls):
        if key.name in values and values[key.name] != key.default:
            words += [f"--{key.name}", as_text(values[key.name], split=key.rule.split)]
    return shlex.join(words)


def _flags(
    cls: type[Config],
    argv: Sequence[str],
    mistakes: list[str],
    more: Mapping[str, Sequence[str]],
    unsure: set[str] | None = None,
) -> dict[str, str]:
    """Flag -> its text, from `--key value` and `--key=value`; into `unsure`, keys that an unknown one may stand for."""
    keys = [key.name for key in keys_of(cls)]
    known = ["config_path", "help", *_COMMON, *more, *keys, *cls.without_effect]
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            mistakes.append(f"{word!r} belongs to no flag; write --key value, lists as a,b")
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        has_value = bool(equals) or (bool(words) and not words[0].startswith("--"))
        if not equals and has_value:
            text = words.pop(0)
        elif name in _ALONE and not equals:
            text, has_value = "true", True
        if name not in known:
            mistakes.append(f"--{name}: there is no such flag.{hint(name, known)}")
            if unsure is not None and (key := meant(name, known)) is not None:
                unsure.add(key)
        elif not has_value:
            mistakes.append(f"--{name}: a value is missing; write --{name} value")
        elif name in flags:
            mistakes.append(f"--{name}: given twice")
        else:
            flags[name] = text
    return flags


def _flag_value(key: Key, text: str) -> Text | list[Text]:
    if key.listed and text.lstrip().startswith("["):
        return read_list(text)
    # The shell has taken the quotes off: only `null` means null, the empty text is itself.
    return Text(text, quoted=text != "null")


def _result_lines(result: Mapping[object, object], indent: str = "") -> Iterable[str]:
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _result_lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value:.6g}" if isinstance(value, float) else f"{indent}{name}: {value}"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
