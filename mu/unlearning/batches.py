"""The batches of a training, by step.

Random numbers follow `mu.datasets.streams`: timestep, noise and posterior sample of an image are a function of (seed,
stage, epoch, image), and a training step is a function of (seed, step). Batch size, number of workers and the step at
which a run is resumed change none of them. The stages are "mask" (whose epochs are its draws an image), "forget" and
"retain" (whose epochs are passes of its own over the images to retain).
"""

from __future__ import annotations

import math
from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from mu.datasets.encoded import EncodedRows
from mu.datasets.streams import order, passes


class TrainBatch(TypedDict):
    """One training step; shapes as in `MaskBatch`."""

    forget: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """latents, timesteps, noise, context, substitute_context."""
    retain: tuple[Tensor, Tensor, Tensor, Tensor]
    """latents, timesteps, noise, context."""
    images: dict[str, list[str]]
    """"forget" and "retain" -> the image files of that part, for messages."""


class TrainSteps(Dataset[TrainBatch]):
    """Item `step` is the batch of that training step: a pure function of (seed, step) and the data.

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

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> TrainBatch:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is not in 0..{self.total_steps - 1}")
        epoch, number = divmod(step, self.steps_per_epoch)
        places = order(self.seed, "forget", epoch, len(self.forget.rows))
        first = number * self.batch_size
        forget = [(epoch, place) for place in places[first : first + self.batch_size]]
        first = step * self.retain_batch_size
        retain = list(
            passes(
                self.seed, "retain", len(self.retain.rows), start=first, stop=first + self.retain_batch_size
            )
        )
        return {
            "forget": (
                *self.forget.batch(forget, seed=self.seed, stage="forget", num_timesteps=self.num_timesteps),
                self.forget.context(forget),
                self.forget.substitute_context(forget),
            ),
            "retain": (
                *self.retain.batch(retain, seed=self.seed, stage="retain", num_timesteps=self.num_timesteps),
                self.retain.context(retain),
            ),
            "images": {
                "forget": [str(self.forget.rows[place].image) for _, place in forget],
                "retain": [str(self.retain.rows[place].image) for _, place in retain],
            },
        }
