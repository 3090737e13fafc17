"""Images to forget and to retain, from a config to batches: listed, sampled where they are missing, encoded once."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mu import ranks
from mu.datasets.data_sets import data_set_of
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.index import DataError, ForgetRetain, Row, concept_label, write_index_files
from mu.datasets.latents import LatentCache
from mu.datasets.seen_prompts import check_seen_apart
from mu.datasets.streams import passes
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.params import LatentDiffusionParams
from mu.unlearning.batches import EncodedBatches, EncodedRows

SAMPLE_BATCH = 16  # images sampled at once; of no consequence to what is sampled

_log = logging.getLogger(__name__)


class ImageData:
    """What a method with images trains on, made from its config: a `mu.unlearning.method.TrainingData`.

    Images that a run will not read are neither sampled nor encoded. Below `processed_dataset_dir` there are
    `generated/` and `generated_prompts/` (sampled images), `latents/<dataset>/` (see `LatentCache`) and
    `index/<dataset>/<template>-<template_name>/{forget,retain}/` with images.txt and prompts.txt (and, for forget,
    substitutes.txt), one a line and in the same order: the rows this run reads.

    Args:
        config: with the keys of `ImageTrainingKeys`, and `retain_batch_size` where images are retained.
        model: in eval mode, as it was loaded.
        rows: all rows, where a plan has listed them already and no image is sampled.
        reference_prompt: what `ForgetBatch.reference_context` is the embedding of; None: of each image's own
            substitute prompt.
        retain: False for a method without a retain term: its batches have images to forget alone.

    Raises:
        DataError: the data set cannot serve this config; see the message.
    """

    def __init__(
        self,
        config: Any,
        model: LatentDiffusion,
        *,
        rows: ForgetRetain | None = None,
        reference_prompt: str | None = None,
        retain: bool = True,
    ) -> None:
        self.config = config
        self.model = model
        self.reference_prompt = reference_prompt
        self.retain = retain
        self.image_size = checked_image_size(config.image_size, model)
        self._generated: GeneratedImages | None = None
        if (sampled := sampled_images(config, self.image_size)) is not None:
            settings, kind = sampled
            self._generated = GeneratedImages(model, config.processed_dataset_dir, settings, **kind)
        folder = None if self._generated is None else self._generated.path
        self._name = data_set_of(config).cache_name(folder)
        self.rows = ranks.on_main(
            lambda: checked_rows(config, folder, model.params) if rows is None or folder else rows
        )
        """All rows to forget and to retain, whether this run reads them or not."""

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
    def encoded_forget(self) -> EncodedRows:
        """The images to forget; samples and encodes what is still missing."""
        return self._encoded(self.rows.forget, range(len(self.rows.forget)), "forget")

    @cached_property
    def train_batches(self) -> EncodedBatches:
        """The training batches by step; samples and encodes what is still missing."""
        config, retain, retain_batch_size = self.config, None, 0
        if self.retain:
            retain = self._encoded(self.rows.retain, retained_places(config, self.rows), "retain")
            retain_batch_size = config.retain_batch_size or config.batch_size
        return EncodedBatches(
            self.encoded_forget,
            retain,
            seed=config.seed,
            epochs=config.epochs,
            batch_size=config.batch_size,
            retain_batch_size=retain_batch_size,
            num_timesteps=self.model.num_timesteps,
            reference_prompt=self.reference_prompt,
        )

    @cached_property
    def _cache(self) -> LatentCache:
        folder = Path(self.config.processed_dataset_dir) / "latents" / self._name
        return LatentCache(self.model, folder, image_size=self.image_size)

    def _encoded(self, rows: tuple[Row, ...], places: Sequence[int], part: str) -> EncodedRows:
        """The rows at `places`, sampled where they are missing, encoded and listed; `part` is "forget" or "retain"."""
        # 1. Sample.
        used = [rows[place] for place in places]
        if self._generated is not None:
            sampled = [row for row in used if row.image.is_relative_to(self._generated.path)]
            self._generated.sample_missing(sampled, batch_size=SAMPLE_BATCH)

        # 2. Encode.
        mean, logvar = self._cache.moments(used)  # each (N, C, h, w)
        prompts = [row.prompt for row in used]
        prompts += [row.substitute_prompt for row in used if row.substitute_prompt is not None]
        contexts = self._cache.contexts(["", *prompts, self.reference_prompt or ""])

        # 3. List.
        concept = f"{self.config.template}-{concept_label(self.config.template_name)}"
        folder = Path(self.config.processed_dataset_dir) / "index" / self._name / concept / part
        ranks.on_main(lambda: write_index_files(used, folder))
        _log.info("%s: %d of %d images, %d prompts", part, len(used), len(rows), len(set(prompts)))
        return EncodedRows(
            rows=rows,
            slots={place: slot for slot, place in enumerate(places)},
            mean=mean,
            logvar=logvar,
            contexts=contexts,
            scale_factor=self.model.scale_factor,
        )


def checked_rows(config: Any, sampled: Path | None, params: LatentDiffusionParams) -> ForgetRetain:
    """All rows to forget and to retain, see `DataSet.rows`; the model's text encoder can tell their prompts apart.

    Raises:
        DataError: see `DataSet.rows` and `check_seen_apart`.
    """
    rows = data_set_of(config).rows(sampled)
    check_seen_apart(rows, params)
    return rows


def training_steps(config: Any, rows: ForgetRetain) -> int:
    """Steps of a run: `epochs` passes over the images to forget."""
    return int(config.epochs) * math.ceil(max(1, len(rows.forget)) / config.batch_size)


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
    stop = training_steps(config, rows) * (config.retain_batch_size or config.batch_size)
    return sorted({place for _, place in passes(config.seed, "retain", count, start=0, stop=stop)})


def sampled_images(config: Any, image_size: int) -> tuple[SampleSettings, dict[str, str]] | None:
    """How a data set's images are sampled from the model, and where (see `GeneratedImages`); None: they are not."""
    sampled = data_set_of(config).sampled
    if sampled is None:
        return None
    settings = SampleSettings(
        steps=config.sample_steps,
        guidance_scale=config.guidance_scale,
        image_size=image_size,
        precision=config.sample_precision,
    )
    return settings, dict(sampled)


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
