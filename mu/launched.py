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

from mu.cli import terminable
from mu.errors import MuError, Terminated
from mu.launch import Outcome, Task, write_pickle
from mu.ranks import joined, sendable, started_rank
from mu.verbosity import verbosity


def main(folder: Path) -> int:
    """Do the task that lies in `folder`; returns the exit code, 0 where its outcome is a value."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    task: Task = pickle.loads((folder / "task").read_bytes())
    level = logging.getLevelName(task.level).lower()
    noting = _Noting(folder)
    with noting, verbosity(level, quiet=task.quiet), terminable(), joined(task.devices), noting:
        noting.note(Outcome(value=task.run(task.config)))
    return int(noting.failed)


class _Noting:
    """Notes the first thing that ends its block, while the connection to the others still stands."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"outcome-{started_rank()}"
        self.failed = False

    def note(self, outcome: Outcome) -> None:
        write_pickle(self.path, outcome)

    def __enter__(self) -> _Noting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        self.failed = True
        if isinstance(error, MuError):
            self.note(Outcome(error=sendable(error)))
        elif isinstance(error, (KeyboardInterrupt, Terminated)):
            number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            self.note(Outcome(stopped_by=number))
        else:
            self.note(Outcome(crash="".join(traceback.format_exception(kind, error, trace))))
        return True


def _end_with(parent: int) -> None:
    """Without the process that waits for them, nobody would end the processes of a run."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
