"""The root of this package's own errors. Imports nothing, so that every module may use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MuError(Exception):
    """Something the user can put right: the message says what is wrong and what to do.

    The command line prints such an error as one line, without a traceback. Modules derive their own errors
    from it, beside the built-in class that fits (`class CheckpointError(MuError, ValueError)`).
    """

    exit_code = 1
    """Of a command that ends with it; 2 for a mistake in the settings, and where nothing has begun."""
    in_all_processes = False
    """Whether every process of the run has raised it (see `mu.ranks`), so that one of them is enough to print it."""


@contextmanager
def nothing_begun() -> Iterator[None]:
    """What comes before a run writes anything: an error's `exit_code` is 2, as of a mistake in the settings."""
    try:
        yield
    except MuError as error:
        error.exit_code = 2
        raise


class Terminated(BaseException):
    """The process was asked to end, by SIGTERM. As KeyboardInterrupt, it is no error, and no Exception."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
