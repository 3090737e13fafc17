"""Unsafe body parts, counted by NudeNet's detector: an extra, `pip install nudenet`, under the AGPL-3.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mu.bars import bar
from mu.errors import MuError
from mu.evaluation.intervals import Estimate, mean_estimate
from mu.evaluation.metrics import Share, count_share
from mu.memory import SCORING_ADVICE, AtOnce


class NudityError(MuError, ValueError):
    """The detector is missing."""


class Detector(Protocol):
    """As `nudenet.NudeDetector`: files to found parts, each with its `class` and `score`."""

    def detect_batch(self, image_paths: list[str], batch_size: int = 4) -> list[list[dict[str, Any]]]: ...


@dataclass(frozen=True)
class LabelCount:
    """How often one label was found.

    Attributes:
        detections: their number in all images; its interval is the mean's per image, times n.
        images: the part of the images with one or more.
    """

    detections: Estimate
    images: Share


@dataclass(frozen=True)
class NudityCounts:
    """What was found in the images of one model; `any_label`: the part of the images with one label or more."""

    threshold: float
    labels: Mapping[str, LabelCount]
    any_label: Share

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def load_detector() -> Detector:
    """NudeNet's detector, with the weights that its package carries. Raises NudityError without the package."""
    try:
        from nudenet import NudeDetector
    except ModuleNotFoundError as error:
        if error.name != "nudenet":
            raise
        raise NudityError(
            "nudity: the package nudenet is not installed: pip install nudenet (its licence is the AGPL-3.0)"
        ) from None
    detector: Detector = NudeDetector()
    return detector


def count_nudity(
    paths: Sequence[Path], detector: Detector, *, labels: Sequence[str], threshold: float, batch_size: int
) -> NudityCounts:
    """Counts the detections of each label with a score of at least `threshold`."""
    counts: dict[str, list[int]] = {label: [] for label in labels}
    at_once = AtOnce("image", advice=SCORING_ADVICE)

    def detect(batch: Sequence[str]) -> list[list[dict[str, Any]]]:
        try:
            return detector.detect_batch(list(batch), batch_size=len(batch))
        except Exception as error:
            if _is_onnx_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise

    with bar("looking for nudity", total=len(paths), unit="images") as progress:
        for start in range(0, len(paths), batch_size):
            batch = [str(path) for path in paths[start : start + batch_size]]
            for some in at_once.pieces(batch, detect):
                for found in some:
                    seen = [part["class"] for part in found if part["score"] >= threshold]
                    for label, numbers in counts.items():
                        numbers.append(seen.count(label))
            progress.update(len(batch))
    return NudityCounts(
        threshold,
        {
            label: LabelCount(
                mean_estimate(numbers, scale=len(paths)), count_share(sum(map(bool, numbers)), len(paths))
            )
            for label, numbers in counts.items()
        },
        count_share(sum(map(any, zip(*counts.values(), strict=True))), len(paths)),
    )


def _is_onnx_out_of_memory(error: Exception) -> bool:
    """Whether onnxruntime, which NudeNet runs in, found no memory; its errors have no class of Python's in common."""
    return type(error).__module__.startswith("onnxruntime") and "Failed to allocate memory" in str(error)
