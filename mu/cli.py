"""Command lines from config classes: `--config_path X.yaml --key value ...`, `--help`, exit codes.

Exit codes: 0 done, 1 a run that failed with a message, 2 a mistake in the settings, 130 interrupted (SIGINT), 141 not
begun because nobody reads its output any more, 143 terminated (SIGTERM).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    keys_of,
    nearest,
)
from mu.config_file import ConfigFileError, Text, find_config, packaged_configs, read_list
from mu.config_keys import Key
from mu.config_names import hint, meant
from mu.console import Answer, OutputClosed, as_json, called, check_heard, opening, say, terminable
from mu.errors import MuError, Terminated
from mu.memory import telling
from mu.ranks import leave, started_local_rank, started_rank, started_world_size
from mu.verbosity import LEVELS, bars_off, console_level, is_quiet, verbosity

C = TypeVar("C", bound=Config)
_log = logging.getLogger(__name__)
_WIDTH = 110
_TRUE_OR_FALSE = ("true", "false")
_OPTIONS = {"log_level": LEVELS, "quiet": _TRUE_OR_FALSE, "json": _TRUE_OR_FALSE, "dry_run": _TRUE_OR_FALSE}
"""Flags that are no keys of a config -> what they take. `dry_run` is one of commands that have a plan."""
_ALONE = ("quiet", "json", "dry_run")
"""Flags that mean true without a value."""


class Planned(Protocol):
    """What a command would do; its text is printed, or what `as_json` gives."""

    @property
    def exit_code(self) -> int: ...

    def as_json(self) -> object: ...


class HelpAsked(Exception):
    """`--help` stood among the arguments."""


# ---- a whole command


def run_door(
    cls: type[C],
    run: Callable[[C], object],
    *,
    module: str,
    summary: str,
    examples: Sequence[tuple[str, str]] = (),
    argv: Sequence[str] | None = None,
    first_words: Mapping[str, str] = {},
    shares_work: bool = False,
    plan: Callable[[C], Planned] | None = None,
    answer: Callable[[C, Any, str | None], Answer] | None = None,
) -> int:
    """A whole command: settings, the run, its result; returns the exit code.

    The settings are printed at `--log_level debug` alone: a run's folder has them in its config.yaml.

    Under torchrun and srun all processes come here, and rank 0 speaks for them. An error that another one alone has met
    is printed there; a mistake in the settings once on each machine, as their files may differ.

    Args:
        run: does the work and returns its result, a mapping of names to paths and numbers: what `--json` prints. It
            imports what is heavy itself, so that mistakes and help come without the wait.
        module: name after `python -m`.
        examples: (module, arguments) of what can be typed as it stands, this command last: `--help` opens with it.
        first_words: keys whose values may come first without their names, in this order -> how `--help` calls them.
        shares_work: `run` works in as many processes as are started together; otherwise they are refused.
        plan: what `--dry_run` prints in the place of a run, and then ends with the exit code that the run would.
        answer: what is said at the end: of the settings, the result, and the settings file that was given, None
            without one. Left out, the result is printed, name by name.
    """
    words = _named(sys.argv[1:] if argv is None else argv, first_words)
    config: C | None = None
    try:
        # 1. Settings
        asked = _read_arguments(cls, words, has_plan=plan is not None)
        notes: list[str] = []
        config = _config(cls, asked, notes=notes)
        if not shares_work:
            _check_alone(module)
        with asked.verbosity(), terminable(), telling("in this run"):
            if not is_quiet() and console_level() <= logging.WARNING:
                for note in notes:
                    _log.warning("%s", note)
            # 2. The plan, or the run
            if plan is not None and asked.dry_run:
                with asked.stdout_kept():
                    planned = plan(config)
                say(as_json(planned.as_json()) if asked.json else str(planned))
                return planned.exit_code
            if not bars_off():
                check_heard()
                if console_level() <= logging.DEBUG:
                    say(f"# settings of {called(module)}: defaults < config file < flags\n{dump(config)}")
            with asked.stdout_kept():
                result = run(config)
        leave()
    except HelpAsked:
        with contextlib.suppress(OutputClosed):
            usage, has_plan = list(first_words.values()), plan is not None
            say(
                help_text(
                    cls,
                    module=module,
                    summary=summary,
                    examples=examples,
                    first_words=usage,
                    has_plan=has_plan,
                )
            )
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
    # 3. The result
    if isinstance(result, Mapping):
        with contextlib.suppress(OutputClosed):
            if asked.json:
                say(as_json(result))
            elif answer is None:
                say("\n".join(_result_lines(result)))
            else:
                said = answer(config, result, asked.config_path)
                say("\n".join(said.paths) if asked.quiet else f"\n{said}")
    return 0


def recipe_beside(config_path: str | None, command: str) -> str | None:
    """The settings file of another command beside one: `x/train_style.yaml` of `x/mask_style.yaml`; None without."""
    if config_path is None:
        return None
    name = Path(config_path).name.partition("_")[2]
    beside = Path(config_path).with_name(f"{command}_{name}").as_posix()
    try:
        find_config(beside)
    except ConfigFileError:
        return None
    return beside


def _named(argv: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Arguments with the names of `keys` before their first words, as far as these are no flags."""
    words, named = list(argv), []
    for key in keys:
        if words and not words[0].startswith("-"):
            named += [f"--{key}", words.pop(0)]
    return [*named, *words]


def _check_alone(module: str) -> None:
    if (count := started_world_size()) > 1:
        error = ConfigError(
            [f"{called(module)} is one process and was started as {count}: leave out torchrun or srun"]
        )
        error.in_all_processes = True
        raise error


def _is_to_print(error: MuError) -> bool:
    """Whether no other process of the run prints it."""
    return started_rank() == 0 or not error.in_all_processes


def _result_lines(result: Mapping[object, object], indent: str = "") -> Iterable[str]:
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _result_lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value:.6g}" if isinstance(value, float) else f"{indent}{name}: {value}"


# ---- arguments


@dataclass
class _Arguments:
    """What a command line says, and what is wrong with it."""

    flags: dict[str, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)
    """Keys for which an unknown flag may stand."""
    config_path: str | None = None
    log_level: str = "info"
    quiet: bool = False
    json: bool = False
    dry_run: bool = False

    def stdout_kept(self) -> contextlib.AbstractContextManager[object]:
        """While it lasts, with `--json`, what others print goes to stderr."""
        return contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext()

    @contextlib.contextmanager
    def verbosity(self) -> Iterator[None]:
        """What `--log_level`, `--quiet` and `--json` ask for; at debug, errors show where they came from."""
        with verbosity(self.log_level, quiet=self.quiet, json=self.json):
            try:
                yield
            except MuError as error:
                if self.log_level == "debug" and _is_to_print(error):
                    traceback.print_exc()
                raise


def _config(cls: type[C], asked: _Arguments, notes: list[str] | None = None) -> C:
    """A checked config from arguments: defaults < the file of `--config_path` < flags; paths must be there.

    For `notes` see `assemble`. Raises ConfigError with all mistakes together, those of the arguments too.
    """
    read: list[Entry] | None = []
    mistakes = list(asked.mistakes)
    if asked.config_path is not None:
        read = file_entries(asked.config_path, mistakes)
        if (
            read
            and not os.path.exists(os.path.expanduser(asked.config_path))
            and not (asked.quiet or asked.json)
        ):
            say(f"config_path: {asked.config_path} is not on disk; using {find_config(asked.config_path)}")
    keys = {key.name: key for key in keys_of(cls)}
    given: list[Entry] = []
    for name, text in asked.flags.items():
        try:
            given.append((name, _flag_value(keys[name], text) if name in keys else text, f"--{name}"))
        except ValueError as error:
            mistakes.append(f"{name}: {error} (--{name})")
    return assemble(cls, read, given, mistakes=mistakes, on_disk=True, unsure=asked.unsure, notes=notes)


def _read_arguments(cls: type[Config], argv: Sequence[str], *, has_plan: bool = False) -> _Arguments:
    """Reads `--key value` and `--key=value`. Raises HelpAsked."""
    if "--help" in argv or "-h" in argv:
        raise HelpAsked
    options = {name: allowed for name, allowed in _OPTIONS.items() if name != "dry_run" or has_plan}
    known = ["config_path", "help", *options, *(key.name for key in keys_of(cls)), *cls.without_effect]
    asked = _Arguments()
    flags, words = asked.flags, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            asked.mistakes.append(f"{word!r} belongs to no flag; write --key value, lists as a,b")
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        has_value = bool(equals) or (bool(words) and not words[0].startswith("--"))
        if not equals and has_value:
            text = words.pop(0)
        elif name in _ALONE and not equals:
            text, has_value = "true", True
        if name not in known:
            other = cls.of_another(name)
            asked.mistakes.append(f"--{name}: there is no such flag.{hint(name, known, of_another=other)}")
            asked.unsure |= {key for key in [meant(name, known, of_another=other)] if key is not None}
        elif not has_value:
            asked.mistakes.append(f"--{name}: a value is missing; write --{name} value")
        elif name in flags:
            asked.mistakes.append(f"--{name}: given twice")
        else:
            flags[name] = text
    asked.config_path = flags.pop("config_path", None)
    for name, allowed in options.items():
        if (text := flags.get(name, allowed[0])) not in allowed:
            listed = ", ".join(allowed)
            asked.mistakes.append(
                f"{name}: {text!r} is not one of: {listed}.{nearest(text, allowed)} (--{name})"
            )
    asked.log_level = flags.pop("log_level", "info")
    asked.quiet = flags.pop("quiet", "false") == "true"
    asked.json = flags.pop("json", "false") == "true"
    asked.dry_run = has_plan and flags.pop("dry_run", "false") == "true"
    return asked


def _flag_value(key: Key, text: str) -> Text | list[Text]:
    if key.listed and text.lstrip().startswith("["):
        return read_list(text)
    # The shell has taken the quotes off: only `null` means null, the empty text is itself.
    return Text(text, quoted=text != "null")


def command_line(module: str, cls: type[Config], values: Mapping[str, object]) -> str:
    """The command that runs `module` with `values`, of which `cls`' defaults and other classes' keys are left out."""
    words = []
    for key in keys_of(cls):
        if key.name in values and values[key.name] != key.default:
            words += [f"--{key.name}", as_text(values[key.name], split=key.rule.split)]
    return f"{called(module)} {shlex.join(words)}".rstrip()


# ---- help


def help_text(
    cls: type[Config],
    *,
    module: str,
    summary: str,
    examples: Sequence[tuple[str, str]] = (),
    first_words: Sequence[str] = (),
    has_plan: bool = False,
) -> str:
    """What `--help` prints: what can be typed, then every key with its type, range or choices, default and help."""
    packaged = _configs_of(module)
    looked_up = " A name that is not on disk is looked up among the packaged:"
    lines = [
        *([opening(examples)] if examples else []),
        f"Usage: {' '.join([called(module), *first_words])} [--config_path X.yaml] [--key value ...]",
        "",
        *_wrapped(summary, ""),
        "",
        "Values: defaults < config file < flags. Lists: a,b or '[a, b]'. `--key null` for no value.",
        "",
        "--config_path  a path or null",
        *_wrapped(f"YAML file of `key: value` lines.{looked_up if packaged else ''}"),
        *(f"      {name}" for name in packaged),
        f"--log_level  one of: {', '.join(LEVELS)}; default: info",
        *_wrapped(
            "Log lines on the console from this level on; debug also prints all settings, and gives errors their "
            "traceback. log.txt has all lines."
        ),
        "--quiet",
        *_wrapped(
            "No progress bars, of the log only warnings and errors; at the end, the paths of what was made alone, "
            "one a line."
        ),
        "--json",
        *_wrapped("On stdout nothing but the result, with all its numbers, as one JSON object."),
    ]
    if has_plan:
        lines.append("--dry_run")
        lines += _wrapped(
            "Make and write nothing: print what would be written, with sizes, and all that stands in its way."
        )
    lines.append("--help")
    for key in keys_of(cls):
        limits = f", {key.rule.limits}" if key.rule.limits else ""
        lines.append(f"--{key.name}  {key.type_words}{limits}; default: {key.default_text or repr('')}")
        if key.rule.choices is not None:
            lines += _wrapped(f"one of: {', '.join(key.rule.choices)}")
        lines += _wrapped(key.rule.help)
    if cls.without_effect:
        lines += _wrapped(
            f"Taken without effect, because existing files have them: {', '.join(cls.without_effect)}.", ""
        )
    if any("docs/" in line for line in lines):
        lines.append("docs/ is a folder of the source repository.")
    return "\n".join(lines)


def _configs_of(module: str) -> list[str]:
    """The packaged files that open with the command of this module."""
    found = []
    for name, path in packaged_configs().items():
        with open(path, encoding="utf-8") as file:
            if f"-m {module} " in file.readline():
                found.append(name)
    return found


def _wrapped(text: str, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
