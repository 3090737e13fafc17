"""Images from a checkpoint: prompts and seeds in, PNG files, their index and a grid out."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from mu import ranks
from mu.atomic import finish_writes, write_atomically, write_together
from mu.commands.sampling_plan import (
    Plan,
    PlannedImage,
    plan_images,
)
from mu.config import override, require_paths
from mu.datasets.images import png
from mu.datasets.seen_prompts import cut_notes
from mu.evaluation.config import SampleConfig
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion
from mu.ldm.checkpoint import fingerprint
from mu.ldm.text_to_image import SamplingError, TextToImage, sampling_precision
from mu.pictures import image_grid
from mu.run_folder import RunFolder, shared_folder
from mu.unlearning.output import model_of
from mu.verbosity import bars_off

_log = logging.getLogger(__name__)
_GRID_HEIGHT_PX = 16_384
"""A taller grid goes on in another picture: few programs open what is larger."""


def run(config: SampleConfig) -> dict[str, Any]:
    """Sample every prompt with every seed into a run folder; in one that is gone on with, those that are missing.

    The images of a batch are written together, as soon as it is done. `plan.json` says what was asked for,
    `images.csv` and `images.json` what is there, also after an interruption. With several `devices`, as many processes
    share the batches; the images are those of one process.

    Returns:
        `run`, the folder; `images`, how many of those asked for it has; `sampled`, how many of them are new; `index`,
        the path of images.csv; `grid`, the path of the (first) grid (with `grid: true`).

    Raises:
        ConfigError: a path is missing, or the folder has images of other settings.
        CheckpointError: the checkpoint cannot be read.
        SamplingError: an image has NaN or Inf; it is not written.
    """
    require_paths(config)
    return on_ranks(_run, config, config.devices)


def _run(config: SampleConfig) -> dict[str, Any]:
    """In each process of the run."""
    images = ranks.on_main(lambda: plan_images(config))
    with contextlib.closing(shared_folder(lambda: _open_folder(config))) as folder:
        for note in ranks.on_main(lambda: config.prompt_table().notes):
            _log.warning(note)
        source = ranks.on_main(config.checkpoint)  # once: in a folder of runs there may soon be a newer one
        with ranks.in_step():
            model = model_of(override(config, ckpt_path=str(source)))

        def claim() -> Mapping[str, PlannedImage]:
            plan = Plan.claim(folder, images, settings=_settings(config, model))
            folder.save_config(config)
            folder.save_environment()
            finish_writes(folder.path)
            return plan.images

        plan = Plan(folder, ranks.on_main(claim))
        for note in cut_notes(model.params, [image.prompt for image in images]):
            _log.warning(note)
        missing = ranks.from_main([image for image in images if not plan.path(image).exists()])
        if kept := len(images) - len(missing):
            _log.info("%d of %d images are there already", kept, len(images))
        try:
            with ranks.in_step():
                _sample(model, ranks.share(_batches(missing, config.batch_size)), plan, config)
        finally:
            index = plan.write_index() if ranks.is_main() else None

        def finish() -> dict[str, Any]:
            grid = {"grid": _write_grids(images, plan)} if config.grid else {}
            _log.info("%s has %d images", folder.path / "images", len(images))
            return {
                "run": folder.path,
                "images": len(images),
                "sampled": len(missing),
                "index": index,
                **grid,
            }

        return ranks.on_main(finish)


def _open_folder(config: SampleConfig) -> RunFolder:
    if config.run_name is None:
        return RunFolder.create(config.output_dir, "sample")
    return RunFolder.go_on(config.output_dir, config.run_name)


def _settings(config: SampleConfig, model: LatentDiffusion) -> dict[str, Any]:
    """All that decides how an image looks, apart from its prompt, seed and guidance."""
    return {
        "model": fingerprint(model.state_dict()),
        "sample_steps": config.sample_steps,
        "eta": config.eta,
        "image_size": config.image_size or model.image_size,
        "precision": sampling_precision(config.precision, model.device),
    }


def _batches(images: Sequence[PlannedImage], size: int) -> list[list[PlannedImage]]:
    """Those of one guidance together."""
    by_guidance: dict[float, list[PlannedImage]] = {}
    for image in images:
        by_guidance.setdefault(image.guidance_scale, []).append(image)
    return [
        group[first : first + size] for group in by_guidance.values() for first in range(0, len(group), size)
    ]


def _sample(
    model: LatentDiffusion, batches: Sequence[Sequence[PlannedImage]], plan: Plan, config: SampleConfig
) -> None:
    """Sample and write the images."""
    count = sum(map(len, batches))
    sampler = TextToImage(
        model,
        steps=config.sample_steps,
        shape=model.latent_shape(config.image_size),
        eta=config.eta,
        precision=config.precision,
    )
    with tqdm(total=count, desc="sampling", unit="image", disable=bars_off()) as progress:
        for batch in batches:
            sampled = sampler.images(
                [image.prompt for image in batch],
                guidance_scale=batch[0].guidance_scale,
                seeds=[image.seed for image in batch],
            )
            files = {}
            for image, pixels in zip(batch, sampled, strict=True):
                if not torch.isfinite(pixels).all():
                    raise SamplingError(
                        f"the image of {image.prompt!r} with seed {image.seed} contains NaN or Inf"
                    )
                files[image.file] = png(pixels)
            write_together(plan.folder.path, files)
            progress.update(len(batch))


def _write_grids(images: Sequence[PlannedImage], plan: Plan) -> Path:
    """grid.png, a row a case; grid_2.png and so on where one would be too tall. Returns the path of the first."""
    cases: dict[str, list[PlannedImage]] = {}
    for image in images:
        cases.setdefault(f"{image.case_number}\0{image.prompt}", []).append(image)
    rows = list(cases.values())
    width = max(map(len, rows))
    same_seeds = all([image.seed for image in row] == [image.seed for image in rows[0]] for row in rows)
    headings = [f"seed {rows[0][i].seed}" if same_seeds else f"image {i + 1}" for i in range(width)]
    with Image.open(plan.path(images[0])) as first:
        cell_px = max(64, first.width)
    blank = Image.new("RGB", (cell_px, cell_px), "white")
    height = max(1, _GRID_HEIGHT_PX // (cell_px + 4))
    paths = []
    for number, start in enumerate(range(0, len(rows), height)):
        page = rows[start : start + height]
        pictures = [[_opened(plan, image) for image in row] + [blank] * (width - len(row)) for row in page]
        path = plan.folder.path / ("grid.png" if number == 0 else f"grid_{number + 1}.png")
        labels = [row[0].prompt for row in page]
        content = io.BytesIO()
        image_grid(pictures, labels, headings, cell_px=cell_px).save(content, format="PNG")
        write_atomically(path, content.getvalue())
        paths.append(path)
    return paths[0]


def _opened(plan: Plan, image: PlannedImage) -> Image.Image:
    with Image.open(plan.path(image)) as opened:
        return opened.convert("RGB")
