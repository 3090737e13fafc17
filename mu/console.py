"""What every command does with its console: print, where somebody reads it, and stop cleanly when it is asked to."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from mu.errors import Terminated
from mu.ranks import started_rank


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


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own, whose `--help` ends quietly when nobody reads it any more."""

    def print_help(self, file: Any = None) -> None:
        if file is not None:
            super().print_help(file)
            return
        with contextlib.suppress(OutputClosed):
            say(self.format_help().removesuffix("\n"))
