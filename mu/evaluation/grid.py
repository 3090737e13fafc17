"""The images of a model on a grid of styles x objects x seeds, and what a classifier sees in them.

Sampled images are kept under `<folder>/grids/<model>-<settings>/<Style>/<Object>/<seed>.png`. They belong to the
model's fingerprint and the sampling settings, so the images of a base model are sampled once for all evaluations
with the same folder, and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mu.bars import bar
from mu.datasets.canvas import canvas_prompt
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.images import load_pixels, read_ahead, to_unit_range
from mu.datasets.index import DataError, Row, check_choice, check_folder_names
from mu.errors import MuError
from mu.evaluation.asked_images import AskedImage, of_rows
from mu.evaluation.classifiers import Classifier
from mu.evaluation.metrics import Prediction
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.memory import SCORING_ADVICE, AtOnce


class EvaluationError(MuError, ValueError):
    """An evaluation that cannot be made as asked."""


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
        manifest: the model's fingerprint and the sampling settings; empty for images that others sampled.
        predictions: none where no classifier was asked.
        asked: the images, in the order of the predictions.
    """

    images: Path
    manifest: Mapping[str, str]
    predictions: tuple[Prediction, ...]
    asked: tuple[AskedImage, ...] = ()


def measure(
    model: LatentDiffusion,
    classifier: Classifier,
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
    asked = of_rows(rows)
    predictions = tuple(classify(asked, classifier, batch_size=batch_size))
    return MeasuredModel(images.path, images.manifest, predictions, asked)


def check_classifier(classifier: Classifier, grid: Grid) -> None:
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


def classify(
    images: Sequence[AskedImage], classifier: Classifier, *, batch_size: int, interpolation: str = "bicubic"
) -> Iterator[Prediction]:
    """What the classifier sees in image files: for each head its likeliest class, of all that it knows.

    Args:
        interpolation: how images are brought to the classifier's size, "bicubic" or "bilinear".

    Raises:
        OutOfMemoryError: memory does not suffice for one image.
    """
    at_once = AtOnce("image", advice=SCORING_ADVICE)

    def predict(pixels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        styles, objects = classifier.predict(to_unit_range(torch.stack(list(pixels))))  # (B, S), (B, O)
        return list(zip(styles.cpu(), objects.cpu(), strict=True))

    def read(image: AskedImage) -> Tensor:
        return load_pixels(image.path, classifier.input_size, interpolation=interpolation)

    with (
        closing(read_ahead(images, read)) as loaded,
        bar("classifying images", total=len(images), unit="images") as progress,
    ):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = [next(loaded) for _ in batch]
            found = [one for some in at_once.pieces(pixels, predict) for one in some]
            for image, (style, object) in zip(batch, found, strict=True):
                yield Prediction(
                    image.style,
                    image.object,
                    image.seed,
                    classifier.styles[int(style.argmax())],
                    classifier.objects[int(object.argmax())],
                    round(float(style[classifier.styles.index(image.style)]), 6),
                    round(float(object[classifier.objects.index(image.object)]), 6),
                )
            progress.update(len(batch))
