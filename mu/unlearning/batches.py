"""What a training step reads: batches by step, each a pure function of (seed, step) and the data.

Random numbers follow `mu.datasets.streams`: timestep, noise and posterior sample of an image are a function of (seed,
stage, epoch, image). Batch size, number of processes and the step at which a run is resumed change none of them. The
stages are "mask" (whose epochs are its draws an image), "forget", "retain" (whose epochs are passes of its own over the
images to retain) and "validation".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from mu import ranks
from mu.datasets.encoded import EncodedRows
from mu.datasets.streams import order, passes

VALIDATION_DRAWS = 32
"""Of image, timestep and noise, for each of the two losses of a validation."""

Part = tuple[Tensor, ...]
"""Tensors of the same images, along their first dimension: a NamedTuple such as `ForgetBatch`."""
P = TypeVar("P", bound=Part)


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
    """(B, L', D), of what they are compared with: the substitute prompts in training, the empty prompt for the mask."""


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


class EncodedBatches:
    """The batches of images to forget and to retain.

    An epoch is one shuffled pass over the rows to forget; its last batch may be short. The rows to retain run
    through shuffled passes of their own, without a break between passes, so their batch is always full.
    """

    def __init__(
        self,
        forget: EncodedRows,
        retain: EncodedRows,
        *,
        seed: int,
        epochs: int,
        batch_size: int,
        retain_batch_size: int,
        num_timesteps: int,
    ) -> None:
        self.forget = forget
        self.retain = retain
        self.seed = seed
        self.batch_size = batch_size
        self.retain_batch_size = retain_batch_size
        self.num_timesteps = num_timesteps
        self.steps_per_epoch = math.ceil(len(forget.rows) / batch_size)
        self.total_steps = epochs * self.steps_per_epoch

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return self.batch_size, self.retain_batch_size

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is not in 0..{self.total_steps - 1}")
        epoch, number = divmod(step, self.steps_per_epoch)
        places = order(self.seed, "forget", epoch, len(self.forget.rows))
        first = number * self.batch_size
        forget = [(epoch, place) for place in places[first : first + self.batch_size]]
        first = step * self.retain_batch_size
        stop = first + self.retain_batch_size
        retain = list(passes(self.seed, "retain", len(self.retain.rows), start=first, stop=stop))
        drawn = [
            rows.batch(wanted, seed=self.seed, stage=stage, num_timesteps=self.num_timesteps)
            for rows, wanted, stage in ((self.forget, forget, "forget"), (self.retain, retain, "retain"))
        ]
        return Batch(
            ForgetBatch(*drawn[0], self.forget.context(forget), self.forget.substitute_context(forget)),
            RetainBatch(*drawn[1], self.retain.context(retain)),
            {
                "forget": [str(self.forget.rows[place].image) for _, place in forget],
                "retain": [str(self.retain.rows[place].image) for _, place in retain],
            },
        )

    def validation(self, draws: int = VALIDATION_DRAWS) -> list[Batch]:
        """Images evenly from those to forget and to retain, timesteps evenly over the schedule, noise of its own."""
        spaced = [(2 * i + 1) * self.num_timesteps // (2 * draws) for i in range(draws)]
        # In another order than the images, which are sorted by concept.
        timesteps = torch.tensor([spaced[i] for i in order(self.seed, "validation", 0, draws)])  # (draws,)
        forget, retain = _spread(self.forget, draws), _spread(self.retain, draws)
        batches = []
        for first in range(0, draws, self.batch_size):
            part = slice(first, first + self.batch_size)
            drawn = []
            for rows, wanted in ((self.forget, forget[part]), (self.retain, retain[part])):
                latents, _, noise = rows.batch(
                    wanted, seed=self.seed, stage="validation", num_timesteps=self.num_timesteps
                )  # (B, C, h, w), (B,), (B, C, h, w)
                drawn.append((latents, timesteps[part], noise, rows.context(wanted)))
            substitute = self.forget.substitute_context(forget[part])
            batches.append(Batch(ForgetBatch(*drawn[0], substitute), RetainBatch(*drawn[1])))
        return batches


def _spread(rows: EncodedRows, draws: int) -> list[tuple[int, int]]:
    """(epoch, place) of so many draws, evenly over the encoded rows; with fewer rows, each in several epochs."""
    places = sorted(rows.slots)
    count = min(draws, len(places))
    chosen = [places[i * len(places) // count] for i in range(count)]
    return [(i // count, chosen[i % count]) for i in range(draws)]
