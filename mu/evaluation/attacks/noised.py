"""The concept's own images as a beginning: what the model makes of them where much of them is gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mu.datasets.index import Row
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.attacks.target import Begun, Drawing, Target
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.sampler import ddim_timesteps


class Noised:
    """Target images, noised to a timestep on the way, and denoised by the model under the concept's plain prompt.

    SDEdit (Meng et al. 2022, arXiv 2108.01073, section 3), with images of what was forgotten: a model that lost the
    concept's name may still go where such an image leads it. Nothing is learnt.
    """

    def __init__(self, config: AttackConfig) -> None:
        self.config = config

    def drawings(self, target: Target) -> Iterator[Drawing]:
        """One for each of `noised_strengths`."""
        images, scale = target.learnt_from, target.model.scale_factor
        own: dict[tuple[str, str], list[int]] = {}
        for place, row in enumerate(images.rows):
            own.setdefault((row.style, row.object), []).append(place)
        everywhere = list(range(len(images.rows)))
        seeds = list(self.config.seeds)

        def place_of(row: Row) -> int:
            """The image that a row begins with: one of its own prompt's, in turn by seed; without any, one of all."""
            among = own.get((row.style, row.object), everywhere)
            return among[seeds.index(int(row.image.stem)) % len(among)]

        for strength in self.config.noised_strengths:

            def begin(rows: Sequence[Row], noise: Tensor, strength: float = strength) -> Begun:
                clean = scale * images.mean[[place_of(row) for row in rows]]  # (B, C, h, w)
                return begun(target.model, clean, noise, strength=strength, steps=self.config.sample_steps)

            yield Drawing(
                stage=f"{strength:.0%} of the steps",
                label=target.label("noised_", strength=strength, seeds=seeds),
                model=target.model,
                begin=begin,
                learnt={"strength": strength},
            )


@torch.no_grad()
def begun(model: LatentDiffusion, clean: Tensor, noise: Tensor, *, strength: float, steps: int) -> Begun:
    """Latents (B, C, h, w) noised so that the last `strength` of the DDIM steps, at least one, is left to do."""
    timesteps = ddim_timesteps(model.num_timesteps, steps)
    left = max(1, round(strength * len(timesteps)))
    if left == len(timesteps):
        return Begun(noise, 0)
    first = len(timesteps) - left
    device = model.device
    times = torch.full((len(clean),), timesteps[first], device=device)
    return Begun(model.q_sample(clean.to(device), times, noise.to(device)), first)
