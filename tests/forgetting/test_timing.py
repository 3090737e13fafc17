"""How long one of each kind of work is said to take."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.evaluation.config import EvaluateConfig
from mu.forgetting.timing import _scored_before, _seconds
from mu.ldm import LatentDiffusion


@pytest.mark.parametrize(
    ("takes", "expected"),
    [
        ([0.5, 0.1, 0.2], 0.1),  # the first one prepares
        ([2.7, 0.1, 0.2], 0.1),  # another program had the processor
        ([2.5, 2.0, 1.0], 2.0),  # long enough
        ([30.0, 1.0, 1.0], 30.0),  # a large model: once
    ],
)
def test_the_fastest_counts(takes: list[float], expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, left = [0.0], iter(takes)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(left)

    model: Any = SimpleNamespace(device=torch.device("cpu"))
    assert _seconds(work, model) == pytest.approx(expected)


def test_pictures_that_another_forgetting_has_scored_are_not_counted_again(
    tiny_model: LatentDiffusion, tmp_path: Path
) -> None:
    scores = EvaluateConfig(output_dir=str(tmp_path), seeds=(188, 288), sample_steps=2)
    settings = SampleSettings(2, scores.guidance_scale, tiny_model.image_size, scores.precision)
    there = GeneratedImages(tiny_model, tmp_path, settings, subfolder="grids").path / "Noto/Cats/288.png"
    there.parent.mkdir(parents=True)
    there.touch()
    assert _scored_before(tiny_model, scores) == 1
    with torch.no_grad():  # of another model they are not
        next(tiny_model.parameters()).add_(1)
    assert _scored_before(tiny_model, scores) == 0
