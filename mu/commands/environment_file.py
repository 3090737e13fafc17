"""The environment.yaml files of the algorithms: found, read and checked."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import mu
from mu.errors import MuError

ALGORITHMS = Path(mu.__file__).parent / "algorithms"


class EnvironmentProblem(MuError, ValueError):
    """An environment that cannot be made: the message says why and what to do."""


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

    def accepts(self, version: str) -> bool:
        """Whether a Python of `version`, such as `3.11.7`, is the one asked for."""
        return not self.python or f"{version}.".startswith(f"{self.python}.")


def environment_names(root: Path = ALGORITHMS) -> list[str]:
    """The algorithms that have an environment.yaml."""
    return sorted(path.parent.name for path in root.glob("*/environment.yaml"))


def find_environment(name: str, root: Path = ALGORITHMS) -> Path:
    """The algorithm's environment.yaml. Raises EnvironmentProblem with all names, and the nearest, for a wrong one."""
    names = environment_names(root)
    if name in names:
        return root / name / "environment.yaml"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise EnvironmentProblem(
        f"{name!r} is no algorithm with an environment.yaml; there are: {', '.join(names)}.{hint}"
    )


def read_environment(path: Path) -> EnvironmentFile:
    """Reads an environment.yaml. Raises EnvironmentProblem for one that is malformed."""
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
    return EnvironmentFile(path, name, python, tuple(pip), tuple(conda_only))
