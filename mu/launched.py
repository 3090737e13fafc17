"""`python -m mu.launched <folder>`: one process of `mu.launch`. There it is told what to do, and notes how it ended."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from mu.arithmetic import run_arithmetic
from mu.console import terminable
from mu.errors import MuError, Terminated
from mu.launch import Outcome, Task, is_deterministic, write_pickle
from mu.memory import telling
from mu.ranks import joined, leave, sendable, started_rank
from mu.verbosity import verbosity


def main(folder: Path) -> int:
    """Do the task that lies in `folder`, and leave its outcome there."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it ignores what its parent ignored
    with _Noting(folder) as noting, terminable():
        (folder / f"ready-{started_rank()}").touch()
        task: Task = pickle.loads((folder / "task").read_bytes())
        level = logging.getLevelName(task.level).lower()
        arithmetic = run_arithmetic(deterministic=is_deterministic(task.config))
        with (
            verbosity(level, quiet=task.quiet),
            arithmetic,
            joined(task.devices),
            telling("in one of the processes"),
        ):
            noting.note(Outcome(value=task.run(task.config)))
    leave()
    return 0


class _Noting:
    """Notes what ends its block, and ends the process with it.

    At once, because an error may be this process' alone: to part from the others in order would be to wait for them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"outcome-{started_rank()}"

    def note(self, outcome: Outcome) -> None:
        write_pickle(self.path, outcome)

    def __enter__(self) -> _Noting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        text = "".join(traceback.format_exception(kind, error, trace))
        if isinstance(error, MuError):
            self.note(Outcome(error=sendable(error), trace=text))
        elif isinstance(error, (KeyboardInterrupt, Terminated)):
            number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            self.note(Outcome(stopped_by=number))
        else:
            self.note(Outcome(crash=text))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _end_with(parent: int) -> None:
    """Without the process that waits for them, nobody would end the processes of a run."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
