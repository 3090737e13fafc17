"""Measures what a model forgot and what it kept: sample every prompt of the grid, classify, count.

Sampled images are kept under `<output_dir>/grids/<model>-<settings>/<Style>/<Object>/<seed>.png`. They belong to the
model's fingerprint and the sampling settings, so the images of a base model are sampled once for all evaluations
with the same output_dir, and an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from tqdm import tqdm

from mu.config import Config, resolve_path
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.generated import GeneratedImages, SampleSettings
from mu.datasets.images import load_image
from mu.datasets.index import DataError, Row, check_choice, check_folder_names
from mu.datasets.prompts import canvas_prompt
from mu.devices import resolve_devices
from mu.errors import MuError
from mu.evaluation.classifier import EmojiClassifier, load_classifier
from mu.evaluation.metrics import (
    Prediction,
    Share,
    UnlearningScores,
    accuracy_by_class,
    predictions_csv,
    table_csv,
    unlearning_scores,
)
from mu.evaluation.pictures import before_after_grid
from mu.ldm import load_model
from mu.ldm.checkpoint import fingerprint
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.run_folder import RunFolder, write_atomically

SCORES = ("UA", "IRA", "CRA", "own")


class EvaluationError(MuError, ValueError):
    """An evaluation that cannot be made as asked."""


class EvaluationSettings(Protocol):
    """What `run` reads of its config; the meaning of each key is in the config class of the evaluate command."""

    @property
    def base_ckpt_path(self) -> str | None: ...
    @property
    def model_config_path(self) -> str: ...
    @property
    def devices(self) -> str: ...
    @property
    def template(self) -> str: ...
    @property
    def template_name(self) -> str: ...
    @property
    def styles(self) -> tuple[str, ...] | None: ...
    @property
    def objects(self) -> tuple[str, ...] | None: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def sample_steps(self) -> int: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def classifier_path(self) -> str: ...
    @property
    def output_dir(self) -> str: ...
    def checkpoint(self) -> Path: ...


@dataclass(frozen=True)
class Grid:
    """Which images are asked for: every style x object x seed."""

    styles: tuple[str, ...]
    objects: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        check_folder_names("styles", self.styles)
        check_folder_names("objects", self.objects)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise EvaluationError(
                f"seeds must be different numbers, at least one; they are {list(self.seeds)}"
            )

    def rows(self, images: Path) -> Iterator[Row]:
        """The images, those of one prompt together, in a folder as `GeneratedImages.path`."""
        for style in self.styles:
            for object in self.objects:
                for seed in self.seeds:
                    relative = f"{style}/{object}/{seed}.png"
                    yield Row(
                        image=images / relative,
                        relative=relative,
                        prompt=canvas_prompt(object, style),
                        style=style,
                        object=object,
                        concept=style,
                    )


@dataclass(frozen=True)
class MeasuredModel:
    """A model's images on a grid and what a classifier sees in them.

    Attributes:
        images: the folder of the styles, see `Grid.rows`.
        manifest: the model's fingerprint and the sampling settings.
    """

    images: Path
    manifest: Mapping[str, str]
    predictions: tuple[Prediction, ...]


def measure(
    model: LatentDiffusion,
    classifier: EmojiClassifier,
    grid: Grid,
    *,
    settings: SampleSettings,
    batch_size: int,
    folder: Path | str,
) -> MeasuredModel:
    """Samples the images of the grid that are not yet below `folder` and classifies all, as their files are.

    The images and predictions do not depend on the batch size or on the rest of the grid, but for rounding.

    Args:
        model: in eval mode, with a text encoder.
        folder: the images are kept in `<folder>/grids/<model>-<settings>`.

    Raises:
        DataError: the model cannot be sampled from so, an image has NaN or Inf, or the folder holds other images.
        EvaluationError: the classifier does not know a style or an object of the grid.
    """
    check_classifier(classifier, grid)
    images = GeneratedImages(model, folder, settings, subfolder="grids")
    rows = list(grid.rows(images.path))
    images.sample_missing(rows, batch_size=batch_size)
    return MeasuredModel(
        images.path, images.manifest, tuple(classify(rows, classifier, batch_size=batch_size))
    )


def check_classifier(classifier: EmojiClassifier, grid: Grid) -> None:
    """Raises EvaluationError unless the classifier knows all styles and objects of the grid."""
    for key, asked, known in (
        ("styles", grid.styles, classifier.styles),
        ("objects", grid.objects, classifier.objects),
    ):
        for name in asked:
            try:
                check_choice(key, name, known)
            except DataError as error:
                raise EvaluationError(f"{error} These are what the classifier knows.") from error


def classify(rows: Sequence[Row], classifier: EmojiClassifier, *, batch_size: int) -> Iterator[Prediction]:
    """What the classifier sees in the image files of `rows`: for each head its likeliest class."""
    device = classifier.style_head.weight.device
    with tqdm(total=len(rows), desc="classifying", unit="image", disable=None) as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            pixels = torch.stack(
                [load_image(row.image, classifier.input_size) for row in batch]
            )  # (B, 3, H, W)
            styles, objects = classifier.predict(pixels.to(device))  # (B, S), (B, O)
            for row, style, object in zip(
                batch, styles.argmax(-1).tolist(), objects.argmax(-1).tolist(), strict=True
            ):
                yield Prediction(
                    row.style,
                    row.object,
                    int(row.image.stem),
                    classifier.styles[style],
                    classifier.objects[object],
                )
            progress.update(len(batch))


def run(config: EvaluationSettings) -> dict[str, object]:
    """A whole evaluation into a new run folder.

    Its files: `metrics.json` and `metrics.csv`, `predictions_before.csv` and `predictions_after.csv` (a row an
    image), `pictures/before_after.png`, `config.yaml`, `environment.json`, `log.txt`. "before" is the checkpoint of
    `base_ckpt_path` and is left out without one.

    Returns:
        What is printed at the end: for each score its meaning and its numbers in percent, then paths.

    Raises:
        MuError: a file is missing or wrong, or the settings do not fit each other; the message says which.
    """
    grid = Grid(config.styles or STYLES, config.objects or OBJECTS, config.seeds)
    device = resolve_devices(config.devices)
    classifier = load_classifier(resolve_path(config.classifier_path), device)
    check_classifier(classifier, grid)
    checkpoints = {"after": config.checkpoint()}
    if config.base_ckpt_path is not None:
        checkpoints = {"before": resolve_path(config.base_ckpt_path), **checkpoints}

    with RunFolder.create(config.output_dir, config.template_name) as run:
        if isinstance(config, Config):
            run.save_config(config)
        run.save_environment()
        measured: dict[str, MeasuredModel] = {}
        for name, path in checkpoints.items():
            run.logger.info("%s unlearning: %s", name, path)
            model = load_model(resolve_path(config.model_config_path), path, device=device)
            measured[name] = measure(
                model,
                classifier,
                grid,
                settings=SampleSettings(config.sample_steps, config.guidance_scale, model.image_size),
                batch_size=config.batch_size,
                folder=config.output_dir,
            )
            del model  # only one is in memory
            write_atomically(
                run.path / f"predictions_{name}.csv", predictions_csv(measured[name].predictions)
            )
        scores = {
            name: unlearning_scores(
                found.predictions, template=config.template, template_name=config.template_name
            )
            for name, found in measured.items()
        }
        for name, score in scores.items():
            run.logger.info("%s: %s", name, _sentence(score))
        _write_metrics(run, config, grid, checkpoints, measured, scores, fingerprint(classifier.state_dict()))
        picture = run.path / "pictures" / "before_after.png"
        _draw(picture, config, grid, measured)
        return {
            **_summary(scores),
            "scored by": Path(config.classifier_path).name,
            "images of each model": len(grid.styles) * len(grid.objects) * len(grid.seeds),
            "checkpoint": str(checkpoints["after"]),
            "picture": str(picture),
            "run": str(run.path),
        }


def percent(share: Share) -> float | None:
    """A share in percent, to two decimals."""
    return None if share.value is None else round(100 * share.value, 2)


def _meanings(scores: UnlearningScores) -> dict[str, str]:
    kind, name = scores.template, scores.template_name
    other = "object" if kind == "style" else "style"
    return {
        "UA": f"images of the prompts of {name} that are not seen as {name}",
        "IRA": f"images of the other {kind}s that are seen as their {kind}",
        "CRA": f"images of the other {kind}s that are seen as their {other}",
        "own": f"images of the prompts of {name} that are seen as their {other}",
    }


def _summary(scores: Mapping[str, UnlearningScores]) -> dict[str, object]:
    after = scores["after"]
    other = "object" if after.template == "style" else "style"
    titles = {key: key for key in SCORES} | {
        "own": f"{other} accuracy on {after.template_name}'s own prompts"
    }
    return {
        titles[key]: {
            "meaning": meaning,
            **{f"{name}, %": percent(getattr(score, key)) for name, score in scores.items()},
        }
        for key, meaning in _meanings(after).items()
    }


def _sentence(scores: UnlearningScores) -> str:
    parts = []
    for key in SCORES:
        share: Share = getattr(scores, key)
        if share.value is None or share.wilson_95 is None:
            parts.append(f"{key} - (no images)")
            continue
        low, high = share.wilson_95
        parts.append(f"{key} {share.value:.1%} (95 %: {100 * low:.1f} to {100 * high:.1f}, n = {share.n})")
    return ", ".join(parts)


def _write_metrics(
    run: RunFolder,
    config: EvaluationSettings,
    grid: Grid,
    checkpoints: Mapping[str, Path],
    measured: Mapping[str, MeasuredModel],
    scores: Mapping[str, UnlearningScores],
    classifier_fingerprint: str,
) -> None:
    models: dict[str, object] = {}
    for name, found in measured.items():
        models[name] = {
            "checkpoint": str(checkpoints[name]),
            **scores[name].as_dict(),
            **{
                f"{kind}_accuracy_by_class": {
                    concept: share.value
                    for concept, share in accuracy_by_class(found.predictions, kind).items()
                }
                for kind in ("style", "object")
            },
            "images": str(found.images),
            "sampled_with": dict(found.manifest),
        }
    run.save_json(
        "metrics.json",
        {
            "template": config.template,
            "template_name": config.template_name,
            "classifier": Path(config.classifier_path).name,
            "classifier_fingerprint": classifier_fingerprint,
            "styles": list(grid.styles),
            "objects": list(grid.objects),
            "seeds": list(grid.seeds),
            "meanings": _meanings(scores["after"]),
            "models": models,
        },
    )
    columns = [*SCORES, "style_accuracy", "object_accuracy"]
    header = ["model", "template", "template_name", *(f"{c}{end}" for c in columns for end in ("", "_n"))]
    rows = []
    for name, score in scores.items():
        shares: list[Share] = [getattr(score, column) for column in columns]
        numbers = [cell for share in shares for cell in (share.value, share.n)]
        rows.append([name, config.template, config.template_name, *numbers])
    write_atomically(run.path / "metrics.csv", table_csv(header, rows))


def _draw(path: Path, config: EvaluationSettings, grid: Grid, measured: Mapping[str, MeasuredModel]) -> None:
    seed = grid.seeds[0]
    panels: dict[str, dict[tuple[str, str], Image.Image]] = {}
    for name, found in measured.items():
        panels[name] = {}
        for style in grid.styles:
            for object in grid.objects:
                with Image.open(found.images / style / object / f"{seed}.png") as opened:
                    panels[name][style, object] = opened.convert("RGB")
    before_after_grid(
        panels,
        styles=grid.styles,
        objects=grid.objects,
        template=config.template,
        template_name=config.template_name,
        title=f"{config.template} {config.template_name} forgotten, seed {seed}",
        path=path,
    )
