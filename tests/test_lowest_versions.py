"""Both stages with the lowest versions that pyproject.toml allows, in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOWEST = ROOT / "constraints-lowest.txt"
STAGES = ROOT / "tests/algorithms/saliency_unlearning"
SUITE = [
    *(STAGES / f"test_{name}.py" for name in ("masking", "trainer", "algorithm", "ranks")),
    *(ROOT / f"tests/unlearning/test_{name}.py" for name in ("compute", "optim")),
    ROOT / "tests/ldm/test_checkpoint.py",
    ROOT / "tests/ldm/test_text_encoder.py",
    ROOT / "tests/test_launch.py",
]


def test_the_lowest_versions_are_those_of_the_project() -> None:
    pins = dict(
        line.split("==")
        for line in LOWEST.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    lowest = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["inception"]]:
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        pinned = lowest.pop(canonicalize_name(requirement.name))
        assert bound.operator == ">="
        assert requirement.specifier.contains(pinned), f"{requirement} does not allow {pinned}"
        assert f"{pinned}.0.0".startswith(f"{bound.version}."), f"{pinned} is not the lowest of {requirement}"
    assert lowest.keys() == {"torchvision"}


def test_the_tests_of_the_lowest_versions_are_there() -> None:
    assert [path for path in SUITE if not path.is_file()] == []


@pytest.mark.slow
def test_both_stages_pass_with_the_lowest_versions(tmp_path: Path) -> None:
    """With torch 2.6 to 2.10, casts that autocast keeps lost nearly all gradients: no newer torch would show it."""
    oldest = shutil.which("python3.10")
    usable = oldest is not None and subprocess.run([oldest, "--version"], check=False).returncode == 0
    subprocess.run([oldest if usable else sys.executable, "-m", "venv", str(tmp_path / "lowest")], check=True)
    inside = str(tmp_path / "lowest/bin/python")
    wanted = ["-c", str(LOWEST), "-e", f"{ROOT}[inception]", "torchvision", "pytest", "hypothesis"]
    pip = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, SUITE)]
    done = subprocess.run(
        tests,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:]
