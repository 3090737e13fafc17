"""What a report tells, read from the folders of an evaluation and of a training run. Nothing here imports torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from mu.datasets.index import concept_label, concept_names
from mu.errors import MuError
from mu.evaluation.metrics import Prediction, read_predictions

SCORES = ("UA", "IRA", "CRA", "own")
MODELS = ("before", "after")
_NOT_MEASURES = (*SCORES, "style_accuracy", "object_accuracy")

Curves = dict[str, list[tuple[float, float]]]
"""column -> (step, value) in order."""


class ReportError(MuError, ValueError):
    """A folder that no report can be written of."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files that every run leaves: what is missing is empty."""

    folder: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def template(self) -> str:
        """Kind of the forgotten concept."""
        return str(self.config.get("template", ""))

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of what was forgotten."""
        return concept_names(self.config.get("template_name", ()))


@dataclass(frozen=True, kw_only=True)
class TrainingRun(RunFiles):
    """A training run, with the mask that it ran under.

    Attributes:
        losses, validation: see `Curves`; empty where the run has none.
        pictures: files of its folder `pictures`, in order of their names.
        mask: of its mask's header, `kept` and `total` weights and the `kept_fraction` of each block, as far as they are
            there; None where the run has no mask, or its file is gone.
        mask_config: the settings beside that file.
        moved: how far pictures moved, where `forget` has looked (`mu.forgetting.pictures.Moved`); else empty.
    """

    losses: Curves
    validation: Curves
    pictures: Sequence[Path]
    mask: Mapping[str, Any] | None = None
    mask_config: Mapping[str, Any] = field(default_factory=dict)
    moved: Mapping[str, Any] = field(default_factory=dict)

    def file(self, key: str) -> Path | None:
        """The checkpoint, patch or mask of the run; None where there is none, or where it is gone."""
        path = self.metrics.get(key)
        return Path(path) if path is not None and Path(path).exists() else None


@dataclass(frozen=True, kw_only=True)
class EvaluationRun(RunFiles):
    """An evaluation: its numbers are in `metrics`; "before" and "after" or "after" alone are its models.

    Attributes:
        predictions: model -> what the classifier sees in its images; empty without a classifier.
    """

    predictions: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """Model -> its numbers, before first."""
        return {name: self.metrics["models"][name] for name in MODELS if name in self.metrics["models"]}

    def images(self, model: str) -> dict[tuple[str, str], tuple[int, Path]]:
        """(style, object) -> the first of its seeds, and the image's file."""
        table = self.folder / f"images_{model}.csv"
        if table.is_file():
            with open(table, newline="", encoding="utf-8") as file:
                found = [(r["style"], r["object"], r["seed"], Path(r["file"])) for r in csv.DictReader(file)]
        else:
            folder = Path(self.models[model]["images"])
            found = [
                (row.style, row.object, str(row.seed), folder / row.style / row.object / f"{row.seed}.png")
                for row in self.predictions.get(model, ())
            ]
        first: dict[tuple[str, str], tuple[int, Path]] = {}
        for style, object, seed, path in found:
            if style and object:
                first.setdefault((style, object), (int(seed), path))
        return first

    def measures(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        """Every further measure: its name -> model -> {"value", "n", ...}; such as `clip_score all`."""
        found: dict[str, dict[str, Mapping[str, Any]]] = {}
        for model, numbers in self.models.items():
            for key, value in numbers.items():
                if key not in _NOT_MEASURES and not key.endswith("_by_class"):
                    for name, estimate in _estimates(key, value):
                        found.setdefault(name, {})[model] = estimate
        return found


def read_evaluation(folder: Path) -> EvaluationRun:
    """An evaluation's folder.

    Raises:
        ReportError: it holds no metrics.json of an evaluation.
        MetricsError: a table of predictions is damaged.
    """
    files = _files(folder)
    if "after" not in files["metrics"].get("models", {}):
        raise ReportError(f"{folder} holds no metrics.json of an evaluation; the command evaluate makes one")
    tables = {name: folder / f"predictions_{name}.csv" for name in MODELS}
    predictions = {
        name: read_predictions(path.read_bytes()) for name, path in tables.items() if path.is_file()
    }
    return EvaluationRun(**files, predictions=predictions)


def read_training_run(folder: Path) -> TrainingRun:
    """A training run's folder, and the header of its mask, where that still is where the run found it.

    Raises:
        ReportError: another folder.
        SafetensorError: the mask's file is damaged.
    """
    files = _files(folder)
    if not files["config"] or "checkpoint" not in files["metrics"]:
        raise ReportError(f"{folder} holds no config.yaml and metrics.json of a training run")
    run = TrainingRun(
        **files,
        losses=read_curves(folder / "metrics.csv"),
        validation=read_curves(folder / "validation.csv"),
        pictures=sorted((folder / "pictures").glob("*.png")),
        moved=_read(folder / "moved.json"),
    )
    if (mask := run.file("mask")) is None:
        return run
    return replace(run, mask=_mask_header(mask), mask_config=_read(mask.parent / "config.yaml"))


def is_training_run(folder: Path) -> bool:
    """Whether `read_training_run` can read a folder."""
    files = _files(folder)
    return bool(files["config"]) and "checkpoint" in files["metrics"]


def read_curves(path: Path) -> Curves:
    """The columns of a CSV file with a column `step`, where a later row of a step replaces an earlier one."""
    if not path.is_file():
        return {}
    curves: dict[str, dict[float, float]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if name != "step" and cell:
                    curves.setdefault(name, {})[float(row["step"])] = float(cell)
    return {name: sorted(values.items()) for name, values in curves.items()}


def headline(run: RunFiles) -> str:
    """The forgotten concepts, for a title."""
    return concept_label(run.concepts).replace("_", " ").replace("+", ", ")


def _mask_header(path: Path) -> dict[str, Any]:
    """What the head of a mask's file says of it; nothing of a mask that is no safetensors file."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="numpy") as file:
        header = file.metadata() or {}
    return {key: json.loads(header[key]) for key in ("kept", "total", "kept_fraction") if key in header}


def _files(folder: Path) -> dict[str, Any]:
    return {
        "folder": folder,
        "config": _read(folder / "config.yaml"),
        "metrics": _read(folder / "metrics.json"),
        "environment": _read(folder / "environment.json"),
    }


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return content if isinstance(content, Mapping) else {}


def _estimates(name: str, value: object) -> list[tuple[str, Mapping[str, Any]]]:
    """The numbers with an n in what may be nested, each under the words that lead to it."""
    if not isinstance(value, Mapping):
        return []
    if "value" in value and "n" in value:
        return [(name, value)]
    return [found for key, inner in value.items() for found in _estimates(f"{name} {key}", inner)]
