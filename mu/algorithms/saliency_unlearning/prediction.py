"""Noise predictions in fp32, whatever the precision of the weights, and two of them in one call of the network."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class NoisePredictor(Protocol):
    """What the losses need of a model: `mu.ldm.LatentDiffusion`, or something that stands in for it."""

    @property
    def unet(self) -> nn.Module: ...

    def predict_noise(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor: ...


PredictionInputs = tuple[Tensor, Tensor, Tensor]
"""noisy latents (B, C, H, W), timesteps (B,), context (B, L, D)."""


def predict_noise(model: NoisePredictor, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """`model.predict_noise` on inputs cast to the dtype of the weights; returns fp32 (B, C, H, W)."""
    dtype = next(model.unet.parameters()).dtype
    return model.predict_noise(noisy_latents.to(dtype), timesteps, context.to(dtype)).float()  # (B, C, H, W)


def predict_noise_pair(
    model: NoisePredictor, first: PredictionInputs, second: PredictionInputs
) -> tuple[Tensor, Tensor]:
    """Two predictions (B, C, H, W), (B', C, H, W) in one call where the shapes allow it, else in two."""
    if any(a.shape[1:] != b.shape[1:] for a, b in zip(first, second, strict=True)):
        return predict_noise(model, *first), predict_noise(model, *second)
    joined = (torch.cat(pair) for pair in zip(first, second, strict=True))  # (B + B', ...) each
    both = predict_noise(model, *joined)  # (B + B', C, H, W)
    return both[: len(first[0])], both[len(first[0]) :]
