"""What the networks predict, as the losses take it: two predictions in one call where the shapes allow it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Predictor(Protocol):
    """What the losses need of a target model: `mu.ldm.LatentDiffusion`, or something that stands in for it."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor: ...


PredictionInputs = tuple[Tensor, Tensor, Tensor]
"""noisy latents (B, C, H, W), timesteps (B,), context (B, L, D)."""


def predict_pair(
    model: Predictor, first: PredictionInputs, second: PredictionInputs
) -> tuple[Tensor, Tensor]:
    """Two predictions (B, C, H, W), (B', C, H, W) in one call where the shapes allow it, else in two."""
    if any(a.shape[1:] != b.shape[1:] for a, b in zip(first, second, strict=True)):
        return model.predict(*first), model.predict(*second)
    joined = (torch.cat(pair) for pair in zip(first, second, strict=True))  # (B + B', ...) each
    both = model.predict(*joined)  # (B + B', C, H, W)
    return both[: len(first[0])], both[len(first[0]) :]
