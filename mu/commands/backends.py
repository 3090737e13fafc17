"""Environments made by conda, mamba, micromamba, or by Python's own venv."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.commands.environment_file import EnvironmentFile, EnvironmentProblem
from mu.verbosity import console_level

CONDAS = ("mamba", "micromamba", "conda")
"""In the order in which they are looked for: the quick ones first."""
VENV_OPTIONS: tuple[str, ...] = ()
"""Options of `python -m venv`."""
_VARIABLES = {"conda": "CONDA_EXE", "mamba": "MAMBA_EXE", "micromamba": "MAMBA_EXE"}


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
            out = subprocess.DEVNULL if console_level() > logging.INFO else None
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
    executable: str, backend: str, wanted: EnvironmentFile, *, prefix: Path | None, source: Path | None,
    force: bool, run: Runner,
) -> str:  # fmt: skip
    """Makes the environment; returns the line that activates it. Raises EnvironmentProblem."""
    where = ["-p", str(prefix)] if prefix is not None else ["-n", wanted.name]
    existing = _existing(executable, wanted.name, prefix)
    if existing is not None:
        if not force:
            raise EnvironmentProblem(
                f"the environment {existing} exists already, and was not touched. --force makes it anew; "
                f"to use it: {_activation(backend, wanted.name, prefix)}"
            )
        if not (existing / "conda-meta").is_dir():
            raise EnvironmentProblem(f"{existing} is no conda environment; --force does not delete it")
        run([executable, "env", "remove", "-y", *where])
    create = ["create", "-y"] if backend == "micromamba" else ["env", "create"]
    run([executable, *create, *where, "-f", str(wanted.path)])
    if source is not None:
        run([executable, "run", *where, "python", "-m", "pip", "install", str(source)])
    return _activation(backend, wanted.name, prefix)


def _existing(executable: str, name: str, prefix: Path | None) -> Path | None:
    if prefix is not None:
        return prefix if prefix.exists() and (not prefix.is_dir() or any(prefix.iterdir())) else None
    command = [executable, "env", "list", "--json"]
    try:
        listed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        paths = [Path(path) for path in json.loads(listed.stdout)["envs"]]
    except (OSError, subprocess.CalledProcessError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(
            f"`{shlex.join(command)}` does not list the environments ({error})"
        ) from error
    return next((path for path in paths if path.name == name), None)


def _activation(backend: str, name: str, prefix: Path | None) -> str:
    return f"{backend} activate {shlex.quote(str(prefix)) if prefix is not None else name}"


def create_venv(
    wanted: EnvironmentFile,
    *,
    prefix: Path,
    python: str | None,
    source: Path | None,
    force: bool,
    run: Runner,
) -> str:
    """Makes a virtual environment at `prefix`; returns the line that activates it. Raises EnvironmentProblem.

    With `force` the old one is set aside, and comes back when the new one fails.
    """
    if wanted.conda_only:
        raise EnvironmentProblem(
            f"{wanted.path} asks for {', '.join(wanted.conda_only)}, which only conda installs; take --backend conda"
        )
    prefix = prefix.absolute()
    scripts = prefix / ("Scripts" if os.name == "nt" else "bin")
    activation = (
        str(scripts / "activate") if os.name == "nt" else f"source {shlex.quote(str(scripts / 'activate'))}"
    )
    if prefix.is_symlink() or (prefix.exists() and (not prefix.is_dir() or any(prefix.iterdir()))):
        if not force:
            raise EnvironmentProblem(
                f"{prefix} exists already, and was not touched. --force makes it anew, --prefix another; "
                f"to use it: {activation}"
            )
        if prefix.is_symlink() or not (prefix / "pyvenv.cfg").is_file():
            raise EnvironmentProblem(f"{prefix} is no virtual environment; --force does not delete it")
    interpreter = find_python(wanted, python)
    aside = prefix.with_name(f".{prefix.name}.old-{os.getpid()}")
    kept = not run.dry and prefix.exists()
    if kept:
        os.rename(prefix, aside)
    own = str(scripts / "python")
    pip = [own, "-m", "pip", "--disable-pip-version-check", "install"]
    words = [word for line in wanted.pip for word in shlex.split(line)]
    try:
        run([interpreter, "-m", "venv", *VENV_OPTIONS, str(prefix)])
        if not run.dry:
            (prefix / ".gitignore").write_text("*\n", encoding="utf-8")
        if words:
            # Relative paths in the file are meant from its folder.
            run([*pip, *words], cwd=wanted.path.parent)
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


def find_python(wanted: EnvironmentFile, python: str | None) -> str:
    """The interpreter for a venv: `python`, whatever its version; else one of the version that is asked for."""
    if python is not None:
        found = shutil.which(python)
        if found is None:
            raise EnvironmentProblem(f"--python: {python} is no program")
        version = python_version(found)
        if not wanted.accepts(version):
            print(
                f"note: {wanted.path.name} asks for Python {wanted.python}; --python is {version}", flush=True
            )
        return found
    if wanted.accepts(python_version(sys.executable)):
        return sys.executable
    for name in (f"python{wanted.python}", "python3", "python"):
        found = shutil.which(name)
        if found is not None and wanted.accepts(python_version(found)):
            return found
    raise EnvironmentProblem(
        f"{wanted.path} asks for Python {wanted.python}; this one is {python_version(sys.executable)}, and no other is "
        f"on PATH. Install python{wanted.python}, or give any Python from 3.10 on with --python."
    )


def python_version(executable: str) -> str:
    """The version of an interpreter, such as `3.11.7`. Raises EnvironmentProblem when it does not say."""
    if executable == sys.executable:
        return ".".join(map(str, sys.version_info[:3]))
    program = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        done = subprocess.run(
            [executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(f"{executable} cannot be run: {error}") from error
    return done.stdout.strip()
