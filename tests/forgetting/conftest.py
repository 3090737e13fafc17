"""The tiny runs of the algorithms' tests, and commands that forget in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.algorithms.saliency_unlearning.conftest import tiny_runs

__all__ = ["tiny_runs"]

QUICK = (
    "sample_steps=2",
    "guidance_scale=3",
    "train.epochs=2",
    "mask.draws_per_image=1",
    "train.lr=1e-3",
    "train.logger=none",
)
"""What makes the recipe for Stable Diffusion one of a second."""


@pytest.fixture
def quick_keys(tiny_runs: Any, tmp_path: Path) -> dict[str, Any]:
    """Keys of `forget`: an object of a tiny model, in 8 prompts; two are kept."""
    return {
        "ckpt_path": str(tiny_runs.checkpoint()),
        "model_config_path": str(tiny_runs.model_config),
        "devices": "cpu",
        "keep": ("a photo of a dog", "a drawing of a house, in ink"),
        "images": 1,
        "set": QUICK,
        "processed_dataset_dir": str(tmp_path / "processed"),
        "output_dir": str(tmp_path / "forget"),
    }
