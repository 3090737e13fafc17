"""The tiny runs of the algorithms' tests, here too; and the folders of runs that a report is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from PIL import Image

from mu.evaluation.metrics import Prediction, accuracy_by_class, predictions_csv, table_csv, unlearning_scores
from tests.algorithms.saliency_unlearning.conftest import tiny_runs

__all__ = ["tiny_runs"]

OBJECTS = ("Cats", "Dogs", "Cars")
SEEDS = (188, 288)

Evaluated = Callable[..., Path]


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    """evaluated(styles, ...): an evaluation's folder; its images are one plain colour each, or all are `image`."""

    def make(
        styles: tuple[str, ...] = ("Noto", "Blob"),
        objects: tuple[str, ...] = OBJECTS,
        *,
        template: str = "style",
        forgotten: str = "Noto",
        models: tuple[str, ...] = ("before", "after"),
        image: Path | None = None,
        **more: Any,
    ) -> Path:
        folder = tmp_path / "evaluation"
        folder.mkdir()
        asked = [(style, object, seed) for style in styles for object in objects for seed in SEEDS]
        metrics: dict[str, Any] = {
            "template": template,
            "template_name": forgotten,
            "classifier": "some_classifier",
            "styles": styles,
            "objects": objects,
            "meanings": {"UA": f"images that are not seen as {forgotten}"},
            "models": {},
        }
        generator = numpy.random.default_rng(0)
        for model in models:
            predictions = [
                Prediction(
                    style, object, seed, *(str(generator.choice(names)) for names in (styles, objects))
                )
                for style, object, seed in asked
            ]
            rows = []
            for number, key in enumerate(asked):
                path = image or tmp_path / f"{model}-{number}.png"
                if image is None:
                    shade = number if model == "before" else 100 + number
                    Image.new("RGB", (64, 64), colour(shade)).save(path)
                rows.append((*key, "a prompt", path))
            columns = ("style", "object", "seed", "prompt", "file")
            (folder / f"images_{model}.csv").write_bytes(table_csv(columns, rows))
            (folder / f"predictions_{model}.csv").write_bytes(predictions_csv(predictions))
            scores = unlearning_scores(predictions, template=template, template_name=forgotten)
            by_class = {
                f"{kind}_accuracy_by_class": {
                    name: share.value for name, share in accuracy_by_class(predictions, kind).items()
                }
                for kind in ("style", "object")
            }
            metrics["models"][model] = {**asdict(scores), **by_class, **more}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"template": template, "template_name": forgotten, "devices": "0", "styles": None})
        )
        return folder

    return make


def colour(number: int) -> tuple[int, int, int]:
    return number, 20, 230


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """trained(**config): a training run's folder of 40 steps."""

    def make(**config: Any) -> Path:
        folder = tmp_path / "training"
        (folder / "pictures").mkdir(parents=True)
        generator = numpy.random.default_rng(0)
        for name in ("before_after", "step_000020", "step_000040"):
            noise = generator.integers(0, 255, (80, 120, 3), dtype=numpy.uint8)
            Image.fromarray(noise).save(folder / "pictures" / f"{name}.png")
        (folder / "model.safetensors").write_bytes(bytes(123_000))
        keys = {
            "template": "style",
            "template_name": "Noto",
            "train_method": "xattn",
            "masking": "random",
            **config,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(keys))
        rows = [(step, 3 / step, 2 / step, 1 / step) for step in range(1, 41)]
        (folder / "metrics.csv").write_bytes(table_csv(("step", "loss", "forget", "retain"), rows))
        numbers = {
            "checkpoint": str(folder / "model.safetensors"),
            "patch": None,
            "mask": None,
            "weights_selected": 1200,
            "weights_changed": 1100,
            "steps": 40,
            "seconds": 75.5,
            "peak_memory_bytes": {"process": 2_500_000_000},
        }
        (folder / "metrics.json").write_text(json.dumps(numbers))
        (folder / "environment.json").write_text(
            json.dumps({"python": "3.99", "packages": {"torch": "2.99"}})
        )
        return folder

    return make
