"""What every command does with its console: print, where somebody reads it, and stop cleanly when it is asked to."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mu.errors import Terminated
from mu.ranks import started_rank

UCE_EXAMPLE = ("mu.algorithms.uce.scripts.train", "--config_path emoji_canvas/uce_style.yaml")
"""(module, arguments) of a run that takes seconds and needs nothing: what other commands' examples begin with."""
_names: Mapping[str, str] = {}


@contextlib.contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """While it lasts, commands are called as here: module of a door -> what a user types for it."""
    global _names
    before, _names = _names, names
    try:
        yield
    finally:
        _names = before


def called(module: str) -> str:
    """What a user types for the command of a module: `unlearn_diff mask`, or `python -m ...`, as for this one."""
    return _names.get(module, f"python -m {module}")


def opening(examples: Sequence[tuple[str, str]]) -> str:
    """The first lines of a command's help: what can be typed as it stands. (module, arguments) for each line."""
    return "\n".join(
        f"{'Try:   ' if number == 0 else '       '}{called(module)} {arguments}".rstrip()
        for number, (module, arguments) in enumerate(examples)
    )


@dataclass(frozen=True)
class Answer:
    """What a command says at its end.

    Attributes:
        sentences: what was done.
        made: what -> its path, the most important first; None is left out. `--quiet` prints these paths alone, one a
            line as they are; in words they are quoted where a shell needs it, to be copied.
        following: (what for, command) of what may be typed next.
    """

    sentences: Sequence[str]
    made: Mapping[str, object]
    following: Sequence[tuple[str, str]] = ()

    @property
    def paths(self) -> list[str]:
        return [str(path) for path in self.made.values() if path is not None]

    def __str__(self) -> str:
        there = {what: quoted(path) for what, path in self.made.items() if path is not None}
        width = max(map(len, there), default=0)
        lines = [*self.sentences, *(f"  {what:<{width}}  {path}" for what, path in there.items())]
        for what, command in self.following:
            lines += [f"{what}:", f"  {command}"]
        return "\n".join(lines)


def as_json(value: object) -> str:
    """A result as JSON text; paths, and other keys than texts, as text. NaN and Inf, which JSON has not, as null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def quoted(path: object) -> str:
    """A path as it can be copied into a command."""
    return shlex.quote(str(path))


def duration(seconds: float) -> str:
    """`1.2 s`, `12 s`, `2 min 3 s`, `3 min`, `1 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    large, small = (
        (f"{minutes} min", f"{rest} s") if minutes < 60 else (f"{minutes // 60} h", f"{minutes % 60} min")
    )
    return large if small.startswith("0 ") else f"{large} {small}"


class OutputClosed(Exception):
    """Who read the output has gone, as in `--help | head`."""


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


def check_heard() -> None:
    """Raises OutputClosed where stdout is a pipe that nobody reads any more: no work is begun for nobody."""
    if started_rank() > 0 or sys.stdout is None:
        return
    try:
        stdout = sys.stdout.fileno()
    except io.UnsupportedOperation:  # something else in its place, as in a notebook
        return
    looked = select.poll()
    looked.register(stdout, 0)
    if any(event & select.POLLERR for _, event in looked.poll(0)):
        raise OutputClosed


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


@contextlib.contextmanager
def stops_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block has ended; a second one does not.

    For imports: what a signal raises within one comes out as another error, such as "could not import module".
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def restore() -> None:
        for signum, handler in handlers.items():
            if callable(handler):
                signal.signal(signum, handler)

    def note(signum: int, _: object) -> None:
        came.append(signum)
        restore()

    for signum, handler in handlers.items():
        if callable(handler):
            signal.signal(signum, note)
    try:
        yield
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own, whose `--help` opens with an example, and ends quietly when nobody reads it any more.

    Args:
        example: arguments with which the command can be called as it stands.
    """

    def __init__(self, *args: Any, example: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.example = example

    def format_help(self) -> str:
        return f"Try:   {self.prog} {self.example}".rstrip() + "\n\n" + super().format_help()

    def print_help(self, file: Any = None) -> None:
        if file is not None:
            super().print_help(file)
            return
        with contextlib.suppress(OutputClosed):
            say(self.format_help().removesuffix("\n"))
