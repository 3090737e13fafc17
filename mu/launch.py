"""Run a function in several processes of this machine, one for each device, and give back what it returned.

Each is a Python of its own, with the environment that torchrun would give it; Lightning Fabric makes them a group
(`mu.ranks`). Fabric's own launchers run the caller's script again or are refused in a notebook, hang with a result
that a pipe does not hold, and hand no signal on: see docs/developing.md, "Why it is as it is".
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
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mu.arithmetic import run_arithmetic
from mu.console import terminable
from mu.devices import check_devices, device_names
from mu.errors import MuError, Terminated
from mu.memory import telling
from mu.ranks import RankError, is_grouped, joined, leave, sendable, started_rank
from mu.verbosity import console_level, is_json, is_quiet, verbosity

C = TypeVar("C")
T = TypeVar("T")
_GRACE_SECONDS = 30.0
"""How long the others may go on when one has failed, to end by themselves."""
_ERROR, _STOP, _CRASH = range(3)
"""Why a process failed, from what tells the user most: an error of this package, a signal, anything else."""


@dataclass(frozen=True)
class _Task:
    """What each process is to do, and how loudly (see `mu.verbosity`)."""

    run: Callable[[Any], object]
    config: Any
    devices: tuple[str, ...]
    log_level: str
    quiet: bool
    json: bool


@dataclass(frozen=True)
class _End:
    """How a process ended: with a value, or with an error; `trace` is its traceback, `at` seconds since the epoch."""

    value: object = None
    error: BaseException | None = None
    kind: int = _ERROR
    trace: str = ""
    at: float = 0.0


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
        return _as_one(run, config, names)
    check_devices(devices)
    level = logging.getLevelName(console_level()).lower()
    with tempfile.TemporaryDirectory(prefix="unlearn_diff-") as name:
        folder = Path(name)
        _write(folder / "task", _Task(run, config, names, level, is_quiet(), is_json()))
        with _taking_signals() as signals, _started(folder, len(names)) as processes:
            codes = _wait(processes, signals, folder)
        ends = [_end(folder, place, code, signals) for place, code in enumerate(codes) if code is not None]
    failed = [end for end in ends if end.error is not None]
    if failed:
        # Of crashes the first one: to the others its connection broke.
        first = min(failed, key=lambda end: (end.kind, end.at if end.kind == _CRASH else 0.0))
        if first.kind == _ERROR and console_level() <= logging.DEBUG:
            print(first.trace, file=sys.stderr)
        assert first.error is not None
        raise first.error
    return ends[0].value  # type: ignore[return-value]


def _as_one(run: Callable[[C], T], config: C, devices: tuple[str, ...]) -> T:
    """`run(config)` in this process, alone or as one of those that were started together."""
    deterministic = bool(getattr(config, "deterministic", False))
    with run_arithmetic(deterministic=deterministic), joined(devices):
        return run(config)


# In the process that starts the others


@contextmanager
def _taking_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM that come while the block lasts, as a list; Python lets only the main thread take them."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handled = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in handled}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _started(folder: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes, each a session of its own, so that Ctrl-C comes here alone. None outlives the block."""
    processes: list[subprocess.Popen[bytes]] = []
    with socket.socket() as port:
        # Where they meet. It stays taken: nobody else is given it before rank 0 listens there.
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port.getsockname()[1]),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": secrets.token_hex(8),
        }
        # What libraries print, such as torch 2.8's gloo, does not belong among JSON or paths.
        stdout = sys.__stderr__ if is_json() or is_quiet() else None
        command = [sys.executable, "-c", "from mu.launch import main; main()", str(folder)]
        try:
            for place in range(count):
                env = environ | {"RANK": str(place), "LOCAL_RANK": str(place)}
                processes.append(
                    subprocess.Popen(
                        command, env=env, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True
                    )
                )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], signals: list[int], folder: Path) -> list[int | None]:
    """Their exit codes when all have ended; None for those that have not, long after another one has failed.

    Signals are handed on. A process that has not said that it is ready for them has done nothing yet, and is killed.
    """
    handed_on = 0
    failed_at: float | None = None
    while [
        process for process in processes if process.poll() is None
    ]:  # asks each of them, so that a failure is seen
        for number in signals[handed_on:]:
            handed_on += 1
            for place, process in enumerate(processes):
                process.send_signal(number if (folder / f"ready-{place}").exists() else signal.SIGKILL)
        if failed_at is None and any(process.returncode for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
            break
        time.sleep(0.05)
    return [process.returncode for process in processes]


def _end(folder: Path, place: int, code: int, signals: Sequence[int]) -> _End:
    """What the process noted; one that ended without a note was stopped by our signal, or else by somebody."""
    path = folder / f"end-{place}"
    if path.exists():
        end: _End = pickle.loads(path.read_bytes())
        return end
    if signals:
        return _End(error=KeyboardInterrupt() if signals[0] == signal.SIGINT else Terminated(), kind=_STOP)
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return _End(error=RankError(f"process {place} of the run was ended {how}"), kind=_CRASH)


# In each process that was started


def main() -> None:
    """Do the task that lies in the folder of the first argument, and leave there how it ended."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it ignores what its parent ignored
    with ExitStack() as stack:
        stack.push(partial(_note, folder / f"end-{started_rank()}"))
        stack.enter_context(terminable())
        (folder / f"ready-{started_rank()}").touch()
        task: _Task = pickle.loads((folder / "task").read_bytes())
        stack.enter_context(verbosity(task.log_level, quiet=task.quiet, json=task.json))
        stack.enter_context(telling("in one of the processes"))
        _write(folder / f"end-{started_rank()}", _End(_as_one(task.run, task.config, task.devices)))
    leave()


def _note(
    path: Path, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Leave there what ends this process, and end it: to part from the others in order may be to wait for them."""
    if error is None:
        return
    text = "".join(traceback.format_exception(kind, error, trace))
    if isinstance(error, MuError):
        end = _End(error=sendable(error), trace=text)
    elif isinstance(error, (KeyboardInterrupt, Terminated)):
        end = _End(error=type(error)(), kind=_STOP)
    else:
        end = _End(error=RankError(text), kind=_CRASH, at=time.time())
    _write(path, end)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as in a program without a console
            stream.flush()
    os._exit(1)


def _write(path: Path, value: object) -> None:
    """Pickle a value for the other side of a private folder; whole when it is there."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(pickle.dumps(value))
    beside.rename(path)


def _end_with(parent: int) -> None:
    """Without the process that waits for them, nobody would end the processes of a run."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
