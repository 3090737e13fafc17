"""From a config and a model to batches of latents: for the mask, and for fine-tuning."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mu import ranks
from mu.datasets.data_sets import data_set_of
from mu.datasets.encoded import EncodedRows
from mu.datasets.generated_images import GeneratedImages
from mu.datasets.index import (
    ForgetRetain,
    Row,
    concept_label,
    write_index_files,
)
from mu.datasets.latents import LatentCache
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.unlearning.batches import EncodedBatches, ForgetBatch
from mu.unlearning.rows import checked_image_size, checked_rows, retained_places, sampled_images

SAMPLE_BATCH = 16  # images sampled at once; of no consequence to what is sampled

_log = logging.getLogger(__name__)


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
        self._generated: GeneratedImages | None = None
        if (sampled := sampled_images(config, self.image_size)) is not None:
            settings, kind = sampled
            self._generated = GeneratedImages(model, config.processed_dataset_dir, settings, **kind)
        folder = None if self._generated is None else self._generated.path
        self.rows = ranks.on_main(
            lambda: checked_rows(config, folder, model.params) if rows is None or folder else rows
        )
        """All rows to forget and to retain, whether this run reads them or not."""

    @property
    def mask_batch_count(self) -> int:
        """Batches that `mask_batches` yields."""
        return math.ceil(len(self.rows.forget) * self.config.draws_per_image / self.config.batch_size)

    def mask_batches(self) -> Iterator[ForgetBatch]:
        """Batches of the images to forget, `draws_per_image` draws of each, fp32 on the model's device.

        The context is that of the image's own prompt, the reference context that of "". Images are sampled and encoded
        in this call, not while the batches are taken.
        """
        return self._mask_batches(self._forget)

    def _mask_batches(self, forget: EncodedRows) -> Iterator[ForgetBatch]:
        device = next(self.model.parameters()).device
        empty = forget.contexts[""]  # (L, D)
        num_timesteps = min(self.config.num_timesteps, self.model.num_timesteps)
        for batch in self._mask_draws():
            latents, timesteps, noise = forget.batch(
                batch, seed=self.config.seed, stage="mask", num_timesteps=num_timesteps
            )
            context = forget.context(batch).to(device)
            yield ForgetBatch(
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

    @property
    def forgotten(self) -> list[str]:
        """All prompts that are forgotten."""
        return [row.prompt for row in self.rows.forget]

    @property
    def retained(self) -> list[str]:
        """All prompts that are kept."""
        return [row.prompt for row in self.rows.retain]

    def listed(self) -> list[list[tuple[str, str | None]]]:
        """What tells the rows of one run from those of another: key and substitute prompt of each."""
        return [
            [(row.key, row.substitute_prompt) for row in part]
            for part in (self.rows.forget, self.rows.retain)
        ]

    @cached_property
    def train_batches(self) -> EncodedBatches:
        """The training batches by step; samples and encodes what is still missing."""
        retain_batch_size = self.config.retain_batch_size or self.config.batch_size
        retain = self._encoded(self.rows.retain, retained_places(self.config, self.rows), "retain")
        return EncodedBatches(
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
        sampled = None if self._generated is None else self._generated.path
        return data_set_of(self.config).cache_name(sampled)

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
