"""Measures what a model forgot and what it kept: sample every prompt of the grid, classify, count.

The images are kept in `<output_dir>/grids`, see `mu.evaluation.grid`, the results in a new run folder beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from PIL import Image

from mu.atomic import write_atomically
from mu.config import Config, resolve_path
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.generated import SampleSettings
from mu.datasets.index import concept_label
from mu.devices import resolve_devices
from mu.evaluation.classifier import load_classifier
from mu.evaluation.grid import EvaluationError, Grid, MeasuredModel, check_classifier, measure
from mu.evaluation.metrics import (
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
from mu.run_folder import RunFolder

__all__ = ["EvaluationError", "EvaluationSettings", "Grid", "MeasuredModel", "measure", "run"]

SCORES = ("UA", "IRA", "CRA", "own")


class EvaluationSettings(Protocol):
    """What `run` reads of its config; the meaning of each key is in the config class of the evaluate command."""

    @property
    def base_ckpt_path(self) -> str | None: ...
    @property
    def model_config_path(self) -> str: ...
    @property
    def use_ema(self) -> bool: ...
    @property
    def devices(self) -> str: ...
    @property
    def template(self) -> str: ...
    @property
    def template_name(self) -> str | tuple[str, ...]: ...
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
    def precision(self) -> str: ...
    @property
    def cra_prompts(self) -> str: ...
    @property
    def left_out(self) -> tuple[str, ...]: ...
    @property
    def classifier_path(self) -> str: ...
    @property
    def output_dir(self) -> str: ...
    def checkpoint(self) -> Path: ...


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

    with RunFolder.create(config.output_dir, concept_label(config.template_name)) as run:
        if isinstance(config, Config):
            run.save_config(config)
        run.save_environment()
        measured: dict[str, MeasuredModel] = {}
        for name, path in checkpoints.items():
            run.logger.info("%s unlearning: %s", name, path)
            model = load_model(
                resolve_path(config.model_config_path), path, device=device, use_ema=config.use_ema
            )
            measured[name] = measure(
                model,
                classifier,
                grid,
                settings=SampleSettings(
                    config.sample_steps, config.guidance_scale, model.image_size, config.precision
                ),
                batch_size=config.batch_size,
                folder=config.output_dir,
            )
            del model  # only one is in memory
            write_atomically(
                run.path / f"predictions_{name}.csv", predictions_csv(measured[name].predictions)
            )
        scores = {
            name: unlearning_scores(
                found.predictions,
                template=config.template,
                template_name=config.template_name,
                cra_prompts=config.cra_prompts,
                left_out=config.left_out,
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
            "cra_prompts": config.cra_prompts,
            "left_out": ", ".join(config.left_out) or "none",
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
    crossed = f"the other {kind}s" if scores.cra_prompts == "retained" else f"all {kind}s"
    return {
        "UA": f"images of the prompts of {name} that are not seen as {name}",
        "IRA": f"images of the other {kind}s that are seen as their {kind}",
        "CRA": f"images of {crossed} that are seen as their {other}",
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
            "template_name": scores["after"].template_name,
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
        rows.append([name, config.template, score.template_name, *numbers])
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
        title=f"{config.template.capitalize()} {concept_label(config.template_name)} forgotten (framed): "
        f"same prompts, seed {seed}",
        path=path,
    )
