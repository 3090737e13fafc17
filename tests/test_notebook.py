"""The notebook in examples/: it runs as it stands, forgets what it says, and is committed with what it showed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mu.algorithms.saliency_unlearning.configs import saliency_unlearning_train_emoji_canvas
from mu.algorithms.saliency_unlearning.masking import load_mask
from mu.config import resolve_path

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "forget_a_style.ipynb"
MOST_BYTES = 2_000_000
FIGURES = 5
UNET = "model.diffusion_model."


def outputs_of(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def text_of(outputs: list[dict[str, Any]]) -> str:
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def check_shown(notebook: dict[str, Any]) -> None:
    """Every figure is there, no cell failed, nothing was complained of, and the numbers stand in words."""
    outputs = outputs_of(notebook)
    assert not [output for output in outputs if output["output_type"] == "error"]
    said = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert not [text for text in said if "font cache" not in "".join(text)]  # which Matplotlib makes once
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES
    assert "outside the mask: 0\n" in text_of(outputs)


def test_it_is_committed_with_its_outputs() -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    check_shown(notebook)
    assert "/" not in text_of(outputs_of(notebook)).split("outputs/notebook/")[0], "a path of some machine"


@pytest.mark.slow
def test_it_runs_and_forgets(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=3600, resources=resources).execute()
    check_shown(notebook)

    # What its figures tell is in the files that its runs left.
    (evaluated,) = (tmp_path / "outputs/notebook/evaluations").glob("Noto-*/metrics.json")
    models = json.loads(evaluated.read_text(encoding="utf-8"))["models"]
    assert models["before"]["UA"]["value"] <= 0.1
    assert models["after"]["UA"]["value"] >= 0.9
    for score in ("IRA", "CRA"):
        assert models["after"][score]["value"] >= models["before"][score]["value"] - 0.1
    assert models["after"]["own"]["value"] >= 0.8

    (mask_path,) = (tmp_path / "outputs/notebook/masks").glob("*/mask_0.5.safetensors")
    (checkpoint,) = (tmp_path / "outputs/notebook/models").glob("*/model.safetensors")
    mask, new = load_mask(mask_path), load_file(checkpoint)
    old = load_file(resolve_path(saliency_unlearning_train_emoji_canvas.ckpt_path))
    assert old.keys() == new.keys()
    moved = 0
    for name, weight in old.items():
        differs = weight != new[name]
        marked = mask.get(name.removeprefix(UNET)) if name.startswith(UNET) else None
        assert not differs.any() if marked is None else not (differs & ~marked).any(), name
        moved += int(differs.sum())
    kept = sum(int(marked.sum()) for marked in mask.values())
    assert 0.9 * kept <= moved <= kept
