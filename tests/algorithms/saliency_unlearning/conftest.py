"""A model whose losses and gradients can be written down by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CHANNELS, SIDE, WIDTH = 4, 3, 5


class LinearUNet(nn.Module):
    """prediction = dropout(signal * x) + prompt @ mean over L of the context; one parameter is never used."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.signal = nn.Parameter(torch.randn(CHANNELS, generator=generator))
        self.unused = nn.Parameter(torch.randn(3, generator=generator))
        self.prompt = nn.Parameter(torch.randn(CHANNELS, WIDTH, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        shift = torch.einsum("cd,bd->bc", self.prompt, context.mean(1))  # (B, C)
        return self.dropout(self.signal[:, None, None] * x) + shift[:, :, None, None]  # (B, C, H, W)


class LinearModel(nn.Module):
    """Stands in for `LatentDiffusion`: z_t = 0.8 z + (0.6 + t / 1000) eps. Notes the contexts it is called with."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.unet = LinearUNet(torch.Generator().manual_seed(seed))
        self.first_stage_model = nn.Linear(2, 2)
        self.calls: list[tuple[Tensor, bool]] = []

    def q_sample(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        return 0.8 * latents + (0.6 + timesteps.view(-1, 1, 1, 1) / 1000) * noise

    def predict_noise(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        assert len(noisy_latents) == len(timesteps) == len(context)
        self.calls.append((context.detach(), torch.is_grad_enabled()))
        return self.unet(noisy_latents, context)


def linear_batch(images: int, lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    timesteps = torch.randint(0, 1000, (images,), generator=generator)
    latents, noise = normal(images, CHANNELS, SIDE, SIDE), normal(images, CHANNELS, SIDE, SIDE)
    return latents, timesteps, noise, *(normal(images, length, WIDTH) for length in lengths)


@pytest.fixture
def linear_model() -> Any:
    return LinearModel()


@pytest.fixture
def make_batch() -> Callable[..., tuple[Tensor, ...]]:
    """make_batch(images, (L, L', ...), seed): latents (B, C, H, W), timesteps, noise, a context of each length."""
    return linear_batch
