"""Commands, and processes of a run, as real processes without the seconds that importing takes.

A server process imports what is heavy, runs none of it, and forks once for each command.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SCRIPTS = "mu.algorithms.saliency_unlearning.scripts"
HEAVY = (
    "lightning_fabric",
    "mu.algorithms.saliency_unlearning.algorithm",
    "mu.ldm.text_encoder",
    "mu.commands.sampling",
    "mu.evaluation.evaluation",
    "mu.commands.download_data",
    "rank_work",
)
NUMBER = struct.Struct("q")


class Process:
    """A process that the server forked. It answers to what `mu.launch` asks of a `subprocess.Popen`."""

    def __init__(self, server: socket.socket, request: Mapping[str, Any], out: int, error: int) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(server, [b"+"], [theirs.fileno(), out, error])
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self.pid = self._number()
        self.returncode: int | None = None

    def _number(self) -> int:
        return int(NUMBER.unpack(self._connection.recv(NUMBER.size, socket.MSG_WAITALL))[0])

    def poll(self) -> int | None:
        """The exit code, or None while it runs; of a process that a signal ended, the negative of its number."""
        return self._ended_within(0)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        code = self._ended_within(None)
        assert code is not None
        return code

    def _ended_within(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], seconds)[0]:
            self.returncode = self._number()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing, if it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Command(Process):
    """A command that runs; its output goes to `log`."""

    def __init__(self, server: socket.socket, request: Mapping[str, Any], log: Path) -> None:
        self.log = log
        with open(log, "wb") as output:
            super().__init__(server, request, output.fileno(), output.fileno())

    def kill_when(self, signum: int, ready: Callable[[], object], *, timeout_s: float = 60) -> int:
        """Send a signal as soon as `ready` says so, unless the command has ended before; returns its exit code."""
        end = time.monotonic() + timeout_s
        while not ready() and self.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)
        self.send_signal(signum)
        return self.wait()

    def kill_after(self, signum: int, seconds: float) -> int:
        """Send a signal after so long, unless the command has ended before; returns its exit code."""
        self._ended_within(seconds)
        return self.kill_when(signum, lambda: True)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")


class Commands:
    """Starts commands. As a context manager it ends its server."""

    def __enter__(self) -> Commands:
        self._server, theirs = socket.socketpair()
        environ = {
            **os.environ,
            "no_proxy": "*",  # the servers of tests are on this machine
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, env=environ, pass_fds=[theirs.fileno()])
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._process.wait()

    def start(self, script: str, log: Path, *argv: str, max_file_bytes: int | None = None) -> Command:
        """Begin `python -m <script> <argv>`; larger files than `max_file_bytes` cannot be written."""
        return Command(self._server, _request(script, argv, max_file_bytes=max_file_bytes), log)

    def run(self, script: str, log: Path, *argv: str, max_file_bytes: int | None = None) -> int:
        """A command from beginning to end; returns its exit code."""
        return self.start(script, log, *argv, max_file_bytes=max_file_bytes).wait()

    def call(
        self, function: str, argument: object, result: Path, *, max_file_bytes: int | None = None
    ) -> Command:
        """Begin a function of `rank_work`. Argument and result are JSON; what it prints goes beside the result."""
        words = (function, json.dumps(argument), str(result))
        return self.start("rank_work", result.with_suffix(".log"), *words, max_file_bytes=max_file_bytes)

    def rank(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: TextIO | None,
        start_new_session: bool,
    ) -> Process:
        """In place of `subprocess.Popen` where `mu.launch` starts a process of a run."""
        python, option, program, folder = command
        assert (python, option) == (sys.executable, "-c")
        assert program == "from mu.launch import main; main()"
        assert stdin == subprocess.DEVNULL
        assert start_new_session
        request = _request("mu.launch", None, env=dict(env), folder=folder)
        return Process(self._server, request, 1 if stdout is None else stdout.fileno(), 2)


def _request(
    script: str,
    argv: Sequence[str] | None,
    *,
    env: dict[str, str] | None = None,
    folder: str = "",
    max_file_bytes: int | None = None,
) -> dict[str, Any]:
    """What `_run` is called with."""
    return {"script": script, "argv": argv, "env": env, "folder": folder, "max_file_bytes": max_file_bytes}


def flags(keys: dict[str, Any]) -> list[str]:
    """The command line of the keys of a config."""
    from mu.config import as_text

    return [word for key, value in keys.items() for word in (f"--{key}", as_text(value, split=False))]


# In the server


def serve(control: socket.socket) -> None:
    """Fork for each request, until the one that asks has gone."""
    for module in HEAVY:
        importlib.import_module(module)
    gc.freeze()  # else the first collection of each fork copies all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        if not asked:
            return
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(*descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(connection: int, out: int, error: int) -> None:
    """Start the process, wait for it, and say its number and its exit code."""
    with socket.socket(fileno=connection) as told:
        with told.makefile("rb") as lines:
            request = json.loads(lines.readline())
        pid = os.fork()
        if pid == 0:
            told.close()
            _become(request, out, error)
        told.sendall(NUMBER.pack(pid))
        told.sendall(NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def _become(request: dict[str, Any], out: int, error: int) -> None:
    """Run it in this process, and end."""
    code = 99
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(error, 2)
        code = _run(**request)
    except KeyboardInterrupt:  # after the command, as Python itself would end
        code = 130
    finally:
        if code == 99:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(
    script: str, argv: list[str] | None, env: dict[str, str] | None, folder: str, max_file_bytes: int | None
) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    module = importlib.import_module(script)
    if argv is None:
        _take_environment(env or {})
        sys.argv = ["-c", folder]
        module.main()
        return 0
    try:
        code: int = module.main(argv)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is of this file, and no part of a command
    return code


def _take_environment(env: dict[str, str]) -> None:
    """What a Python that is started with it does at its start, and OpenMP when it is loaded."""
    import torch

    os.environ.clear()
    os.environ |= env
    sys.path += [path for path in env["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    threads = env.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # nothing is to be put away, and to take apart what was imported takes a second
