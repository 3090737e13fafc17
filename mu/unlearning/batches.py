"""What a training step reads: batches by step, each a pure function of (seed, step) and the data.

Random numbers follow `mu.datasets.streams`: timestep, noise and posterior sample of an image are a function of (seed,
stage, epoch, image). Batch size, number of processes and the step at which a run is resumed change none of them. The
stages are "mask" (whose epochs are its draws an image), "forget", "retain" (whose epochs are passes of its own over the
images to retain) and "validation".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from mu import ranks
from mu.datasets.index import Row
from mu.datasets.streams import draw, order, passes
from mu.ldm.latent_diffusion import sample_posterior

VALIDATION_DRAWS = 32
"""Of image, timestep and noise, for each of the two losses of a validation."""

Part = tuple[Tensor, ...]
"""Tensors of the same images, along their first dimension: a NamedTuple such as `ForgetBatch`."""
P = TypeVar("P", bound=Part)
Places = Sequence[tuple[int, int]]
"""(epoch, place of the row) of each image of a batch."""


class ForgetBatch(NamedTuple):
    """Images to forget, for a training step or for the mask."""

    latents: Tensor
    """(B, C, h, w), clean and scaled."""
    timesteps: Tensor
    """(B,)"""
    noise: Tensor
    """(B, C, h, w)"""
    context: Tensor
    """(B, L, D), of the forgotten prompts."""
    reference_context: Tensor
    """(B, L', D), of what they are compared with, such as the substitute prompts, or the empty one."""


class RetainBatch(NamedTuple):
    """Images to retain; shapes as in `ForgetBatch`."""

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    context: Tensor


class Batch(NamedTuple):
    """One training step. Both parts are NamedTuples of tensors whose first dimension counts images."""

    forget: Any
    """For SalUn a `ForgetBatch`; another method may need other tensors."""
    retain: Any | None = None
    """For SalUn a `RetainBatch`; None for a method without a retain set."""
    images: Mapping[str, Sequence[str]] = {}
    """"forget" and "retain" -> what the images of that part are called, for messages."""


class Batches(Protocol):
    """The batches of a training run."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Images in each part of a whole batch."""
        ...

    def __getitem__(self, step: int) -> Batch:
        """That of a step, 0..total_steps-1, on the CPU; the same whenever it is asked for, in every process."""
        ...

    def validation(self) -> Sequence[Batch]:
        """Fixed batches that are not trained on; none where a method has none."""
        ...


def on_device(part: P, device: torch.device) -> P:
    """The same tensors on a device."""
    return _like(part, [tensor.to(device, non_blocking=True) for tensor in part])


def pieces(parts: Sequence[P], size: int | None) -> Iterator[list[tuple[P, int]]]:
    """This process' share of the parts of a batch, in pieces of at most `size` images; None: in one.

    Every process gets as many pieces. Where a part has no image left for a piece, its first one stands in and counts
    as 0 images.

    Yields:
        For each part its piece, and how many images count in it.
    """
    counts = [len(part[0]) for part in parts]
    most = ranks.largest_share(max(counts))
    for first in range(0, most, size or most):
        mine = ranks.within_share(first, size or most)
        numbers = [len(range(count)[mine]) for count in counts]
        yield [
            (_like(part, [tensor[mine if number else slice(0, 1)] for tensor in part]), number)
            for part, number in zip(parts, numbers, strict=True)
        ]


def _like(part: P, tensors: list[Tensor]) -> P:
    return type(part)(*tensors)


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
        self, wanted: Places, *, seed: int, stage: str, num_timesteps: int
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

    def context(self, wanted: Places) -> Tensor:
        """Embeddings (B, L, D) of the prompts of (epoch, place) pairs."""
        return torch.stack([self.contexts[self.rows[place].prompt] for _, place in wanted])

    def reference_context(self, wanted: Places, prompt: str | None) -> Tensor:
        """Embeddings (B, L, D) of one prompt for all of them; None: of each row's own substitute prompt."""
        prompts = [
            prompt if prompt is not None else self.rows[place].substitute_prompt for _, place in wanted
        ]
        return torch.stack([self.contexts[str(prompt)] for prompt in prompts])

    def images(self, wanted: Places) -> list[str]:
        """Their files, for messages."""
        return [str(self.rows[place].image) for _, place in wanted]


class EncodedBatches:
    """The batches of images to forget, and of those to retain where a method has some.

    An epoch is one shuffled pass over the rows to forget; its last batch may be short. The rows to retain run
    through shuffled passes of their own, without a break between passes, so their part is always full.

    Args:
        reference_prompt: see `EncodedRows.reference_context`.
        retain: None: batches have no part to retain, and `retain_batch_size` is of no effect.
    """

    def __init__(
        self,
        forget: EncodedRows,
        retain: EncodedRows | None,
        *,
        seed: int,
        epochs: int,
        batch_size: int,
        retain_batch_size: int,
        num_timesteps: int,
        reference_prompt: str | None = None,
    ) -> None:
        self.forget = forget
        self.retain = retain
        self.seed = seed
        self.batch_size = batch_size
        self.retain_batch_size = retain_batch_size
        self.num_timesteps = num_timesteps
        self.reference_prompt = reference_prompt
        self.steps_per_epoch = math.ceil(len(forget.rows) / batch_size)
        self.total_steps = epochs * self.steps_per_epoch

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return (self.batch_size,) if self.retain is None else (self.batch_size, self.retain_batch_size)

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is not in 0..{self.total_steps - 1}")
        # 1. Which images.
        epoch, number = divmod(step, self.steps_per_epoch)
        places = order(self.seed, "forget", epoch, len(self.forget.rows))
        first = number * self.batch_size
        forget = [(epoch, place) for place in places[first : first + self.batch_size]]
        images = {"forget": self.forget.images(forget)}
        retain: Places = []
        if self.retain is not None:
            first = step * self.retain_batch_size
            stop = first + self.retain_batch_size
            retain = list(passes(self.seed, "retain", len(self.retain.rows), start=first, stop=stop))
            images["retain"] = self.retain.images(retain)

        # 2. What diffusion draws of them.
        return self._batch(forget, retain, stages=("forget", "retain"))._replace(images=images)

    def validation(self, draws: int = VALIDATION_DRAWS) -> list[Batch]:
        """Images evenly from those to forget and to retain, timesteps evenly over the schedule, noise of its own."""
        spaced = [(2 * i + 1) * self.num_timesteps // (2 * draws) for i in range(draws)]
        # In another order than the images, which are sorted by concept.
        timesteps = torch.tensor([spaced[i] for i in order(self.seed, "validation", 0, draws)])  # (draws,)
        forget = _spread(self.forget, draws)
        retain: Places = _spread(self.retain, draws) if self.retain is not None else []
        batches = []
        for first in range(0, draws, self.batch_size):
            part = slice(first, first + self.batch_size)
            stages = ("validation", "validation")
            batches.append(self._batch(forget[part], retain[part], stages=stages, timesteps=timesteps[part]))
        return batches

    def _batch(
        self, forget: Places, retain: Places, *, stages: tuple[str, str], timesteps: Tensor | None = None
    ) -> Batch:
        """With the draws of these stages; `timesteps` stand in the place of those drawn."""

        def drawn(rows: EncodedRows, wanted: Places, stage: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            latents, times, noise = rows.batch(
                wanted, seed=self.seed, stage=stage, num_timesteps=self.num_timesteps
            )
            return latents, times if timesteps is None else timesteps, noise, rows.context(wanted)

        reference = self.forget.reference_context(forget, self.reference_prompt)
        return Batch(
            ForgetBatch(*drawn(self.forget, forget, stages[0]), reference),
            RetainBatch(*drawn(self.retain, retain, stages[1])) if self.retain is not None else None,
        )


def _spread(rows: EncodedRows, draws: int) -> list[tuple[int, int]]:
    """(epoch, place) of so many draws, evenly over the encoded rows; with fewer rows, each in several epochs."""
    places = sorted(rows.slots)
    count = min(draws, len(places))
    chosen = [places[i * len(places) // count] for i in range(count)]
    return [(i // count, chosen[i % count]) for i in range(draws)]
