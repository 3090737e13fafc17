"""One HTML file that tells of a run: self-contained, to be read on a screen, a phone or paper, or sent to somebody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import mu
from mu.atomic import write_atomically
from mu.evaluation.report_data import (
    MODELS,
    SCORES,
    EvaluationRun,
    RunFiles,
    TrainingRun,
    confusion,
    headline,
    is_training_run,
    read_evaluation,
    read_training_run,
)
from mu.evaluation.report_figures import FORGET, RETAIN, confusion_matrix, loss_curve, unet_picture
from mu.evaluation.report_pictures import picture_grid, picture_uri, some_steps

__all__ = [
    "EvaluationRun",
    "TrainingRun",
    "is_training_run",
    "read_evaluation",
    "read_training_run",
    "write_report",
]

_UNSAFE = "i2p"
_TERMS = {"forget": ("Forget term", FORGET), "retain": ("Retain term", RETAIN)}
_NAMES = {
    "UA": "unlearning accuracy",
    "IRA": "in-domain retain accuracy",
    "CRA": "cross-domain retain accuracy",
}


def write_report(
    path: Path,
    *,
    evaluation: EvaluationRun | None = None,
    training: TrainingRun | None = None,
    spent: Mapping[str, Any] | None = None,
    other_configs: Mapping[str, Mapping[str, Any]] | None = None,
    show_unsafe: bool = False,
) -> Path:
    """Writes the report of an evaluation, of a training run, or of both together.

    Pictures are in the file, made smaller; nothing is loaded from elsewhere. What is missing is said in its place.

    Args:
        spent: of the evaluation, `seconds` and `peak_memory_bytes` (the name of a memory -> bytes).
        other_configs: title -> settings of further runs, as of the one that made the mask.
        show_unsafe: where the concept is one of I2P, show its pictures as they are; else they are blurred, in the file.

    Returns:
        `path`, where the file was written whole.

    Raises:
        ValueError: there is neither an evaluation nor a training run.
        WriteError: the file cannot be written.
    """
    runs: dict[str, RunFiles] = {}
    if training is not None:
        runs["training"] = training
    if evaluation is not None:
        runs["evaluation"] = evaluation
    if not runs:
        raise ValueError("a report needs an evaluation or a training run")
    about = evaluation or training
    assert about is not None
    unsafe = any(run.template == _UNSAFE for run in runs.values())
    blurred = unsafe and not show_unsafe
    html = (
        _environment()
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
            confusions=[] if evaluation is None else _confusions(evaluation),
            training=training,
            losses=_losses(training),
            mask=None if training is None else training.mask,
            unet=_unet(training),
            before_after=[picture_uri(p, blurred=blurred) for p in _pictures(training, "before_after")],
            steps=[
                (p.stem.removeprefix("step_").lstrip("0"), picture_uri(p, blurred=blurred))
                for p in some_steps(_pictures(training, "step_"))
            ],
            sizes=_sizes(training),
            times=_times(training, spent or {}),
            memories=_memories(training, spent or {}),
            configs={
                **{name: run.config for name, run in runs.items() if run.config},
                **(other_configs or {}),
            },
            version=mu.__version__,
        )
    )
    return write_atomically(path, html.encode())


def _environment() -> Environment:
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
        "size": _size,
        "duration": _duration,
        "setting": _setting,
        "number": lambda value: f"{value:,}" if isinstance(value, int) else f"{value:.4g}",
    }
    return environment


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


def _confusions(run: EvaluationRun) -> list[dict[str, Any]]:
    """A matrix of each kind and model."""
    found = []
    for kind in ("style", "object"):
        marked = run.concepts if run.template == kind else ()
        matrices: dict[str, Markup] = {}
        for model in MODELS:
            if model in run.predictions:
                counts = confusion(run.predictions[model], kind, run.metrics.get(f"{kind}s", ()))
                matrices[model] = confusion_matrix(counts, marked=marked, title=f"{kind}s, {model}")
        if matrices:
            found.append({"kind": kind, "matrices": matrices})
    return found


def _losses(training: TrainingRun | None) -> list[Markup]:
    """A figure for each term that the run has noted."""
    if training is None:
        return []
    return [
        loss_curve(title, curve, training.validation.get(term, []), colour=colour)
        for term, (title, colour) in _TERMS.items()
        if (curve := training.losses.get(term))
    ]


def _unet(training: TrainingRun | None) -> Markup | None:
    if training is None or training.mask is None or not training.mask.get("kept_fraction"):
        return None
    return unet_picture(training.mask["kept_fraction"], training.weight_names)


def _pictures(training: TrainingRun | None, stem: str) -> list[Path]:
    return [] if training is None else [path for path in training.pictures if path.stem.startswith(stem)]


def _sizes(training: TrainingRun | None) -> dict[str, int | None]:
    """Bytes of the files of a training run; None where there is none."""
    if training is None:
        return {}
    return {key: _bytes(training.file(key)) for key in ("checkpoint", "patch", "mask")}


def _bytes(path: Path | None) -> int | None:
    if path is None:
        return None
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _times(training: TrainingRun | None, spent: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part."""
    found = {} if training is None else {"training": training.metrics.get("seconds")}
    found["evaluation"] = spent.get("seconds")
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def _memories(training: TrainingRun | None, spent: Mapping[str, Any]) -> dict[str, int]:
    """Peak bytes of each part, of the process and of CUDA."""
    parts = {
        "training": {} if training is None else training.metrics.get("peak_memory_bytes", {}),
        "evaluation": spent.get("peak_memory_bytes", {}),
    }
    return {f"{part}, {where}": peak for part, peaks in parts.items() for where, peak in peaks.items()}


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


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
    return ", ".join(map(_setting, value)) if isinstance(value, list) else str(value)
