"""The loss of ESD (Gandikota et al. 2023, arXiv 2303.07345, equation 6), and the noise it is taken on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mu.datasets.streams import draw, order
from mu.ldm import LatentDiffusion
from mu.ldm.latent_diffusion import Predictor, predict_pair
from mu.ldm.sampler import ddim_timesteps, sample_ddim
from mu.unlearning.batches import Batch

_VALIDATION_BATCHES = 4


class EraseBatch(NamedTuple):
    """Prompts to erase, each with the noise that an image of it begins from."""

    noise: Tensor
    """(B, C, h, w), unit normal."""
    steps_done: Tensor
    """(B,), int64: DDIM steps from that noise; the same number for all."""
    context: Tensor
    """(B, L, D), of the prompts."""
    uncond_context: Tensor
    """(B, L, D), of the empty prompt."""


class EraseBatches:
    """The batches of a run: prompts in shuffled passes, noise and steps as functions of (seed, step).

    Args:
        contexts: (N, L, D), of the prompts to erase.
        uncond_context: (L, D).
        latent_shape: (C, h, w).
        stops: DDIM steps of a whole image; a batch is sampled through 0 to stops - 1 of them.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        contexts: Tensor,
        uncond_context: Tensor,
        *,
        latent_shape: tuple[int, int, int],
        stops: int,
        seed: int,
        batch_size: int,
        total_steps: int,
    ) -> None:
        self.prompts = prompts
        self.contexts = contexts.cpu()
        self.uncond_context = uncond_context.cpu()
        self.latent_shape = latent_shape
        self.stops = stops
        self.seed = seed
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.steps_per_epoch = -(-len(prompts) // batch_size)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return (self.batch_size,)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is not in 0..{self.total_steps - 1}")
        return self._batch("esd", step)

    def validation(self) -> list[Batch]:
        """Prompts and noise of their own, stopped after steps that lie evenly over a whole image."""
        count = min(_VALIDATION_BATCHES, self.stops)
        evenly = [(2 * number + 1) * self.stops // (2 * count) for number in range(count)]
        return [self._batch("validation", number, done) for number, done in enumerate(evenly)]

    def _batch(self, stage: str, number: int, steps_done: int | None = None) -> Batch:
        count = len(self.prompts)
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        places = [order(self.seed, stage, at // count, count)[at % count] for at in positions]
        draws = [
            draw(self.seed, stage, number, str(i), shape=self.latent_shape, num_timesteps=self.stops)
            for i in range(self.batch_size)
        ]
        done = draws[0].timestep if steps_done is None else steps_done
        forget = EraseBatch(
            noise=torch.stack([one.noise for one in draws]),
            steps_done=torch.full((self.batch_size,), done),
            context=self.contexts[places],
            uncond_context=self.uncond_context.expand(self.batch_size, -1, -1),
        )
        return Batch(forget, images={"forget": [self.prompts[place] for place in places]})


class ESD:
    """E ||f(z_t, c) - (f_o(z_t, "") - eta (f_o(z_t, c) - f_o(z_t, "")))||^2, the mean over all elements.

    f is what the network predicts, the noise or v (guidance is linear, so the formula holds for both), f_o the original
    model. z_t comes from the model as it is now: it samples the prompt c with guidance, and stops at a random step.

    Args:
        original: the model as it was.
        negative_guidance: eta.
        start_guidance: classifier-free guidance of that sampling.
        ddim_steps: of a whole image.
    """

    weights: Mapping[str, float] = {"forget": 1.0}

    def __init__(
        self, original: Predictor, *, negative_guidance: float, start_guidance: float, ddim_steps: int
    ) -> None:
        self.original = original
        self.negative_guidance = negative_guidance
        self.start_guidance = start_guidance
        self.ddim_steps = ddim_steps

    def terms(self, model: LatentDiffusion, forget: EraseBatch, retain: object) -> dict[str, Tensor]:  # noqa: ARG002
        """The mean of the formula, an fp32 scalar."""
        noise, _, context, uncond_context = forget
        steps_done = int(forget.steps_done[0])
        latents = sample_ddim(
            model,
            context,
            shape=(noise.shape[1], noise.shape[2], noise.shape[3]),
            steps=self.ddim_steps,
            guidance_scale=self.start_guidance,
            uncond_context=uncond_context,
            initial_noise=noise,
            stop_after=steps_done,
        )  # z_t (B, C, h, w)
        timestep = ddim_timesteps(model.num_timesteps, self.ddim_steps)[steps_done]
        timesteps = torch.full((len(latents),), timestep, device=latents.device)  # (B,)

        with torch.no_grad():
            uncond, cond = predict_pair(
                self.original, (latents, timesteps, uncond_context), (latents, timesteps, context)
            )  # each (B, C, h, w)
            target = uncond - self.negative_guidance * (cond - uncond)
        return {"forget": F.mse_loss(model.predict(latents, timesteps, context), target)}
