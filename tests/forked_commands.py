"""Commands as real processes that can be killed, without the seconds that importing takes.

A server process imports what is heavy, runs none of it, and forks once for each command.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SCRIPTS = "mu.algorithms.saliency_unlearning.scripts"
HEAVY = (
    "mu.algorithms.saliency_unlearning.algorithm",
    "mu.commands.sampling",
    "mu.evaluation.evaluation",
    "mu.commands.download_data",
)


class Command:
    """A command that runs; its output goes to `log`."""

    def __init__(self, server: subprocess.Popen[str], pid: int, log: Path) -> None:
        self._server = server
        self.pid = pid
        self.log = log

    def wait(self) -> int:
        """The exit code; of a process that a signal ended, the negative of its number."""
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def kill_when(self, signum: int, ready: Callable[[], object], *, timeout_s: float = 60) -> int:
        """Send a signal as soon as `ready` says so, unless the command has ended before; returns its exit code."""
        end = time.monotonic() + timeout_s
        while not ready() and self.is_running() and time.monotonic() < end:
            time.sleep(0.0005)
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, signum)
        return self.wait()

    def kill_after(self, signum: int, seconds: float) -> int:
        """Send a signal after so long, unless the command has ended before; returns its exit code."""
        select.select([self._server.stdout], [], [], seconds)
        return self.kill_when(signum, lambda: True)

    def is_running(self) -> bool:
        """Neither gone nor ended and not yet waited for."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return status.rpartition(")")[2].split()[0] not in "ZX"

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")


class Commands:
    """Starts commands, one at a time. As a context manager it ends its server."""

    def __enter__(self) -> Commands:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "no_proxy": "*"},  # the servers of tests are on this machine
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def start(self, script: str, log: Path, *argv: str, max_file_bytes: int | None = None) -> Command:
        """Begin `python -m <script> <argv>`; larger files than `max_file_bytes` cannot be written."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"script": script, "log": str(log), "argv": argv, "max_file_bytes": max_file_bytes}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Command(self._server, int(self._server.stdout.readline()), log)

    def run(self, script: str, log: Path, *argv: str, max_file_bytes: int | None = None) -> int:
        """A command from beginning to end; returns its exit code."""
        return self.start(script, log, *argv, max_file_bytes=max_file_bytes).wait()


def flags(keys: dict[str, Any]) -> list[str]:
    """The command line of the keys of a config."""
    from mu.config import as_text

    return [word for key, value in keys.items() for word in (f"--{key}", as_text(value, split=False))]


def serve() -> None:
    for module in HEAVY:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = _command(**request)
            except KeyboardInterrupt:  # after the command, as Python itself would end
                code = 130
            finally:
                if code == 99:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _command(script: str, log: str, argv: list[str], max_file_bytes: int | None) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        code: int = importlib.import_module(script).main(argv)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is of this file, and no part of a command
    return code


if __name__ == "__main__":
    serve()
