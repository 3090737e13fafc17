"""Which images a sampling run makes, under which names, and which of them its folder has."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mu.atomic import write_atomically
from mu.config import ConfigError
from mu.evaluation.config import SampleConfig
from mu.run_folder import RunFolder

PLAN = "plan.json"
COLUMNS = ("case_number", "prompt", "evaluation_seed", "evaluation_guidance", "file")
"""Of images.csv, which is itself a table of prompts that the command takes."""
_LISTED = 5


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


class Plan:
    """What a run folder is for: `plan.json` holds its settings and images, of this call and of earlier ones."""

    def __init__(self, folder: RunFolder, images: Mapping[str, PlannedImage]) -> None:
        self.folder = folder
        self.images = images

    @classmethod
    def claim(cls, folder: RunFolder, images: Sequence[PlannedImage], *, settings: Mapping[str, Any]) -> Plan:
        """Write the plan, or add to the one that is there.

        Raises:
            ConfigError: the folder's images have other settings, or are others under the same names; the first
                few differences are named, and nothing is written.
        """
        path = folder.path / PLAN
        own = {image.file: image for image in images}
        known: dict[str, PlannedImage] = {}
        if path.exists():
            known = _read(path, settings)
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
                    f"run_name: {folder.path} has images but no {PLAN} that says of what; choose another run_name"
                ]
            )
        merged = {**known, **own}
        folder.save_json(
            PLAN, {"settings": dict(settings), "images": [asdict(image) for image in merged.values()]}
        )
        return cls(folder, merged)

    def path(self, image: PlannedImage) -> Path:
        """Where the image's file is, or will be."""
        return self.folder.path / image.file

    def write_index(self) -> Path:
        """images.csv and images.json: a row for each planned image that is there. Returns the path of the first."""
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


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, PlannedImage]:
    """The images of an earlier plan with the same settings."""
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
