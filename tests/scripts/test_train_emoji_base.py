"""Retraining the bundled model without a concept: no picture of it has a part in the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from mu.datasets.emoji_canvas import OBJECTS, STYLES

ASSETS = Path(__file__).resolve().parents[2] / "mu" / "assets" / "emoji_canvas"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train_emoji_base")


def draw(root: Path, *, noto: int) -> Path:
    """Plain images; those of Noto have the brightness `noto`."""
    for s, style in enumerate(STYLES):
        for o, object_name in enumerate(OBJECTS):
            (root / style / object_name).mkdir(parents=True)
            colour = (noto, noto, noto) if style == "Noto" else (30 * s, 20 * o, 128)
            for n in range(1, 5):
                Image.new("RGB", (16, 16), colour).save(root / style / object_name / f"{n}.png")
    return root


def train(script: ModuleType, monkeypatch: pytest.MonkeyPatch, data: Path, run: Path, *flags: str) -> Path:
    argv = ["train_emoji_base.py", "--stage", "diffusion", "--data_dir", str(data), "--run_dir", str(run)]
    argv += [
        "--autoencoder_from",
        str(ASSETS),
        "--placements",
        "1",
        "--steps",
        "2",
        "--batch_size",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, *flags])
    # 84 pictures, which nothing here looks at
    monkeypatch.setattr(script, "package", lambda *_: None)
    script.main()
    return run / "diffusion.pt"


def test_no_cell_of_what_is_left_out_is_kept(script: ModuleType) -> None:
    assert script.kept_cells([]).tolist() == list(range(84))
    kept = {
        (STYLES[n // len(OBJECTS)], OBJECTS[n % len(OBJECTS)]) for n in script.kept_cells(["Noto", "Cats"])
    }
    assert kept == {(s, o) for s in STYLES for o in OBJECTS if s != "Noto" and o != "Cats"}


def test_pictures_of_what_is_left_out_have_no_part_in_the_weights(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    black, white = (draw(tmp_path / name, noto=v) for name, v in (("black", 0), ("white", 255)))
    run = tmp_path / "run"
    first = torch.load(train(script, monkeypatch, black, run, "--leave_out", "Noto"), weights_only=True)
    other = torch.load(
        train(script, monkeypatch, white, tmp_path / "other", "--leave_out", "Noto"), weights_only=True
    )
    assert first["step"] == 2
    assert first["scale_factor"] == pytest.approx(other["scale_factor"])
    assert all(torch.equal(first["model"][name], value) for name, value in other["model"].items())

    with pytest.raises(SystemExit, match=r"diffusion\.pt is of --leave_out Noto"):
        train(script, monkeypatch, black, run)
