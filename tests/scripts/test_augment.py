"""Augmentation on white: what moves, by how much, and that the same seed moves it the same way."""

from __future__ import annotations

import augment as augment_module
import pytest
import torch
from augment import augment
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def black_square(count: int = 1) -> Tensor:
    """A black square in the middle of white, half the side wide."""
    images = torch.ones(count, 3, 64, 64)
    images[:, :, 16:48, 16:48] = -1
    return images


def centres(images: Tensor) -> Tensor:
    """Centre of the dark of each image, (N, 2) as (x, y) from the middle, in parts of the side."""
    dark = (1 - images.mean(dim=1)) / 2
    size = images.shape[-1]
    place = (torch.arange(size) + 0.5) / size - 0.5
    mass = dark.sum(dim=(1, 2))
    return torch.stack([(dark.sum(1) * place).sum(1), (dark.sum(2) * place).sum(1)], dim=1) / mass[:, None]


def test_white_stays_white_and_the_range_is_kept() -> None:
    assert torch.allclose(augment(torch.ones(8, 3, 64, 64), generator(), 32), torch.ones(8, 3, 32, 32))
    moved = augment(torch.full((8, 3, 64, 64), -1.0), generator(), 32)
    assert -1.0001 <= moved.min() < -0.99
    assert moved.max() <= 1.0001


def test_a_seed_gives_the_same_result_and_images_move_apart() -> None:
    first = augment(black_square(2), generator(3), 32)
    assert torch.equal(first, augment(black_square(2), generator(3), 32))
    assert not torch.allclose(first[0], first[1], atol=0.1)
    assert not torch.allclose(first, augment(black_square(2), generator(4), 32), atol=0.1)


def test_shift_and_scale_stay_within_their_bounds_and_fill_them() -> None:
    moved = augment(black_square(400), generator(), 32)
    shift = centres(moved)
    assert shift.abs().max() <= 0.06 + 1e-3
    assert shift.abs().amax(dim=0).min() > 0.055
    assert shift.mean(dim=0).abs().max() < 0.01
    # the square covers a quarter of the image, times the scale squared
    scale = ((1 - moved.mean(dim=(1, 2, 3))) / 2 / 0.25).sqrt()
    assert scale.min() >= 0.85 - 5e-3
    assert scale.max() <= 1.1 + 5e-3
    assert scale.min() < 0.86
    assert scale.max() > 1.09


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flip_mirrors_left_and_right(probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "SCALE", (1.0, 1.0))
    monkeypatch.setattr(augment_module, "SHIFT", 0.0)
    monkeypatch.setattr(augment_module, "ROTATION_DEGREES", 0.0)
    monkeypatch.setattr(augment_module, "FLIP_PROBABILITY", probability)
    image = torch.rand(1, 3, 32, 32, generator=generator())
    expected = image.flip(3) if probability else image
    torch.testing.assert_close(augment(image, generator(), 32), expected, atol=1e-5, rtol=0)


def test_reduction_averages_so_that_fine_stripes_turn_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SCALE": (1.0, 1.0), "SHIFT": 0.0, "ROTATION_DEGREES": 0.0}.items():
        monkeypatch.setattr(augment_module, name, value)
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    torch.testing.assert_close(
        augment(stripes, generator(), 32), torch.zeros(1, 3, 32, 32), atol=1e-4, rtol=0
    )


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), not \(3, 64, 64\)"):
        augment(torch.ones(3, 64, 64), generator())
