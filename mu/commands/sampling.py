"""Images from a checkpoint: prompts and seeds in, PNG files, their index and a grid out.

Which images, and what the folder has of them, comes first; then the run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mu import ranks
from mu.atomic import finish_writes, write_atomically, write_together
from mu.bars import bar
from mu.config import ConfigError, override, require_paths
from mu.datasets.images import png
from mu.datasets.seen_prompts import cut_notes
from mu.devices import peak_memory_bytes
from mu.evaluation.config import SampleConfig
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion
from mu.ldm.tensor_file import fingerprint
from mu.ldm.text_to_image import SamplingError, TextToImage, sampling_precision
from mu.pictures import image_grid, write_png
from mu.run_folder import RunFolder, shared_folder
from mu.unlearning.config import model_of
from mu.unlearning.runs import save_result

PLAN_JSON = "plan.json"
COLUMNS = ("case_number", "prompt", "evaluation_seed", "evaluation_guidance", "file")
"""Of images.csv, which is itself a table of prompts that the command takes."""
_log = logging.getLogger(__name__)
_LISTED = 5
_GRID_HEIGHT_PX = 16_384
"""A taller grid goes on in another picture: few programs open what is larger."""


# ---- which images


@dataclass(frozen=True)
class PlannedImage:
    """One image: `file` is its path below the run's folder."""

    file: str
    case_number: str
    prompt: str
    seed: int
    guidance_scale: float


def plan_images(config: SampleConfig) -> tuple[PlannedImage, ...]:
    """Every case with its own seed, or with each of `seeds`: `images/<case_number>_<seed>.png`.

    Raises:
        ConfigError: the prompts cannot be read, or two images would have one name.
    """
    images = tuple(
        PlannedImage(
            file=f"images/{case.case_number}_{seed}.png",
            case_number=case.case_number,
            prompt=case.prompt,
            seed=seed,
            guidance_scale=config.guidance_scale if case.guidance_scale is None else case.guidance_scale,
        )
        for case in config.cases()
        for seed in (config.seeds if case.seed is None else (case.seed,))
    )
    files: dict[str, PlannedImage] = {}
    for image in images:
        if files.setdefault(image.file.casefold(), image) is not image:
            raise ConfigError(
                [
                    f"prompts_path: case_number {image.case_number} with seed {image.seed} is there twice: their image "
                    "would have one name; number the cases differently"
                ]
            )
    return images


class ImageList:
    """The images that a run folder is for, of this call and of earlier ones; plan.json has them with their settings."""

    def __init__(self, folder: RunFolder, images: Mapping[str, PlannedImage]) -> None:
        self.folder = folder
        self.images = images

    @classmethod
    def claim(
        cls, folder: RunFolder, images: Sequence[PlannedImage], *, settings: Mapping[str, Any]
    ) -> ImageList:
        """Write the list, or add to the one that is there.

        Raises:
            ConfigError: the folder's images have other settings, or are others under the same names; the first
                few differences are named, and nothing is written.
        """
        path = folder.path / PLAN_JSON
        own = {image.file: image for image in images}
        known: dict[str, PlannedImage] = {}
        if path.exists():
            known = _read_list(path, settings)
            changed = [name for name, image in own.items() if known.get(name, image) != image]
            if changed:
                was, now = known[changed[0]], own[changed[0]]
                raise ConfigError(
                    [
                        f"run_name: {folder.path} has {len(changed)} of these images with another prompt or guidance, "
                        f"such as {was.file}: {was.prompt!r}, guidance {was.guidance_scale:g}, now {now.prompt!r}, "
                        f"guidance {now.guidance_scale:g}; choose another run_name"
                    ]
                )
        elif any((folder.path / name).exists() for name in own):
            raise ConfigError(
                [
                    f"run_name: {folder.path} has images but no {PLAN_JSON} that says of what; choose another run_name"
                ]
            )
        merged = {**known, **own}
        folder.save_json(
            PLAN_JSON, {"settings": dict(settings), "images": [asdict(image) for image in merged.values()]}
        )
        return cls(folder, merged)

    def path(self, image: PlannedImage) -> Path:
        """Where the image's file is, or will be."""
        return self.folder.path / image.file

    def write_index(self) -> Path:
        """images.csv and images.json: a row for each image that is there. Returns the path of the first."""
        made = [image for image in self.images.values() if self.path(image).exists()]
        self.folder.save_json(
            "images.json",
            [{"file": image.file, "prompt": image.prompt, "seed": image.seed} for image in made],
        )
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        for image in made:
            table.writerow([image.case_number, image.prompt, image.seed, image.guidance_scale, image.file])
        return write_atomically(self.folder.path / "images.csv", text.getvalue().encode())


def _read_list(path: Path, settings: Mapping[str, Any]) -> dict[str, PlannedImage]:
    """The images of an earlier call with the same settings."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        was = dict(content["settings"])
        images = [PlannedImage(**entry) for entry in content["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"run_name: {path} cannot be read ({error}); choose another run_name"]) from error
    changed = [
        f"{key} {was.get(key)}, now {value}" for key, value in settings.items() if was.get(key) != value
    ]
    if changed:
        raise ConfigError(
            [
                f"run_name: the images in {path.parent} were sampled with other settings "
                f"({'; '.join(changed[:_LISTED])}); choose another run_name"
            ]
        )
    return {image.file: image for image in images}


# ---- the run


def run(config: SampleConfig) -> dict[str, Any]:
    """Sample every prompt with every seed into a run folder; in one that is gone on with, those that are missing.

    The images of a batch are written together, as soon as it is done. `plan.json` says what was asked for,
    `images.csv` and `images.json` what is there, also after an interruption. With several `devices`, as many processes
    share the batches; the images are those of one process.

    Returns:
        `run`, the folder; `images`, how many of those asked for it has; `sampled`, how many of them are new; `index`,
        the path of images.csv; `grid`, the path of the (first) grid (with `grid: true`); `seconds`;
        `peak_memory_bytes`, of the process so far. metrics.json has the same.

    Raises:
        ConfigError: a path is missing, or the folder has images of other settings.
        CheckpointError: the checkpoint cannot be read.
        SamplingError: an image has NaN or Inf; it is not written.
    """
    require_paths(config)
    return on_ranks(_run, config, config.devices)


def _run(config: SampleConfig) -> dict[str, Any]:
    """In each process of the run."""
    started = time.monotonic()
    images = ranks.on_main(lambda: plan_images(config))
    with contextlib.closing(shared_folder(lambda: _open_folder(config))) as folder:
        for note in ranks.on_main(lambda: config.prompt_table().notes):
            _log.warning(note)
        source = ranks.on_main(config.checkpoint)  # once: in a folder of runs there may soon be a newer one
        with ranks.in_step():
            model = model_of(override(config, ckpt_path=str(source)))

        def claim() -> Mapping[str, PlannedImage]:
            listed = ImageList.claim(folder, images, settings=_settings(config, model))
            folder.save_config(config)
            folder.save_environment()
            finish_writes(folder.path)
            return listed.images

        listed = ImageList(folder, ranks.on_main(claim))
        for note in cut_notes(model.params, [image.prompt for image in images]):
            _log.warning(note)
        missing = ranks.from_main([image for image in images if not listed.path(image).exists()])
        if kept := len(images) - len(missing):
            _log.info("%d of %d images are there already", kept, len(images))
        try:
            with ranks.in_step():
                _sample(model, ranks.share(_batches(missing, config.batch_size)), listed, config)
        finally:
            index = listed.write_index() if ranks.is_main() else None

        def finish() -> dict[str, Any]:
            grid = {"grid": _write_grids(images, listed)} if config.grid else {}
            _log.info("images in %s: %d", folder.path / "images", len(images))
            result = {
                "run": folder.path,
                "images": len(images),
                "sampled": len(missing),
                "index": index,
                **grid,
                "seconds": time.monotonic() - started,
                "peak_memory_bytes": peak_memory_bytes(),
            }
            save_result(folder, result)
            return result

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
    model: LatentDiffusion, batches: Sequence[Sequence[PlannedImage]], listed: ImageList, config: SampleConfig
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
    with bar("drawing images", total=count, unit="images") as progress:
        sampler.done = progress.update
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
            write_together(listed.folder.path, files)


def _write_grids(images: Sequence[PlannedImage], listed: ImageList) -> Path:
    """grid.png, a row a case; grid_2.png and so on where one would be too tall. Returns the path of the first."""
    cases: dict[str, list[PlannedImage]] = {}
    for image in images:
        cases.setdefault(f"{image.case_number}\0{image.prompt}", []).append(image)
    rows = list(cases.values())
    width = max(map(len, rows))
    same_seeds = all([image.seed for image in row] == [image.seed for image in rows[0]] for row in rows)
    headings = [f"seed {rows[0][i].seed}" if same_seeds else f"image {i + 1}" for i in range(width)]
    with Image.open(listed.path(images[0])) as first:
        cell_px = max(64, first.width)
    blank = Image.new("RGB", (cell_px, cell_px), "white")
    height = max(1, _GRID_HEIGHT_PX // (cell_px + 4))
    paths = []
    for number, start in enumerate(range(0, len(rows), height)):
        page = rows[start : start + height]
        pictures = [[_opened(listed, image) for image in row] + [blank] * (width - len(row)) for row in page]
        path = listed.folder.path / ("grid.png" if number == 0 else f"grid_{number + 1}.png")
        labels = [row[0].prompt for row in page]
        write_png(path, image_grid(pictures, labels, headings, cell_px=cell_px))
        paths.append(path)
    return paths[0]


def _opened(listed: ImageList, image: PlannedImage) -> Image.Image:
    with Image.open(listed.path(image)) as opened:
        return opened.convert("RGB")
