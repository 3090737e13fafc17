"""Small random changes of a drawing on white: shift, scale, rotation, flip."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = (0.85, 1.1)
SHIFT = 0.06
"""Largest shift, as a part of the image's side."""
ROTATION_DEGREES = 8.0
FLIP_PROBABILITY = 0.5


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def augment(images: Tensor, generator: torch.Generator, size: int = 64, *, strength: float = 1.0) -> Tensor:
    """Shift, scale, rotate and flip every image on its own, on white, and average it down to ``size``.

    Images larger than ``size`` give an antialiased result, so pass drawings of at least twice the size.

    Args:
        images: (N, 3, H, W) in [-1, 1], any device, floating point.
        generator: a CPU generator; one call draws the same numbers wherever the images are.
        size: side of the result, in pixels.
        strength: shrinks the ranges of scale, shift and rotation (0: flips alone).

    Returns:
        (N, 3, size, size) in [-1, 1].

    Raises:
        ValueError: ``images`` has another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), not {tuple(images.shape)}")
    count = images.shape[0]
    zoom = 1 + strength * (_uniform(count, *SCALE, generator) - 1)  # (N,)
    shift = torch.stack(
        [strength * _uniform(count, -SHIFT, SHIFT, generator) for _ in range(2)], dim=1
    )  # (N, 2)
    degrees = strength * _uniform(count, -ROTATION_DEGREES, ROTATION_DEGREES, generator)  # (N,)
    angle = degrees * (math.pi / 180)  # (N,)
    flip = torch.where(torch.rand(count, generator=generator) < FLIP_PROBABILITY, -1.0, 1.0)  # (N,)

    # affine_grid asks where each output pixel comes from, in [-1, 1]: the inverse of what happens to the drawing.
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    linear = torch.stack([flip * cos, flip * sin, -sin, cos], dim=1).view(count, 2, 2)  # (N, 2, 2)
    offset = linear @ (-2 * shift).unsqueeze(-1)  # (N, 2, 1): [-1, 1] is two sides' halves, hence 2
    inverse = torch.cat([linear, offset], dim=2).to(images)  # (N, 2, 3)
    grid = F.affine_grid(inverse, list(images.shape), align_corners=False)  # (N, H, W, 2)
    # What lies outside is white (1): sample the difference from white, which is padded with zeros.
    moved = F.grid_sample(images - 1, grid, padding_mode="zeros", align_corners=False) + 1  # (N, 3, H, W)
    return F.interpolate(moved, size=(size, size), mode="area")  # (N, 3, size, size)
