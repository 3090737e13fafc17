"""create_env NAME: the environment of an algorithm, by conda, mamba, micromamba or venv, with this package in it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mu
from mu.commands.backends import CONDAS, Runner, create_conda, create_venv, find_executable
from mu.commands.door import add_verbosity, guarded, notes_as_asked, path
from mu.commands.environment_file import (
    ALGORITHMS,
    EnvironmentProblem,
    environment_names,
    find_environment,
    read_environment,
)
from mu.console import ArgumentParser
from mu.verbosity import verbosity


def main(argv: Sequence[str] | None = None, *, root: Path = ALGORITHMS) -> int:
    """The command; returns its exit code. `root` holds the algorithms' folders."""
    names = environment_names(root)
    parser = ArgumentParser(
        prog="create_env",
        description="Makes the environment that an algorithm's environment.yaml describes, installs this package "
        "there, and says how to activate it.",
        epilog="exit codes: 0 made, 1 an error with its message, 2 a mistake in the arguments, 130 interrupted",
        allow_abbrev=False,
    )
    parser.add_argument("name", help=f"one of: {', '.join(names)}")
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
        find_environment(arguments.name, root)
    except EnvironmentProblem as error:
        parser.error(str(error))

    def action() -> None:
        with notes_as_asked():
            create(arguments, root)

    with verbosity(arguments.log_level, quiet=arguments.quiet):
        return guarded(action, interrupted="interrupted")


def create(arguments: argparse.Namespace, root: Path = ALGORITHMS) -> None:
    """Makes the environment that the arguments ask for. Raises EnvironmentProblem."""
    wanted = read_environment(find_environment(arguments.name, root))
    run, source = Runner(arguments.dry_run), package_source()
    backend, executable = choose_backend(arguments.backend)
    if executable is None:
        activation = create_venv(
            wanted,
            prefix=arguments.prefix or Path(f".venv-{wanted.name}"),
            python=arguments.python,
            source=source,
            force=arguments.force,
            run=run,
        )
    else:
        if arguments.python is not None:
            raise EnvironmentProblem(f"--python belongs to --backend venv; {backend} installs its own")
        prefix = arguments.prefix.absolute() if arguments.prefix is not None else None
        activation = create_conda(
            executable, backend, wanted, prefix=prefix, source=source, force=arguments.force, run=run
        )
    if source is None:
        print(
            "This package itself was not installed from a folder that is still there. After activating, install"
        )
        print(
            "it from its source: pip install PATH (not by its name: the index holds another project under it)."
        )
    print(f"{'Would be made' if arguments.dry_run else 'Made'}. To use it:\n  {activation}")


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
