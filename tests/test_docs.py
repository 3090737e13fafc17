"""What README and docs/ tell a reader to run, open or import is there, and does what they say."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mu.algorithms
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.masking import load_mask, save_mask
from mu.commands.main import main
from mu.config import keys_of, load_config
from mu.config_file import read_list
from mu.config_names import hint
from mu.evaluation.config import EvaluateConfig, SampleConfig
from mu.ldm import LatentDiffusion

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLE = "mu.algorithms.blank"
"""The method that docs/developing.md makes; it is not in the repository."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    """Named as GitHub and the site name them: small letters, hyphens for blanks, no other signs."""
    text = page.read_text(encoding="utf-8")
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        target = (page.parent / file).read_text(encoding="utf-8") if file else text
        target = re.sub(r"^```.*?^```", "", target, flags=re.M | re.S)
        headings = re.findall(r"^#+ (.*)$", target, flags=re.M)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{file or page.name} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_modules_and_files_that_exist(page: Path) -> None:
    shell = "\n".join(blocks(page, "sh"))
    for module in re.findall(r"python -m (mu[\w.]*)", shell):
        assert module.startswith(EXAMPLE) or find_spec(module) is not None
    configs = re.findall(r"--config_path (\w+/\S+)", shell)
    known = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "benchmarks").glob("*.yaml")]
    names = {
        str(path.relative_to(folder))
        for path in known
        for folder in (ROOT, ROOT / "configs")
        if folder in path.parents
    }
    assert [config for config in configs if config not in names] == []
    scripts = re.findall(r"python (scripts/\w+\.py)", shell)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    targets = re.findall(r"^make ([a-z-]+)", shell, flags=re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.M)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_in_examples_work(page: Path) -> None:
    for block in blocks(page, "python"):
        for statement in re.findall(r"^from mu\S* import (?:\([^)]*\)|[^\n]*)", block, flags=re.M):
            if not statement.startswith(f"from {EXAMPLE}"):
                exec(statement, {})


@functools.cache
def help_of(*words: str) -> str:
    """What `unlearn_diff <words> --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main([*words, "--help"]) == 0
    return told.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_console_script_are_there_with_their_flags(page: Path) -> None:
    shell = re.sub(r"\\\n\s*", "", "\n".join(blocks(page, "sh")))
    for line in re.findall(r"^unlearn_diff (.*)$", shell, flags=re.M):
        for words in line.split("&& unlearn_diff "):
            command, *rest = shlex.split(words.split("&&")[0], comments=True)
            if command.startswith("-"):
                continue
            method = rest[:2] if rest[:1] == ["--method"] else []
            told = help_of(command, *(method if command == "train" else []))
            flags = [word for word in rest[len(method) :] if word.startswith("--")]
            assert [flag for flag in flags if not re.search(rf"{flag}\b", told)] == []
            for word in rest:
                if word.startswith("["):
                    assert read_list(word) or word == "[]"


@pytest.mark.slow
def test_the_python_of_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = (block for block in blocks(ROOT / "README.md", "python") if "import mu\n" in block)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size == (64, 64)


@pytest.mark.slow
def test_images_of_ones_own_are_forgotten_as_the_page_on_data_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file and commands as they stand, on ten images of each kind; they are drawn by the bundled model."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").split("### On the bundled model")[1]
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", text.split("\n## ")[0], flags=re.M | re.S)
    (commands,) = re.findall(r"^```sh\n(.*?)^```", text.split("\n## ")[0], flags=re.M | re.S)
    monkeypatch.chdir(tmp_path)
    Path("noto_cats.yaml").write_text(settings, encoding="utf-8")
    for kind in ("cats", "dogs"):
        prompt = f"A {kind.capitalize()} image in Noto style."
        words = ["--config_path", "emoji_canvas/sample.yaml", "--prompts", prompt, "--run_name", kind]
        assert main(["sample", *words, "--seeds", "1,2,3,4,5,6,7,8,9,10", "--output_dir", "drawn"]) == 0
        shutil.copytree(f"drawn/{kind}/images", f"photos/noto_{kind}")
    for line in re.sub(r"\\\n\s*", "", commands).splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0
    (found,) = Path("outputs/saliency_unlearning/evaluations").glob("*/metrics.json")
    scores = {
        moment: {key: numbers[key]["value"] for key in ("UA", "IRA")}
        for moment, numbers in json.loads(found.read_text(encoding="utf-8"))["models"].items()
    }
    assert scores["before"]["UA"] <= 0.2, scores
    assert scores["after"]["UA"] >= 0.8, scores
    assert scores["after"]["IRA"] >= 0.8, scores


def test_the_method_that_the_page_on_developing_makes_passes_its_tests(
    tiny_model: LatentDiffusion,
    tiny_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the files as they stand on the page, in a folder that is one more of `mu.algorithms`."""
    page = ROOT / "docs/developing.md"
    (start,) = (block for block in blocks(page, "sh") if "mkdir" in block)
    (tmp_path / "configs/emoji_canvas").mkdir(parents=True)
    subprocess.run(start, shell=True, check=True, cwd=tmp_path)
    (recipe,) = blocks(page, "yaml")
    (tmp_path / "configs/emoji_canvas/blank_style.yaml").write_text(recipe, encoding="utf-8")
    files = [block.split("\n", 1) for block in blocks(page, "python") if "/algorithms/blank/" in block[:80]]
    assert len(files) == 5
    for title, text in files:
        path = tmp_path / title.removeprefix("# ")
        assert path.parent.is_dir()
        path.write_text(text, encoding="utf-8")

    monkeypatch.chdir(tmp_path / "configs")
    monkeypatch.setattr(mu.algorithms, "__path__", [*mu.algorithms.__path__, str(tmp_path / "mu/algorithms")])
    try:
        tests = runpy.run_path(str(tmp_path / "tests/algorithms/blank/test_blank.py"))
        tests["test_before_training_it_is_what_the_prompt_adds_squared"](tiny_model, amount=2.5)
        tests["test_a_run_moves_cross_attention_alone"](tiny_model, tiny_yaml, tmp_path)
        tests["test_the_recipe_can_be_carried_out"](capsys)
    finally:
        for name in [name for name in sys.modules if name.startswith(EXAMPLE)]:
            del sys.modules[name]


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_settings_of_data_sets_are_those_of_both_stages(page: str, tmp_path: Path) -> None:
    examples = [block for block in blocks(ROOT / page, "yaml") if "dataset_type" in block]
    assert examples
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        path.write_text(example, encoding="utf-8")
        for cls in (MaskConfig, TrainConfig):
            load_config(cls, config_path=path)


def test_keys_of_other_programs_lead_to_keys_that_are_there() -> None:
    text = (ROOT / "docs/start.md").read_text(encoding="utf-8").split("### Keys")[1]
    classes = (TrainConfig, EvaluateConfig, SampleConfig)
    keys = [[key.name for key in keys_of(cls)] for cls in classes]
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", text, flags=re.M)
    assert len(rows) > 25
    for elsewhere, here in rows:
        for name in re.findall(r"`(\w+)`", elsewhere):
            hints = [hint(name, known) for known in keys]
            own = [re.findall(r"Here it is '(\w+)'", said) for said in hints]
            wanted = re.findall(r"`(\w+)`", here)
            assert any(found and found[0] in wanted for found in own) or any(
                "Leave it out" in x for x in hints
            ), name


@pytest.mark.parametrize("command", [["scripts/keys_page.py"], ["-m", "benchmarks.render"]])
def test_tables_are_what_their_scripts_make(command: list[str]) -> None:
    script = [sys.executable, *command, "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_on_keys_has_every_command() -> None:
    """A table for each config class that a door is opened with."""
    doors = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mu").rglob("*.py"))
    classes = set(re.findall(r"\brun_(?:door|method)\(\s*([A-Z]\w+),", doors))
    page = (ROOT / "scripts/keys_page.py").read_text(encoding="utf-8")
    listed = set(re.findall(r'^    "\w+": \(".*", (\w+)\),$', page, flags=re.M))
    assert len(classes) >= 6
    assert listed == classes


def test_a_mask_is_read_as_the_page_on_methods_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    marked = {
        "in.weight": torch.rand((3, 5, 7), generator=generator) < 0.5,
        "in.bias": torch.rand((3,), generator=generator) < 0.9,
    }
    save_mask(marked, tmp_path / "mask_0.5.safetensors", {"concept": "Cubism"})
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks(ROOT / "docs/method.md", "python") if "safe_open" in block)
    variables: dict[str, dict[str, np.ndarray]] = {}
    exec(example, variables)
    read, own = variables["mask"], load_mask(tmp_path / "mask_0.5.safetensors")
    assert list(read) == list(own) == list(marked)
    for name, values in marked.items():
        assert np.array_equal(read[name], values.numpy())
        assert torch.equal(own[name], values)
