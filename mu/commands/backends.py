"""Environments made by conda, mamba, micromamba, or by Python's own venv."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mu.errors import MuError
from mu.verbosity import console_level, is_json

CONDAS = ("mamba", "micromamba", "conda")
"""In the order in which they are looked for: the quick ones first."""
VENV_OPTIONS: tuple[str, ...] = ()
"""Options of `python -m venv`."""
_VARIABLES = {"conda": "CONDA_EXE", "mamba": "MAMBA_EXE", "micromamba": "MAMBA_EXE"}


class EnvironmentProblem(MuError, ValueError):
    """An environment that cannot be made: the message says why and what to do."""


@dataclass(frozen=True)
class Runner:
    """Prints each command, and runs it unless `dry`."""

    dry: bool = False

    def __call__(self, command: Sequence[str], *, cwd: Path | None = None) -> None:
        """Raises EnvironmentProblem when the command fails. It gets no input: nothing waits for an answer."""
        print(f"$ {shlex.join(command)}", flush=True)
        if self.dry:
            return
        try:
            out: Any = sys.__stderr__ if is_json() else None
            if console_level() > logging.INFO:
                out = subprocess.DEVNULL
            done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, check=False)
        except OSError as error:
            raise EnvironmentProblem(f"{command[0]} cannot be run ({error.strerror})") from error
        if done.returncode != 0:
            raise EnvironmentProblem(
                f"`{shlex.join(command)}` failed with exit status {done.returncode}; see above"
            )


def find_executable(backend: str) -> str | None:
    """The program of a conda-like backend: on PATH, or where its shell function says it is."""
    found = shutil.which(backend)
    named = os.environ.get(_VARIABLES[backend], "")
    # MAMBA_EXE may be either of the two: mamba and micromamba.
    if found is None and Path(named).stem == backend and os.access(named, os.X_OK):
        return named
    return found


def create_conda(
    executable: str,
    backend: str,
    name: str,
    file: Path,
    *,
    prefix: Path | None,
    source: Path | None,
    force: bool,
    run: Runner,
) -> str:
    """Makes the environment that `file` describes; returns the line that activates it. Raises EnvironmentProblem.

    Args:
        name: of the environment, where no `prefix` says in which folder it is to be.
        source: the folder from which this package is installed there.
        force: makes an existing one anew.
    """
    where = ["-p", str(prefix)] if prefix is not None else ["-n", name]
    activation = f"{backend} activate {shlex.quote(str(prefix)) if prefix is not None else name}"
    existing = _conda_environment(executable, name) if prefix is None else prefix
    if existing is not None and _is_used(existing):
        if not force:
            raise EnvironmentProblem(
                f"the environment {existing} exists already, and was not touched. --force makes it anew; "
                f"to use it: {activation}"
            )
        if not (existing / "conda-meta").is_dir():
            raise EnvironmentProblem(f"{existing} is no conda environment; --force does not delete it")
        run([executable, "env", "remove", "-y", *where])
    create = ["create", "-y"] if backend == "micromamba" else ["env", "create"]
    run([executable, *create, *where, "-f", str(file)])
    if source is not None:
        run([executable, "run", *where, "python", "-m", "pip", "install", str(source)])
    return activation


def _conda_environment(executable: str, name: str) -> Path | None:
    command = [executable, "env", "list", "--json"]
    try:
        listed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        paths = [Path(path) for path in json.loads(listed.stdout)["envs"]]
    except (OSError, subprocess.CalledProcessError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(
            f"`{shlex.join(command)}` does not list the environments ({error})"
        ) from error
    return next((path for path in paths if path.name == name), None)


def _is_used(folder: Path) -> bool:
    return folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))


def create_venv(
    prefix: Path,
    interpreter: Callable[[], str],
    requirements: Sequence[str],
    folder: Path,
    *,
    source: Path | None,
    force: bool,
    run: Runner,
) -> str:
    """Makes a virtual environment at `prefix`; returns the line that activates it. Raises EnvironmentProblem.

    Args:
        interpreter: gives the Python that makes it.
        requirements: lines for pip; relative paths in them start from `folder`.
        source: the folder from which this package is installed there.
        force: makes an existing one anew; the old one comes back when that fails.
    """
    scripts = prefix / ("Scripts" if os.name == "nt" else "bin")
    activate = str(scripts / "activate")
    activation = activate if os.name == "nt" else f"source {shlex.quote(activate)}"
    if _is_used(prefix):
        if not force:
            raise EnvironmentProblem(
                f"{prefix} exists already, and was not touched. --force makes it anew, --prefix another; "
                f"to use it: {activation}"
            )
        if prefix.is_symlink() or not (prefix / "pyvenv.cfg").is_file():
            raise EnvironmentProblem(f"{prefix} is no virtual environment; --force does not delete it")
    python = interpreter()
    aside = prefix.with_name(f".{prefix.name}.old-{os.getpid()}")
    kept = not run.dry and prefix.exists()
    if kept:
        os.rename(prefix, aside)
    pip = [str(scripts / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    words = [word for line in requirements for word in shlex.split(line)]
    try:
        run([python, "-m", "venv", *VENV_OPTIONS, str(prefix)])
        if not run.dry:
            (prefix / ".gitignore").write_text("*\n", encoding="utf-8")
        if words:
            run([*pip, *words], cwd=folder)
        if source is not None:
            run([*pip, str(source)])
    except BaseException:
        if not run.dry:
            shutil.rmtree(prefix, ignore_errors=True)
            if kept:
                os.rename(aside, prefix)
        raise
    if kept:
        shutil.rmtree(aside)
    return activation


def find_python(wanted: str, file: Path, python: str | None) -> str:
    """The interpreter for a venv: `python`, whatever its version; else one of the version `wanted`, such as `3.11`.

    Raises EnvironmentProblem, which names `file` as the one that wants it.
    """
    if python is not None:
        found = shutil.which(python)
        if found is None:
            raise EnvironmentProblem(f"--python: {python} is no program")
        if not _is_version(version := _version(found), wanted):
            print(f"note: {file.name} asks for Python {wanted}; --python is {version}", flush=True)
        return found
    own = ".".join(map(str, sys.version_info[:3]))
    if _is_version(own, wanted):
        return sys.executable
    for name in (f"python{wanted}", "python3", "python"):
        found = shutil.which(name)
        if found is not None and _is_version(_version(found), wanted):
            return found
    raise EnvironmentProblem(
        f"{file} asks for Python {wanted}; this one is {own}, and no other is on PATH. Install python{wanted}, or "
        "give any Python from 3.10 on with --python."
    )


def _is_version(version: str, wanted: str) -> bool:
    """Whether `version`, such as `3.11.7`, is the one wanted; an empty text is any."""
    return not wanted or f"{version}.".startswith(f"{wanted}.")


def _version(executable: str) -> str:
    program = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        done = subprocess.run(
            [executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(f"{executable} cannot be run: {error}") from error
    return done.stdout.strip()
