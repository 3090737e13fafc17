"""Encoded images and prompts, and what diffusion draws from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mu.datasets.index import Row
from mu.datasets.streams import draw
from mu.ldm.latent_diffusion import sample_posterior


@dataclass(frozen=True)
class EncodedRows:
    """Rows with the moments of their images and the embeddings of their prompts, ready to be drawn from."""

    rows: tuple[Row, ...]
    slots: dict[int, int]
    """place in `rows` -> place in `mean` and `logvar`: only images that are read have been encoded."""
    mean: Tensor
    logvar: Tensor
    contexts: dict[str, Tensor]
    scale_factor: float

    def batch(
        self, wanted: Sequence[tuple[int, int]], *, seed: int, stage: str, num_timesteps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, C, h, w), timesteps (B,) and noise (B, C, h, w) of (epoch, place) pairs."""
        slots = [self.slots[place] for _, place in wanted]
        mean, logvar = self.mean[slots], self.logvar[slots]  # (B, C, h, w)
        shape = tuple(mean.shape[1:])
        draws = [
            draw(seed, stage, epoch, self.rows[place].key, shape=shape, num_timesteps=num_timesteps)
            for epoch, place in wanted
        ]
        posterior_noise = torch.stack([one.posterior_noise for one in draws])  # (B, C, h, w)
        latents = sample_posterior(mean, logvar, posterior_noise, self.scale_factor)
        timesteps = torch.tensor([one.timestep for one in draws])
        return latents, timesteps, torch.stack([one.noise for one in draws])

    def context(self, wanted: Sequence[tuple[int, int]]) -> Tensor:
        """Embeddings (B, L, D) of the prompts of (epoch, place) pairs."""
        return torch.stack([self.contexts[self.rows[place].prompt] for _, place in wanted])

    def substitute_context(self, wanted: Sequence[tuple[int, int]]) -> Tensor:
        """Embeddings (B, L, D) of the substitute prompts of (epoch, place) pairs."""
        return torch.stack([self.contexts[str(self.rows[place].substitute_prompt)] for _, place in wanted])
