"""Which images and prompts a config means: rows to forget and to retain, before anything is sampled or encoded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mu.datasets.data_sets import data_set_of
from mu.datasets.generated_images import SampleSettings
from mu.datasets.index import DataError, ForgetRetain, concept_label
from mu.datasets.seen_prompts import check_seen_apart
from mu.datasets.streams import passes
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.params import LatentDiffusionParams


def checked_rows(config: Any, sampled: Path | None, params: LatentDiffusionParams) -> ForgetRetain:
    """All rows to forget and to retain, see `DataSet.rows`; the model's text encoder can tell their prompts apart.

    Raises:
        DataError: see `DataSet.rows` and `check_seen_apart`.
    """
    rows = data_set_of(config).rows(sampled)
    check_seen_apart(rows, params)
    return rows


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
