"""Environments from an algorithm's environment.yaml, with made-up condas that write down what they are asked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mu.commands.backends import EnvironmentProblem
from mu.commands.create_env import (
    ALGORITHMS,
    algorithm_names,
    find_environment,
    main,
    package_source,
    read_environment,
)

NAME = "saliency_unlearning"
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
SOURCE = Path(__file__).resolve().parents[2]


class Condas:
    """Puts shell scripts named conda, mamba, ... on a PATH of their own; `calls` is what they were given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log = folder / "bin", folder / "calls"
        self.folder.mkdir()
        monkeypatch.setenv("PATH", str(self.folder))
        for variable in ("CONDA_EXE", "MAMBA_EXE"):
            monkeypatch.delenv(variable, raising=False)

    def add(self, name: str, *, envs: tuple[str, ...] = (), status: int = 0) -> None:
        listing = json.dumps({"envs": list(envs)})
        script = self.folder / name
        script.write_text(
            f"#!/bin/sh\nif [ \"$2\" = list ]; then echo '{listing}'; exit 0; fi\n"
            f'echo "{name} $@" >> {self.log}\nexit {status}\n'
        )
        script.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def condas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Condas:
    monkeypatch.chdir(tmp_path)
    return Condas(tmp_path, monkeypatch)


def algorithm(root: Path, text: str, name: str = "tiny") -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "environment.yaml").write_text(text)
    return root


FILE = ALGORITHMS / NAME / "environment.yaml"


def test_the_algorithms_file_is_read() -> None:
    environment = read_environment(FILE, NAME)
    assert NAME in algorithm_names()
    assert (environment.name, environment.python, environment.conda_only) == (NAME, "3.11", ())
    assert any(line.startswith("torch>=") for line in environment.pip)


def test_a_wrong_name_lists_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["saliency-unlearn"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"there are: {', '.join(algorithm_names())}. Did you mean {NAME!r}?" in said


@pytest.mark.parametrize("name", ["../saliency_unlearning", "", "configs", "."])
def test_only_the_folder_of_an_algorithm_is_a_name(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match="no algorithm"):
        find_environment(name)


@pytest.mark.parametrize("name", algorithm_names())
def test_every_method_has_an_environment_under_its_own_name(
    condas: Condas, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    condas.add("conda")
    assert main([name]) == 0
    file = find_environment(name)
    assert condas.calls == [
        f"conda env create -n {name} -f {file}",
        f"conda run -n {name} python -m pip install {SOURCE}",
    ]
    assert main([name, "--backend", "venv", "--python", sys.executable, "--dry_run"]) == 0
    assert f"/.venv-{name}" in capsys.readouterr().out


def test_a_new_method_needs_no_environment_of_its_own(
    condas: Condas, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is hard-coded: a folder that is a package is a method, and the file for all is taken."""
    root = algorithm(tmp_path / "root", "name: other\ndependencies: [python]\n", "with_own")
    for name in ("erase", "no_package"):
        (root / name).mkdir()
    (root / "erase/__init__.py").write_text("")
    assert algorithm_names(root) == ["with_own"]
    (root / "environment.yaml").write_text((ALGORITHMS / "environment.yaml").read_text())
    assert algorithm_names(root) == ["erase", "with_own"]
    condas.add("mamba")
    assert main(["erase", "--dry_run"], root=root) == 0
    assert f"mamba env create -n erase -f {root}/environment.yaml" in capsys.readouterr().out
    assert main(["with_own", "--dry_run"], root=root) == 0
    assert f"mamba env create -n other -f {root}/with_own/environment.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eraze"], root=root)
    assert "Did you mean 'erase'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "create"),
    [
        ("conda", "env create -n saliency_unlearning -f"),
        ("mamba", "env create -n saliency_unlearning -f"),
        ("micromamba", "create -y -n saliency_unlearning -f"),
    ],
)
def test_each_conda_makes_the_environment_and_installs_the_package(
    condas: Condas, capsys: pytest.CaptureFixture[str], backend: str, create: str
) -> None:
    condas.add(backend)
    assert main([NAME]) == 0
    assert condas.calls == [
        f"{backend} {create} {FILE}",
        f"{backend} run -n {NAME} python -m pip install {SOURCE}",
    ]
    assert f"{backend} activate {NAME}" in capsys.readouterr().out


def test_auto_takes_the_quickest_and_a_named_backend_is_kept_to(condas: Condas) -> None:
    condas.add("conda")
    condas.add("mamba")
    assert main([NAME]) == 0
    assert main([NAME, "--backend", "conda"]) == 0
    assert [call.split()[0] for call in condas.calls] == ["mamba"] * 2 + ["conda"] * 2


def test_a_conda_that_is_only_a_shell_function_is_found(
    condas: Condas, monkeypatch: pytest.MonkeyPatch
) -> None:
    condas.add("conda")
    monkeypatch.setenv("CONDA_EXE", str(condas.folder / "conda"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([NAME]) == 0
    assert len(condas.calls) == 2


def test_without_any_conda_venv_is_offered(condas: Condas, capsys: pytest.CaptureFixture[str]) -> None:
    assert condas.calls == []
    assert main([NAME]) == 1
    assert "--backend venv" in capsys.readouterr().err
    assert main([NAME, "--backend", "mamba"]) == 1
    assert "mamba is not on PATH" in capsys.readouterr().err


def test_an_existing_conda_environment_is_not_touched_without_force(
    condas: Condas, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"envs/{NAME}/conda-meta").mkdir(parents=True)
    condas.add("conda", envs=(str(tmp_path), str(tmp_path / "envs" / NAME)))
    assert main([NAME]) == 1
    assert condas.calls == []
    assert "exists already, and was not touched. --force" in capsys.readouterr().err
    assert main([NAME, "--force"]) == 0
    assert condas.calls[0] == f"conda env remove -y -n {NAME}"
    assert len(condas.calls) == 3


def test_force_deletes_no_folder_that_is_not_an_environment(condas: Condas, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years")
    condas.add("conda")
    for backend in ("conda", "venv"):
        assert main([NAME, "--backend", backend, "--prefix", "home", "--force"]) == 1
    assert (tmp_path / "home/thesis.tex").read_text() == "years"
    assert condas.calls == []


def test_a_failing_conda_is_an_error(condas: Condas, capsys: pytest.CaptureFixture[str]) -> None:
    condas.add("conda", status=3)
    assert main([NAME, "--path", "here"]) == 1
    assert len(condas.calls) == 1
    assert "failed with exit status 3" in capsys.readouterr().err


def test_a_dry_run_prints_and_runs_nothing(
    condas: Condas, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    condas.add("micromamba")
    assert main([NAME, "--dry_run"]) == 0
    assert main([NAME, "--backend", "venv", "--python", sys.executable, "--dry_run"]) == 0
    assert condas.calls == []
    assert not (tmp_path / f".venv-{NAME}").exists()
    out = capsys.readouterr().out
    assert f"-m venv {tmp_path}/.venv-{NAME}" in out
    assert "'torch>=2.8'" in out
    assert f"source {tmp_path}/.venv-{NAME}/bin/activate" in out


def test_a_tilde_is_the_home_folder(
    condas: Condas, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "python").symlink_to(sys.executable)
    argv = [NAME, "--backend=venv", "--prefix=~/env", "--python=~/python", "--dry_run"]
    assert main(argv) == 0
    assert f"{tmp_path}/python -m venv " in (out := capsys.readouterr().out)
    assert f"source {tmp_path}/env/bin/activate" in out
    condas.add("micromamba")
    assert main([NAME, "--prefix", "~/env", "--dry_run"]) == 0
    assert f"-p {tmp_path}/env" in capsys.readouterr().out


def test_a_venv_is_made_for_real_kept_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without packages, and without this one, so that nothing is installed."""
    root = algorithm(tmp_path, f"name: tiny\ndependencies:\n  - python={VERSION}\n  - pip\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mu.commands.create_env.package_source", lambda: None)
    # The first venv's pip is never used here, and takes most of the time.
    monkeypatch.setattr("mu.commands.backends.VENV_OPTIONS", ("--without-pip",))
    assert main(["tiny", "--backend", "venv"], root=root) == 0
    made = tmp_path / ".venv-tiny"
    assert os.access(made / "bin/python", os.X_OK)
    assert "source " in capsys.readouterr().out
    (made / "mine").write_text("")
    assert main(["tiny", "--backend", "venv"], root=root) == 1
    assert (made / "mine").exists()
    assert main(["tiny", "--backend", "venv", "--force"], root=root) == 0
    assert not (made / "mine").exists()
    assert (made / "pyvenv.cfg").is_file()
    (root / "tiny/environment.yaml").write_text("name: tiny\ndependencies: [{pip: ['x==1']}]\n")
    (made / "mine").write_text("")
    assert main(["tiny", "--backend", "venv", "--force"], root=root) == 1  # there is no pip in it
    assert (made / "mine").exists()
    assert [path.name for path in tmp_path.iterdir() if "old" in path.name] == []


def test_a_python_of_another_version_is_refused_unless_it_is_asked_for(
    condas: Condas, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = algorithm(tmp_path / "root", "name: tiny\ndependencies: [python=3.99.*]\n")
    command = ["tiny", "--backend", "venv", "--dry_run"]
    assert main(command, root=root) == 1
    assert "asks for Python 3.99; this one is" in capsys.readouterr().err
    assert main([*command, "--python", sys.executable], root=root) == 0
    assert "note: environment.yaml asks for Python 3.99" in capsys.readouterr().out
    assert condas.calls == []


def test_a_package_that_only_conda_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = algorithm(tmp_path, "name: tiny\ndependencies: [python, cudatoolkit=12]\n")
    assert main(["tiny", "--backend", "venv", "--prefix", str(tmp_path / "e")], root=root) == 1
    assert "cudatoolkit=12, which only conda installs" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1]", "name: x", "name: x\ndependencies: [3]", "name: [\n"])
def test_a_malformed_file_is_an_error(tmp_path: Path, text: str) -> None:
    root = algorithm(tmp_path, text)
    with pytest.raises(EnvironmentProblem, match=r"environment\.yaml"):
        read_environment(root / "tiny/environment.yaml", "tiny")


def test_the_package_is_installed_from_this_checkout() -> None:
    assert package_source() == SOURCE
