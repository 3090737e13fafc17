"""Several commands at one table: each takes the next concept that no other one is at."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mu.errors import MuError


class ClaimError(MuError):
    """A folder cannot be claimed."""


@contextmanager
def claimed(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the folder for itself, for as long as the block lasts.

    The lock is the operating system's, on `<folder>/.lock`: it goes with its process, also when that is killed.

    Args:
        wait: until another process has let go of it; else False is yielded.

    Raises:
        ClaimError: the file cannot be made, or this file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - closed below, which also lets go of the lock
    except OSError as error:
        raise ClaimError(
            f"{folder}: cannot be written ({error.strerror}); choose another output_dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise ClaimError(
                f"{folder}: cannot be locked ({error.strerror}); choose another output_dir"
            ) from error
        yield True
