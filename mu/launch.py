"""Run a function in several processes of this machine, one for each device, and give back what it returned.

Each is `python -m mu.launched`, with the environment that torchrun would give it; the function finds its group through
`mu.ranks`. They are sessions of their own: Ctrl-C and SIGTERM come here, and are handed on once to each of them.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mu.arithmetic import run_arithmetic
from mu.devices import check_devices, device_names
from mu.errors import MuError, Terminated
from mu.ranks import RankError, is_grouped, joined
from mu.verbosity import console_level, is_quiet

C = TypeVar("C")
T = TypeVar("T")
_GRACE_SECONDS = 30.0
"""How long the others may go on when one has failed, to end by themselves."""


@dataclass(frozen=True)
class Task:
    """What a process is to do. `level` and `quiet` are those of `mu.verbosity`."""

    run: Callable[[Any], object]
    config: Any
    devices: tuple[str, ...]
    level: int
    quiet: bool


@dataclass(frozen=True)
class Outcome:
    """How it ended: with a value, an error of this package, a signal's number, or (text) another error's traceback."""

    value: object = None
    error: MuError | None = None
    stopped_by: int | None = None
    crash: str | None = None
    trace: str = ""
    """Of the error, for the log level debug."""


def on_ranks(run: Callable[[C], T], config: C, devices: str) -> T:
    """`run(config)`, in as many processes as `devices` names; all of them get the value of the main one.

    In a process that torchrun or SLURM started together with others, it runs here, as one of them. All of it runs in
    the arithmetic of `mu.arithmetic.run_arithmetic`; with deterministic kernels where the config's `deterministic` is
    true.

    Args:
        run: a function of a module. Its value and the config go from process to process, and have to pickle.
        devices: the key: one device, or several with commas.

    Raises:
        MuError: what `run` raised in one of the processes.
        DeviceError: one of the devices is not there.
        DeterminismError: `deterministic` comes too late in this process.
        RankError: a process ended without a word; names it, and the signal or the traceback.
        KeyboardInterrupt, Terminated: SIGINT or SIGTERM, after all processes have ended.
    """
    names = device_names(devices)
    if len(names) == 1 or is_grouped():
        with run_arithmetic(deterministic=is_deterministic(config)), joined(names):
            return run(config)
    check_devices(devices)
    task = Task(run, config, names, console_level(), is_quiet())
    with tempfile.TemporaryDirectory(prefix="unlearn_diff-") as folder:
        write_pickle(Path(folder) / "task", task)
        with _started(Path(folder), len(names)) as (processes, signals):
            stuck = _wait(processes)
        outcomes = [
            _outcome(Path(folder), process, number, signals)
            for number, process in enumerate(processes)
            if process not in stuck
        ]
    return _value(outcomes)


def is_deterministic(config: object) -> bool:
    """What a config's key `deterministic` says; False for one that has no such key."""
    return bool(getattr(config, "deterministic", False))


def write_pickle(path: Path, value: object) -> None:
    """For the other side of a private folder; whole when it is there."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(pickle.dumps(value))
    beside.rename(path)


@contextmanager
def _started(folder: Path, count: int) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[int]]]:
    """The processes, and the signals that have come; they are handed on while the block lasts. None outlives it."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_RUN_ID": secrets.token_hex(8),
    }
    processes: list[subprocess.Popen[bytes]] = []
    with _handing_on(processes, folder) as signals:
        try:
            for number in range(count):
                own = {"RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0"}
                command = [sys.executable, "-m", "mu.launched", str(folder)]
                processes.append(
                    subprocess.Popen(
                        command, env=environ | own, stdin=subprocess.DEVNULL, start_new_session=True
                    )
                )
            yield processes, signals
        finally:
            for process in processes:
                process.kill()
                process.wait()


@contextmanager
def _handing_on(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to the processes while the block lasts; Python lets only the main thread take them.

    A process that has not said that it is ready for them has done nothing yet, and is killed. Yields those that came.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def hand_on(number: int, _: object) -> None:
        signals.append(number)
        for place, process in enumerate(processes):
            process.send_signal(number if (folder / f"ready-{place}").exists() else signal.SIGKILL)

    handled = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in handled}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    """Until all have ended. When one has failed, the others are given time; returned are those that wait even then."""
    failed_at: float | None = None
    while running := [process for process in processes if process.poll() is None]:
        if failed_at is None and any(process.returncode for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
            return running
        time.sleep(0.05)
    return []


def _outcome(
    folder: Path, process: subprocess.Popen[bytes], place: int, signals: Sequence[int]
) -> tuple[float, Outcome]:
    """When and how a process ended."""
    path = folder / f"outcome-{place}"
    if path.exists():
        outcome: Outcome = pickle.loads(path.read_bytes())
        return path.stat().st_mtime, outcome
    if signals:
        return 0.0, Outcome(stopped_by=signals[0])
    code = process.returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    # Before those that it left alone.
    return 0.0, Outcome(crash=f"process {place} of the run was ended {how}")


def _value(outcomes: Sequence[tuple[float, Outcome]]) -> Any:
    for _, outcome in outcomes:
        if outcome.error is not None:
            if console_level() <= logging.DEBUG:
                print(outcome.trace, file=sys.stderr)
            raise outcome.error
    for _, outcome in outcomes:
        if outcome.stopped_by is not None:
            raise KeyboardInterrupt if outcome.stopped_by == signal.SIGINT else Terminated
    crashes = sorted((when, outcome.crash) for when, outcome in outcomes if outcome.crash is not None)
    if crashes:  # the first one; to the others its connection broke
        raise RankError(crashes[0][1])
    return outcomes[0][1].value


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
