"""Several processes, or several commands, at one table: each takes the next concept that no other one is at."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from mu.errors import MuError

_log = logging.getLogger(__name__)


class WorkerError(MuError):
    """A process of the table failed, or has ended."""


@contextmanager
def claimed(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the folder for itself, for as long as the block lasts.

    The lock is the operating system's, on `<folder>/.lock`: it goes with its process, also when that is killed.

    Args:
        wait: until another process has let go of it; else False is yielded.

    Raises:
        WorkerError: the file cannot be made, or this file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - closed below, which also lets go of the lock
    except OSError as error:
        raise WorkerError(
            f"{folder}: cannot be written ({error.strerror}); choose another output_dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise WorkerError(
                f"{folder}: cannot be locked ({error.strerror}); choose another output_dir"
            ) from error
        yield True


@contextmanager
def at_work(
    make: Callable[[str], None],
    names: Sequence[str],
    *,
    start: Callable[[str], None],
    devices: Sequence[str],
    workers: int,
) -> Iterator[Callable[[str], None]]:
    """Yields a function that waits until a worker has been at that name, and raises what went wrong there.

    Args:
        make: what is done for a name, in one of the workers; of a module, and so is `start`.
        start: is called once in each worker, with its device.
        devices: are given to the workers in turn.

    Raises:
        WorkerError: from the function; the other workers end with what they are at.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads or CUDA would hang
    queue: Queue[str] = context.Queue()
    for number in range(workers):
        queue.put(devices[number % len(devices)])
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(start, queue, threads)
    )
    try:
        futures = {name: pool.submit(_guarded, make, name) for name in names}

        def wait_for(name: str) -> None:
            try:
                futures[name].result()
            except BrokenProcessPool as error:
                raise WorkerError(
                    "a worker ended in the middle: it could not start, was killed, or memory was short. What is made "
                    "stays; the same command goes on with it"
                ) from error

        yield wait_for
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[[str], None], devices: Queue[str], threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    start(devices.get())


def _end_with_parent() -> None:
    """A worker whose command was killed would else wait for more work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _guarded(make: Callable[[str], None], name: str) -> None:
    try:
        make(name)
    except MuError as error:  # as text: not every error survives the way between processes
        raise WorkerError(f"{name}: {error}") from None
