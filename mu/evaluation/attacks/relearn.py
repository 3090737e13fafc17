"""Relearning: how much plain fine-tuning on a few images brings the concept back."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mu.bars import bar
from mu.datasets.streams import passes
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.attacks.target import Drawing, Target
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.memory import ADVICE, AtOnce
from mu.unlearning.batches import EncodedRows
from mu.unlearning.embedding import embedded
from mu.unlearning.inversion import Noised


class Relearn:
    """The UNet, fine-tuned on images of the concept by the diffusion loss; drawn after some numbers of steps.

    Fine-tuning brings back what was unlearned (Suriyakumar et al. 2024, arXiv 2410.08074). How soon, tells only beside
    a model that has to learn the same anew: see `relearn_other_name`.
    """

    def __init__(self, config: AttackConfig) -> None:
        self.config = config

    def drawings(self, target: Target) -> Iterator[Drawing]:
        """One for each of `relearn_steps`."""
        config = self.config
        chosen = _evenly(target.learnt_from, config.relearn_images)
        prompts = list(dict.fromkeys(row.prompt for row in chosen.rows))
        contexts = dict(zip(prompts, embedded(target.model, prompts), strict=True))
        chosen = replace(chosen, contexts=contexts)
        tuned: FineTuning | None = None
        seconds = 0.0
        for steps in config.relearn_steps:
            label = target.label("relearn_", until=steps, name=target.called)
            kept = target.kept(label)
            found = kept.read()
            if found is None or not target.is_drawn(label):
                started = time.monotonic()
                if tuned is None:
                    tuned = FineTuning(target.model, lr=config.relearn_lr, half=target.half)
                with bar("fine-tuning", total=steps, unit="steps") as shown:
                    shown.update(tuned.steps)
                    while tuned.steps < steps:
                        tuned.step(*_batch(chosen, tuned.steps, target))
                        shown.update()
                seconds += time.monotonic() - started
                kept.write({"steps": torch.tensor(steps)}, {"seconds": seconds})
            else:
                seconds = found[1]["seconds"]
            yield Drawing(
                stage=f"{steps} steps",
                label=label,
                model=target.model if tuned is None else tuned.model,
                learnt={"steps": steps, "images": len(chosen.rows), "seconds": seconds},
            )


class FineTuning:
    """A copy of a model, whose UNet moves by Adam on the plain diffusion loss (Ho et al. 2020, equation 14).

    Args:
        half: compute in bf16 by autocast; weights stay as they are.
    """

    def __init__(self, model: LatentDiffusion, *, lr: float, half: bool = False) -> None:
        shared = (model.first_stage_model, model.cond_stage_model)
        self.model = copy.deepcopy(model, {id(part): part for part in shared})
        self.steps = 0
        self._half = half
        self._weights = list(self.model.unet.requires_grad_(True).parameters())
        self._optimizer = torch.optim.Adam(self._weights, lr=lr)
        self._at_once = AtOnce("image", advice=ADVICE)

    def step(self, images: Noised, context: Tensor) -> float:
        """One step; returns its loss.

        Args:
            context: (B, L, D).
        """
        device, count = self.model.device, len(context)
        latents, times, noise, asked = (
            x.to(device) for x in (images.latents, images.timesteps, images.noise, context)
        )
        noisy = self.model.q_sample(latents, times, noise)  # (B, C, h, w)
        target = self.model.prediction_target(latents, times, noise)

        def work(places: Sequence[int]) -> tuple[float, tuple[Tensor, ...]]:
            part = slice(places[0], places[-1] + 1)
            with torch.enable_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._half):
                predicted = self.model.predict(noisy[part], times[part], asked[part])
                loss = F.mse_loss(predicted.float(), target[part]) * len(places) / count
                return float(loss.detach()), torch.autograd.grad(loss, self._weights)

        told = 0.0
        for loss, gradients in self._at_once.pieces(range(count), work):
            told += loss
            for weight, gradient in zip(self._weights, gradients, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        return told


def _batch(images: EncodedRows, step: int, target: Target) -> tuple[Noised, Tensor]:
    """The images of a step, and their contexts (B, L, D)."""
    config = target.config
    size, seed = config.relearn_batch_size, config.attack_seed
    wanted = list(passes(seed, "relearn", len(images.rows), start=step * size, stop=(step + 1) * size))
    drawn = images.batch(wanted, seed=seed, stage="relearn", num_timesteps=target.model.num_timesteps)
    return Noised(*drawn), images.context(wanted)


def _evenly(images: EncodedRows, most: int) -> EncodedRows:
    """So many of the images at most, one of each prompt before a second one of any."""
    turns: dict[str, int] = {}
    order = []
    for place, row in enumerate(images.rows):
        turns[row.prompt] = turns.get(row.prompt, -1) + 1
        order.append((turns[row.prompt], place))
    places = sorted(place for _, place in sorted(order)[:most])
    return EncodedRows(
        tuple(images.rows[place] for place in places),
        {number: number for number in range(len(places))},
        images.mean[places],
        images.logvar[places],
        {},
        images.scale_factor,
    )
