"""Which images and prompts a config means: rows to forget and to retain, before anything is sampled or encoded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mu.datasets import emoji_canvas, generated, generated_prompts
from mu.datasets.data_sets import (
    plan_prompts,
    read_folder,
    samples_prompts,
)
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    check_apart,
    concept_label,
)
from mu.datasets.seen_prompts import check_seen_apart
from mu.datasets.streams import passes
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.params import LatentDiffusionParams


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
