"""create_env NAME: the environment of an algorithm, by conda, mamba, micromamba or venv, with this package in it."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

import mu
from mu.commands.backends import (
    CONDAS,
    EnvironmentProblem,
    Runner,
    create_conda,
    create_venv,
    find_executable,
    find_python,
)
from mu.commands.door import Outcome, add_verbosity, guarded, path, program
from mu.config_names import nearest
from mu.console import ArgumentParser

ALGORITHMS = Path(mu.__file__).parent / "algorithms"
FILE_NAME = "environment.yaml"


@dataclass(frozen=True)
class EnvironmentFile:
    """What an environment.yaml asks for."""

    path: Path
    name: str
    python: str
    """Version as conda writes it, such as `3.11` (any 3.11.x); empty: any."""
    pip: tuple[str, ...]
    """Lines for pip: requirements and options."""
    conda_only: tuple[str, ...]
    """Packages that only conda can install."""


def main(argv: Sequence[str] | None = None, *, root: Path = ALGORITHMS) -> int:
    """The command; returns its exit code. `root` holds the algorithms' folders."""
    parser = ArgumentParser(
        prog=program("create_env"),
        example="uce --backend venv --dry_run",
        description="Makes the environment that an algorithm's environment.yaml describes, installs this package "
        "there, and says how to activate it.",
        epilog="exit codes: 0 made, 1 an error with its message, 2 a mistake in the arguments, 130 interrupted",
        allow_abbrev=False,
    )
    parser.add_argument("name", help=f"one of: {', '.join(algorithm_names(root))}")
    parser.add_argument(
        "--backend",
        choices=("auto", *CONDAS, "venv"),
        default="auto",
        help="auto: the first of mamba, micromamba, conda that is there; venv needs none of them",
    )
    parser.add_argument(
        "--prefix",
        "--path",
        type=path,
        metavar="DIR",
        help="folder of the environment; default: conda's own place under its name, or .venv-NAME here for venv",
    )
    parser.add_argument(
        "--python",
        type=os.path.expanduser,
        metavar="PROGRAM",
        help="venv: the Python to use, whatever its version",
    )
    parser.add_argument("--force", action="store_true", help="make an existing environment anew")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands")
    add_verbosity(parser)
    arguments = parser.parse_args(argv)
    try:
        file = find_environment(arguments.name, root)
    except EnvironmentProblem as error:
        parser.error(str(error))

    return guarded(lambda: create(arguments, file), arguments)


def create(arguments: argparse.Namespace, file: Path) -> Outcome:
    """Makes the environment that the arguments ask for, from `file`. Raises EnvironmentProblem."""
    # 1. What, by whom, and from where?
    wanted = read_environment(file, arguments.name)
    backend, executable = choose_backend(arguments.backend)
    source = package_source()
    run, force, prefix = Runner(arguments.dry_run), arguments.force, arguments.prefix
    if executable is not None and arguments.python is not None:
        raise EnvironmentProblem(f"--python belongs to --backend venv; {backend} installs its own")
    if executable is None and wanted.conda_only:
        raise EnvironmentProblem(
            f"{file} asks for {', '.join(wanted.conda_only)}, which only conda installs; take --backend conda"
        )

    # 2. Make it, with the package in it.
    if executable is not None:
        prefix = prefix.absolute() if prefix is not None else None
        activation = create_conda(
            executable, backend, wanted.name, file, prefix=prefix, source=source, force=force, run=run
        )
    else:
        prefix = (prefix or Path(f".venv-{wanted.name}")).absolute()
        activation = create_venv(
            prefix,
            lambda: find_python(wanted.python, file, arguments.python),
            wanted.pip,
            file.parent,
            source=source,
            force=force,
            run=run,
        )

    # 3. Say how it is used.
    if source is None:
        print(
            "This package itself was not installed from a folder that is still there. After activating, install\n"
            "it from its source: pip install PATH (not by its name: the index holds another project under it)."
        )
    made = "Would be made" if arguments.dry_run else "Made"
    return Outcome(
        f"{made}. To use it:\n  {activation}",
        {"name": wanted.name, "backend": backend, "prefix": prefix, "made": not arguments.dry_run,
         "activate": activation},
        [] if prefix is None else [prefix],
    )  # fmt: skip


def algorithm_names(root: Path = ALGORITHMS) -> list[str]:
    """The algorithms: folders with an environment.yaml, and packages, for which there is one for all."""
    shared = (root / FILE_NAME).is_file()
    return sorted(
        folder.name
        for folder in root.iterdir()
        if (folder / FILE_NAME).is_file() or (shared and (folder / "__init__.py").is_file())
    )


def find_environment(name: str, root: Path = ALGORITHMS) -> Path:
    """The algorithm's environment.yaml, or the one for all that bring none.

    Raises EnvironmentProblem with all names, and the nearest, for a wrong one.
    """
    names = algorithm_names(root)
    if name in names:
        own = root / name / FILE_NAME
        return own if own.is_file() else root / FILE_NAME
    raise EnvironmentProblem(
        f"{name!r} is no algorithm; there are: {', '.join(names)}.{nearest(name, names)}"
    )


def read_environment(path: Path, algorithm: str) -> EnvironmentFile:
    """Reads an environment.yaml. Raises EnvironmentProblem for one that is malformed.

    An algorithm's own file names the environment; one for all is made under the algorithm's name.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise EnvironmentProblem(f"{path}: cannot be read ({error})") from error
    dependencies = content.get("dependencies") if isinstance(content, dict) else None
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(dependencies, list) or not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise EnvironmentProblem(f"{path}: needs a `name` and a list of `dependencies`, as conda writes them")
    python, pip, conda_only = "", [], []
    for entry in dependencies:
        if isinstance(entry, dict) and set(entry) == {"pip"} and isinstance(entry["pip"], list):
            pip += [str(line) for line in entry["pip"]]
        elif not isinstance(entry, str):
            raise EnvironmentProblem(f"{path}: {entry!r} is neither a package nor a list of pip's packages")
        elif match := re.fullmatch(r"python(?:\s*={1,2}\s*([0-9.]+?)(?:\.\*)?)?", entry.strip()):
            python = match[1] or ""
        elif not re.fullmatch(r"(pip|setuptools|wheel)\b.*", entry.strip()):
            conda_only.append(entry)
    own = path.parent.name == algorithm
    return EnvironmentFile(path, name if own else algorithm, python, tuple(pip), tuple(conda_only))


def choose_backend(asked: str) -> tuple[str, str | None]:
    """(backend, its program; None for venv). Raises EnvironmentProblem when it is not there."""
    if asked == "venv":
        return asked, None
    for backend in CONDAS if asked == "auto" else (asked,):
        executable = find_executable(backend)
        if executable is not None:
            return backend, executable
    what = "none of mamba, micromamba and conda is" if asked == "auto" else f"{asked} is not"
    raise EnvironmentProblem(f"{what} on PATH. --backend venv makes the same environment without conda.")


def package_source() -> Path | None:
    """The folder that this package can be installed from: its checkout, or where pip took it from."""
    checkout = Path(mu.__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout
    try:
        text = metadata.distribution("unlearn_diff").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    parts = urlsplit(json.loads(text)["url"]) if text else None
    path = Path(url2pathname(parts.path)) if parts is not None and parts.scheme == "file" else None
    return path if path is not None and path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
