"""What is installed is what the repository says: one version, one list of dependencies, every file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mu

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ALGORITHM_ENVIRONMENT = ROOT / "mu/algorithms/saliency_unlearning/environment.yaml"
PYDANTIC = ("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection")
OWN_YAML = "mu/algorithms/saliency_unlearning/configs/mask_config.yaml"


def copied_source(tmp_path: Path) -> Path:
    """What the package is built from."""
    source = tmp_path / "source"
    for folder in ("mu", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    return source


def requirements(*, extra: str | None = None) -> dict[str, Requirement]:
    """The distribution's own requirements, by canonical name: the unconditional ones, or those of an extra."""
    found = {}
    for line in metadata.requires("unlearn_diff") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        conditional = marker is not None and not marker.evaluate({"extra": ""})
        if (extra is None and not conditional) or (
            extra is not None and conditional and marker is not None and marker.evaluate({"extra": extra})
        ):
            found[canonicalize_name(requirement.name)] = requirement
    return found


def pip_lines(environment: Path) -> list[str]:
    dependencies = yaml.safe_load(environment.read_text(encoding="utf-8"))["dependencies"]
    return next(entry["pip"] for entry in dependencies if isinstance(entry, dict))


def test_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", mu.__version__)
    assert metadata.version("unlearn_diff") == mu.__version__
    assert 'dynamic = ["version"]' in PROJECT
    assert mu.__version__ not in PROJECT


def test_changelog_names_the_version() -> None:
    assert f"## {mu.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in pins, f"{name} is pinned twice"
            pins[canonicalize_name(name)] = version
    wanted = requirements() | requirements(extra="dev") | requirements(extra="emoji")
    assert wanted.keys() <= pins.keys()
    for name, requirement in wanted.items():
        assert requirement.specifier.contains(pins[name]), f"{requirement} is pinned to {pins[name]}"


def test_algorithm_environment_lists_the_dependencies() -> None:
    assert {str(Requirement(line)) for line in pip_lines(ALGORITHM_ENVIRONMENT)} == {
        str(requirement) for requirement in requirements().values()
    }


@pytest.mark.parametrize("path", [ROOT / "environment.yaml", ALGORITHM_ENVIRONMENT], ids=["top", "algorithm"])
def test_environment_has_its_name_and_python(path: Path) -> None:
    environment = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert environment["name"] == "saliency_unlearning"
    assert "python=3.11" in environment["dependencies"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_built_distribution_runs_in_an_empty_environment(tmp_path: Path, kind: str) -> None:
    """Of the dependencies, `--help` needs pydantic, PyYAML, tqdm and Pillow: links to them are all that is put in."""
    source = copied_source(tmp_path)
    build = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("unlearn_diff-*.whl" if kind == "wheel" else "unlearn_diff-*.tar.gz")

    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    python = empty / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    # setuptools builds the sdist once more, and has to be seen for that.
    (site,) = (empty / "lib").glob("python*/site-packages")
    (site / "build_tools.pth").write_text(str(Path(setuptools.__file__).parents[1]))
    install = [*pip, "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", str(built)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    (site / "build_tools.pth").unlink()
    for package in ("yaml", "tqdm", "PIL", *PYDANTIC):
        file = Path(str(find_spec(package).origin))  # type: ignore[union-attr]
        if file.name != "__init__.py":
            (site / file.name).symlink_to(file)
            continue
        folder = file.parent
        (site / package).symlink_to(folder)
        for libraries in folder.parent.glob(f"{'pillow' if package == 'PIL' else package}.libs"):
            (site / libraries.name).symlink_to(libraries)
    runs = [["-m", "mu.commands.download_data"], ["-m", "mu.commands.debug_report"]]
    runs += [
        ["-m", f"mu.algorithms.saliency_unlearning.scripts.{door}"] for door in ("generate_mask", "train")
    ]
    for run in runs:
        done = subprocess.run(
            [str(python), "-I", *run, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "--quiet" in done.stdout
    # The packaged settings are found by each of their names, outside of a checkout too.
    names = ("emoji_canvas/mask_style.yaml", "configs/emoji_canvas/mask_style.yaml", OWN_YAML)
    find = f"from mu.config_file import find_config; [print(find_config(name)) for name in {names}]"
    done = subprocess.run(
        [str(python), "-I", "-c", find], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    shared = str(site / "mu/configs/emoji_canvas/mask_style.yaml")
    assert done.stdout.split() == [shared, shared, str(site / OWN_YAML)]
    where = "import mu; print(mu.__file__); print(mu.__version__)"
    done = subprocess.run([str(python), "-I", "-c", where], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(site / "mu/__init__.py"), mu.__version__]


@pytest.mark.slow
def test_the_source_distribution_holds_what_its_tests_need(tmp_path: Path) -> None:
    """Every file of the repository that does not begin with a dot is in it; tests that read such files pass there."""
    built = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "site", "data", "outputs", "wandb"
    )
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=lambda at, names: built(at, names) if Path(at) == ROOT else {"__pycache__"},
    )
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("unlearn_diff-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    shutil.rmtree(next(source.glob("*.egg-info")))
    missing = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and not (root / path.relative_to(source)).is_file()
    }
    assert missing == set()
    own = [
        "tests/test_docs.py",
        "tests/test_packaging.py",
        "tests/algorithms/saliency_unlearning/test_configs.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *own],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Built from a copy, so that neither an older build nor this checkout's metadata can fill a gap."""
    source = copied_source(tmp_path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("unlearn_diff-*.whl")

    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    expected = {path.relative_to(source).as_posix() for path in (source / "mu").rglob("*") if path.is_file()}
    expected |= {f"mu/{path.relative_to(source).as_posix()}" for path in (source / "configs").rglob("*.yaml")}
    assert expected - packed == set()
    assert licences == {"LICENSE", "NOTICE"}

    # Installed elsewhere, the package is imported from there.
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", str(site), str(wheel)], check=True)
    program = "import mu; print(mu.__file__); print(mu.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=site, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(site / "mu/__init__.py"), mu.__version__]
