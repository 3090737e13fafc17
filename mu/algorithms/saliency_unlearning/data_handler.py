"""From a config and a model to batches of latents: for the mask, and for fine-tuning.

Random numbers follow `mu.datasets.streams`: timestep, noise and posterior sample of an image are a function of (seed,
stage, epoch, image), and a training step is a function of (seed, step). Batch size, number of workers and the step at
which a run is resumed change none of them. The stages are "mask" (whose epochs are its draws an image), "forget" and
"retain" (whose epochs are passes of its own over the images to retain).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mu import ranks
from mu.algorithms.saliency_unlearning.configs.data_sets import (
    DATASET_TYPES,
    plan_prompts,
    read_folder,
    samples_prompts,
)
from mu.datasets import emoji_canvas, generated, generated_prompts
from mu.datasets.encoded import EncodedRows
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_apart,
    check_choice,
    concept_label,
    write_index_files,
)
from mu.datasets.latents import LatentCache
from mu.datasets.seen_prompts import check_seen_apart
from mu.datasets.streams import order, passes
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.params import LatentDiffusionParams

SAMPLE_BATCH = 16  # images sampled at once; of no consequence to what is sampled

MaskBatch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""latents (B, C, h, w), timesteps (B,), noise (B, C, h, w), context (B, L, D), uncond_context (B, L, D)."""

_log = logging.getLogger(__name__)


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


class SaliencyUnlearnDataHandler:
    """Everything a mask or training run reads, made from its config.

    Images that a run will not read are neither sampled nor encoded. Below `processed_dataset_dir` there are
    `generated/` and `generated_prompts/` (sampled images), `latents/<dataset>/` (see `LatentCache`) and
    `index/<dataset>/<template>-<template_name>/{forget,retain}/` with images.txt and prompts.txt (and, for forget,
    substitutes.txt), one a line and in the same order: the rows this run reads.

    Args:
        config: a MaskConfig or TrainConfig.
        model: in eval mode.
        rows: all rows, where they have been listed already and no image is sampled.

    Raises:
        DataError: the data set cannot serve this config; see the message.
    """

    def __init__(self, config: Any, model: LatentDiffusion, *, rows: ForgetRetain | None = None) -> None:
        self.config = config
        self.model = model
        self.image_size = checked_image_size(config.image_size, model)
        check_choice("dataset_type", config.dataset_type, DATASET_TYPES)
        self._generated: generated.GeneratedImages | None = None
        if (sampled := sampled_images(config, self.image_size)) is not None:
            settings, kind = sampled
            self._generated = generated.GeneratedImages(model, config.processed_dataset_dir, settings, **kind)
        folder = None if self._generated is None else self._generated.path
        self.rows = ranks.on_main(
            lambda: checked_rows(config, folder, model.params) if rows is None or folder else rows
        )
        """All rows to forget and to retain, whether this run reads them or not."""

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of one pass over the rows to forget."""
        return math.ceil(len(self.rows.forget) / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Training steps of the run."""
        return int(self.config.epochs) * self.steps_per_epoch

    @property
    def mask_batch_count(self) -> int:
        """Batches that `mask_batches` yields."""
        return math.ceil(len(self.rows.forget) * self.config.draws_per_image / self.config.batch_size)

    def mask_batches(self) -> Iterator[MaskBatch]:
        """Batches of the images to forget, `draws_per_image` draws of each, fp32 on the model's device.

        The context is that of the image's own prompt, the uncond_context that of "". Images are sampled and encoded
        in this call, not while the batches are taken.
        """
        return self._mask_batches(self._forget)

    def _mask_batches(self, forget: EncodedRows) -> Iterator[MaskBatch]:
        device = next(self.model.parameters()).device
        empty = forget.contexts[""]  # (L, D)
        num_timesteps = min(self.config.num_timesteps, self.model.num_timesteps)
        for batch in self._mask_draws():
            latents, timesteps, noise = forget.batch(
                batch, seed=self.config.seed, stage="mask", num_timesteps=num_timesteps
            )
            context = forget.context(batch).to(device)
            yield (
                latents.to(device),
                timesteps.to(device),
                noise.to(device),
                context,
                empty.to(device).expand_as(context),
            )

    def mask_images(self, batch_index: int) -> list[str]:
        """The image files of that batch of `mask_batches`, for messages."""
        return [str(self.rows.forget[place].image) for _, place in self._mask_draws()[batch_index]]

    def _mask_draws(self) -> list[list[tuple[int, int]]]:
        """(number of the draw, place of the row) of each batch for the mask."""
        places = range(len(self.rows.forget))
        wanted = [(number, place) for number in range(self.config.draws_per_image) for place in places]
        size = self.config.batch_size
        return [wanted[first : first + size] for first in range(0, len(wanted), size)]

    def train_loader(self, *, start_step: int = 0, num_workers: int = 0) -> DataLoader[TrainBatch]:
        """A loader of the batches of steps start_step..total_steps-1 (all epochs in one pass), fp32 on the CPU.

        Raises:
            DataError: there is nothing to retain, or start_step is beyond the last step.
        """
        if not 0 <= start_step <= self.total_steps:
            raise DataError(f"start_step = {start_step}: this run has {self.total_steps} steps.")
        steps = self.train_steps
        return DataLoader(
            steps,
            batch_size=None,
            sampler=range(start_step, self.total_steps),
            num_workers=num_workers,
        )

    @cached_property
    def train_steps(self) -> TrainSteps:
        """The training batches by step; samples and encodes what is still missing."""
        retain_batch_size = self.config.retain_batch_size or self.config.batch_size
        retain = self._encoded(self.rows.retain, retained_places(self.config, self.rows), "retain")
        return TrainSteps(
            self._forget,
            retain,
            seed=self.config.seed,
            epochs=self.config.epochs,
            batch_size=self.config.batch_size,
            retain_batch_size=retain_batch_size,
            num_timesteps=self.model.num_timesteps,
        )

    @cached_property
    def _forget(self) -> EncodedRows:
        return self._encoded(self.rows.forget, range(len(self.rows.forget)), "forget")

    @cached_property
    def _cache(self) -> LatentCache:
        folder = Path(self.config.processed_dataset_dir) / "latents" / self._dataset_name
        return LatentCache(self.model, folder, image_size=self.image_size)

    @property
    def _dataset_name(self) -> str:
        if self.config.dataset_type != "generated" or self._generated is None:
            return str(self.config.dataset_type)
        return f"{self._generated.path.parent.name}-{self._generated.path.name}"

    def _encoded(self, rows: tuple[Row, ...], places: Sequence[int], name: str) -> EncodedRows:
        """Samples (if generated), encodes and lists the rows at `places`; `name` is "forget" or "retain"."""
        used = [rows[place] for place in places]
        if self._generated is not None:
            sampled = [row for row in used if row.image.is_relative_to(self._generated.path)]
            self._generated.sample_missing(sampled, batch_size=SAMPLE_BATCH)
        mean, logvar = self._cache.moments(used)  # each (N, C, h, w)
        prompts = [row.prompt for row in used]
        prompts += [row.substitute_prompt for row in used if row.substitute_prompt is not None]
        contexts = self._cache.contexts(["", *prompts])
        folder = Path(self.config.processed_dataset_dir) / "index" / self._dataset_name
        concept = f"{self.config.template}-{concept_label(self.config.template_name)}"
        ranks.on_main(lambda: write_index_files(used, folder / concept / name))
        _log.info("%s: %d of %d images, %d prompts", name, len(used), len(rows), len(set(prompts)))
        return EncodedRows(
            rows=rows,
            slots={place: slot for slot, place in enumerate(places)},
            mean=mean,
            logvar=logvar,
            contexts=contexts,
            scale_factor=self.model.scale_factor,
        )


def checked_rows(config: Any, sampled: Path | None, params: LatentDiffusionParams) -> ForgetRetain:
    """`rows_of`, whose prompts the model's text encoder can tell apart; see `check_seen_apart` for what is raised."""
    rows = rows_of(config, sampled)
    check_seen_apart(rows, params)
    return rows


def rows_of(config: Any, sampled: Path | None) -> ForgetRetain:
    """All rows to forget and to retain.

    Args:
        sampled: the folder of images that are sampled from the model, which need not be there; None: there are none.

    Raises:
        DataError: see `SaliencyUnlearnDataHandler`.
    """
    if sampled is None:
        return read_folder(config)
    if samples_prompts(config):
        rows = plan_prompts(config, sampled)
        if config.dataset_type != "generated":
            found = read_folder(config)
            rows = ForgetRetain(found.forget, rows.retain, found.notes)
            check_apart(rows)
        return rows
    return generated.plan_rows(
        sampled,
        styles=tuple(config.styles or emoji_canvas.STYLES),
        objects=tuple(config.objects or emoji_canvas.OBJECTS),
        template=config.template,
        template_name=config.template_name,
        images_per_prompt=config.images_per_prompt,
        retain_images_per_prompt=config.retain_images_per_prompt,
        substitute=config.substitute,
    )


def retained_places(config: Any, rows: ForgetRetain) -> list[int]:
    """Which of the rows to retain a training run reads.

    Raises:
        DataError: there is none.
    """
    count = len(rows.retain)
    if not count:
        raise DataError(
            f"there is no image to retain beside {config.template} "
            f"{concept_label(config.template_name)!r}: the data set needs other concepts (for dataset_type "
            "generated, retain_images_per_prompt >= 1)."
        )
    steps = int(config.epochs) * math.ceil(len(rows.forget) / config.batch_size)
    stop = steps * (config.retain_batch_size or config.batch_size)
    return sorted({place for _, place in passes(config.seed, "retain", count, start=0, stop=stop)})


def sampled_images(config: Any, image_size: int) -> tuple[generated.SampleSettings, dict[str, str]] | None:
    """How a data set's images are sampled from the model, and where (see `GeneratedImages`); None: they are not."""
    if config.dataset_type != "generated" and not samples_prompts(config):
        return None
    settings = generated.SampleSettings(
        steps=config.sample_steps,
        guidance_scale=config.guidance_scale,
        image_size=image_size,
        precision=config.sample_precision,
    )
    kind = {"subfolder": generated_prompts.SUBFOLDER, "prompt": generated_prompts.PROMPT}
    return settings, kind if samples_prompts(config) else {}


def checked_image_size(image_size: int | None, model: LatentDiffusion) -> int:
    """The images' side in pixels; None is the model's own.

    Raises:
        DataError: the model cannot be given such images.
    """
    size = image_size or model.image_size
    step = model.params.image_step
    if size % step:
        near = max(step, round(size / step) * step)
        raise DataError(
            f"image_size = {size} px: this model needs a multiple of {step} px, for example {near}."
        )
    return size
