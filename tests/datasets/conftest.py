"""Stand-in models, and folders of drawn images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mu.ldm.latent_diffusion import LatentDiffusion
from tests.stand_in_model import build_model


@pytest.fixture
def model() -> LatentDiffusion:
    return build_model()


@pytest.fixture
def other_model() -> LatentDiffusion:
    return build_model(seed=1)


@pytest.fixture
def draw_canvas(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder <Style>/<Class>/<n>.jpg, each image of another colour."""

    def draw(styles: list[str], objects: list[str], count: int, size: int = 20) -> Path:
        root = tmp_path / "canvas"
        number = 0
        for style in styles:
            for object in objects:
                (root / style / object).mkdir(parents=True)
                for n in range(1, count + 1):
                    number += 1
                    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
                    Image.new("RGB", (size, size + 4), colour).save(root / style / object / f"{n}.jpg")
        return root

    return draw
