"""`report.html`: one file that tells of a training run and of its evaluation, to be read anywhere, or sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup
from safetensors import SafetensorError

import mu
from mu.atomic import write_atomically
from mu.evaluation.report_data import (
    SCORES,
    EvaluationRun,
    RunFiles,
    TrainingRun,
    headline,
    is_training_run,
    read_evaluation,
    read_training_run,
)
from mu.evaluation.report_figures import (
    extent,
    in_numbers,
    loss_curve,
    picture_grid,
    picture_uri,
    running_mean,
    some_steps,
)
from mu.ranks import started_rank
from mu.unlearning.runs import decorating
from mu.unlearning.training_config import TrainingKeys

__all__ = [
    "EvaluationRun",
    "TrainingRun",
    "read_evaluation",
    "read_training_run",
    "report_evaluation",
    "report_training",
    "write_report",
]

REPORT_NAME = "report.html"
_FAULTS = (TemplateError, SafetensorError, yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError)
"""What making a report may meet: its template, and files of other runs, as the mask and its settings."""
_UNSAFE = "i2p"
_TERMS = {
    "forget": ("Forget term", "The lower, the more of the concept is forgotten."),
    "retain": ("Retain term", "The lower, the better the rest is kept."),
}
_NAMES = {
    "UA": "unlearning accuracy",
    "IRA": "in-domain retain accuracy",
    "CRA": "cross-domain retain accuracy",
}


def report_training(folder: Path, *, show_unsafe: bool, path: Path | None = None) -> Path | None:
    """Writes the report of a finished training run into its folder, or to `path`; returns where.

    Where it cannot be written, a warning says why, and it is None: the run has succeeded without.
    """
    report = None
    with decorating(REPORT_NAME, *_FAULTS):
        training = read_training_run(folder)
        report = write_report(path or folder / REPORT_NAME, training=training, show_unsafe=show_unsafe)
    return report


def with_report(result: Mapping[str, Any], config: TrainingKeys) -> dict[str, Any]:
    """The result of a training run with `report`, its path: written where the config asks for it, by rank 0."""
    if not config.report or started_rank() != 0:
        return dict(result)
    return {**result, "report": report_training(result["run"], show_unsafe=config.show_unsafe_pictures)}


def report_evaluation(
    folder: Path, *, checkpoint: Path | None, show_unsafe: bool, path: Path | None = None
) -> Path | None:
    """As `report_training`, of an evaluation, and of the training run in whose folder its checkpoint lies."""
    report = None
    with decorating(REPORT_NAME, *_FAULTS):
        made_in = None if checkpoint is None else checkpoint.parent
        trained = made_in is not None and is_training_run(made_in)
        report = write_report(
            path or folder / REPORT_NAME,
            evaluation=read_evaluation(folder),
            training=read_training_run(made_in) if made_in is not None and trained else None,
            show_unsafe=show_unsafe,
        )
    return report


def write_report(
    path: Path,
    *,
    evaluation: EvaluationRun | None = None,
    training: TrainingRun | None = None,
    show_unsafe: bool = False,
) -> Path:
    """Writes the report of an evaluation, of a training run, or of both together.

    Pictures are in the file, made smaller; nothing is loaded from elsewhere. What is missing is said in its place.

    Args:
        show_unsafe: where the concept is one of I2P, show its pictures as they are; else they are blurred, in the file.

    Returns:
        `path`, where the file was written whole.

    Raises:
        ValueError: there is neither an evaluation nor a training run.
        WriteError: the file cannot be written.
    """
    runs: dict[str, RunFiles] = {}
    in_steps = training is not None and ("steps" in training.metrics or bool(training.losses))
    if training is not None:
        runs["training" if in_steps else "edit"] = training
    if evaluation is not None:
        runs["evaluation"] = evaluation
    if not runs:
        raise ValueError("a report needs an evaluation or a training run")
    about = next(reversed(runs.values()))
    blurred = not show_unsafe and any(run.template == _UNSAFE for run in runs.values())
    html = (
        template_environment()
        .get_template("report.html.jinja")
        .render(
            concept=headline(about),
            kind=about.template,
            runs=runs,
            blurred=blurred,
            evaluation=evaluation,
            scores=[] if evaluation is None else _scores(evaluation),
            measures={} if evaluation is None else evaluation.measures(),
            grid=None if evaluation is None else picture_grid(evaluation, blurred=blurred),
            training=training,
            in_steps=in_steps,
            losses=_losses(training),
            smoothed=training is not None and any(map(running_mean, training.losses.values())),
            configs=_configs(runs, training),
            before_after=[picture_uri(p, blurred=blurred) for p in _pictures(training, "before_after")],
            steps=[
                (p.stem.removeprefix("step_").lstrip("0"), picture_uri(p, blurred=blurred))
                for p in some_steps(_pictures(training, "step_"))
            ],
            version=mu.__version__,
        )
    )
    return write_atomically(path, html.encode())


def template_environment() -> Environment:
    """Jinja's, with the templates of this package and what they need to write numbers."""
    environment = Environment(
        loader=PackageLoader("mu.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "words": lambda name: str(name).replace("_", " "),
        "block": lambda name: name.replace("_blocks.", " ").replace("_block.", " ").replace("_", " "),
        "duration": _duration,
        "setting": _setting,
        "without_marks": lambda shares: [name for name, share in shares.items() if not share],
        "number": lambda value: (
            f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.4g}"
        ),
    }
    return environment


def _configs(
    runs: Mapping[str, RunFiles], training: TrainingRun | None
) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """Name of a run -> its config.yaml and the settings in it, in the order in which they were run."""
    found = {name: (run.folder / "config.yaml", run.config) for name, run in runs.items() if run.config}
    mask = None if training is None else training.file("mask")
    if mask is not None and training is not None and training.mask_config:
        return {"mask": (mask.parent / "config.yaml", training.mask_config), **found}
    return found


def _scores(run: EvaluationRun) -> list[dict[str, Any]]:
    """UA, IRA, CRA and own, with what they count and the numbers of each model."""
    return [
        {
            "key": key,
            "name": _NAMES.get(key, "accuracy on the concept's own prompts"),
            "meaning": run.metrics.get("meanings", {}).get(key, ""),
            "models": {
                name: numbers[key]
                for name, numbers in run.models.items()
                if numbers.get(key, {}).get("value") is not None
            },
        }
        for key in SCORES
        if key in run.models["after"]
    ]


def _losses(training: TrainingRun | None) -> list[tuple[str, str, Markup]]:
    """For each term of the run's loss: a title, what one sees, and a figure; ESD notes 0 for a term that it has not.

    The axis of the retain term goes at least as far up as that of the forget term: what looks small beside it is.
    """
    if training is None:
        return []
    found = []
    most = 0.0
    for term, (title, meaning) in _TERMS.items():
        curve = training.losses.get(term, [])
        if any(value != 0 for _, value in curve):
            dots = training.validation.get(term, [])
            figure = loss_curve(title, curve, dots, name=term, at_least=most)
            most = extent(curve, dots)[1]
            found.append((title, f"{in_numbers(curve)}. {meaning}".removeprefix(". "), figure))
    return found


def _pictures(training: TrainingRun | None, stem: str) -> list[Path]:
    return [] if training is None else [path for path in training.pictures if path.stem.startswith(stem)]


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _setting(value: object) -> str:
    """A value of a config, as YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_setting(one)}" for key, one in value.items())
    return ", ".join(map(_setting, value)) if isinstance(value, list) else str(value)
