"""`report.html` of a training run and of an evaluation: gathers what lies in their folders and in the mask's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from mu import ranks
from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import load_mask_metadata
from mu.devices import peak_memory_bytes
from mu.evaluation.config import EvaluateConfig
from mu.evaluation.report import (
    TrainingRun,
    is_training_run,
    read_evaluation,
    read_training_run,
    write_report,
)
from mu.launch import on_ranks
from mu.unlearning.runs import decorating

REPORT_NAME = "report.html"
_FAULTS = (TemplateError, SafetensorError, yaml.YAMLError, UnicodeDecodeError)
"""What making a report may meet: its template, and the mask and its settings, which lie elsewhere."""


def report_training(config: TrainConfig, folder: Path) -> Path | None:
    """Writes the report of a finished training run into its folder; returns its path.

    Where it cannot be written, a warning says why, and it is None: the run has succeeded without.
    """
    report = None
    with decorating(REPORT_NAME, *_FAULTS):
        training = _training(folder)
        report = write_report(
            folder / REPORT_NAME,
            training=training,
            other_configs=_mask_config(training),
            show_unsafe=config.show_unsafe_pictures,
        )
    return report


def measured(config: EvaluateConfig) -> dict[str, object]:
    """Evaluates, and writes the report of it and of the training run that made the checkpoint, if it lies in one.

    Returns:
        What `mu.evaluation.evaluate.run` does, with `seconds`, `peak_memory_bytes` (of the main process so far) and the
        path `report` (None where a warning says why it could not be written).
    """
    return on_ranks(_measured, config, config.devices)


def _measured(config: EvaluateConfig) -> dict[str, object]:
    """In each process of the run."""
    from mu.evaluation import evaluate  # late: the report of a training run needs none of it

    started = time.monotonic()
    result = evaluate.run(config)
    return ranks.on_main(lambda: _reported(config, result, seconds=time.monotonic() - started))


def _reported(config: EvaluateConfig, result: dict[str, object], *, seconds: float) -> dict[str, object]:
    spent = {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
    result = {**result, **spent}
    if not config.report:
        return result
    folder = Path(str(result["run"]))
    made_in = Path(str(result["checkpoint"])).parent if "checkpoint" in result else None
    report = None
    with decorating(REPORT_NAME, *_FAULTS):
        training = _training(made_in) if made_in is not None and is_training_run(made_in) else None
        report = write_report(
            folder / REPORT_NAME,
            evaluation=read_evaluation(folder),
            training=training,
            spent=spent,
            other_configs=_mask_config(training),
            show_unsafe=config.show_unsafe_pictures,
        )
    return {**result, "report": None if report is None else str(report)}


def _training(folder: Path) -> TrainingRun:
    """A training run with its mask, where the mask's file is still where the run found it."""
    run = read_training_run(folder)
    path = run.file("mask")
    if path is None:
        return run
    names: list[str] = []
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    return read_training_run(folder, mask=load_mask_metadata(path), weight_names=names)


def _mask_config(run: TrainingRun | None) -> Mapping[str, Mapping[str, Any]]:
    """The settings that the mask was made with, which lie beside it."""
    path = None if run is None else run.file("mask")
    settings = None if path is None else path.parent / "config.yaml"
    if settings is None or not settings.is_file():
        return {}
    content = yaml.safe_load(settings.read_text(encoding="utf-8"))
    return {"mask": content} if isinstance(content, Mapping) else {}
