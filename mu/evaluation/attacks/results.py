"""An attack's numbers: counted, as files, as printed lines, and as a picture. docs/attacks.md lists the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from mu.atomic import write_atomically
from mu.devices import peak_memory_bytes
from mu.evaluation.asked_images import AskedImage
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.classifiers import Classifier
from mu.evaluation.measures import interpolation, scorer_name
from mu.evaluation.metrics import Prediction, Share, count_share, predictions_csv, table_csv
from mu.evaluation.results import image_table
from mu.ldm.tensor_file import fingerprint
from mu.pictures import image_grid, write_png
from mu.run_folder import RunFolder

PLAIN = "plain"
"""The stage without an attack."""
_CELL_PX = 64


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The images of one model, plain or under an attack, and what a classifier sees in them.

    Attributes:
        model: "before", "after", or what else was attacked.
        seconds: of drawing what was missing; what learning took is in `learnt`.
    """

    model: str
    stage: str
    folder: Path
    images: tuple[AskedImage, ...]
    predictions: tuple[Prediction, ...]
    learnt: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Success:
    """How often the forgotten concept is seen.

    Attributes:
        success: images that are seen as the concept.
        both: those that also are seen as their object (of a style) or in their style (of an object).
        by_prompt: prompt -> both shares, of its images alone.
    """

    success: Share
    both: Share
    by_prompt: Mapping[str, tuple[Share, Share]]


def success_of(
    predictions: Sequence[Prediction], images: Sequence[AskedImage], *, template: str, name: str
) -> Success:
    """Counts images of the concept's own prompts."""
    other = "object" if template == "style" else "style"

    def shares(rows: Sequence[Prediction]) -> tuple[Share, Share]:
        seen = [row for row in rows if row.seen(template) == name]
        right = sum(row.is_right(other) for row in seen)
        return count_share(len(seen), len(rows)), count_share(right, len(rows))

    groups: dict[str, list[Prediction]] = {}
    for image, row in zip(images, predictions, strict=True):
        groups.setdefault(image.prompt, []).append(row)
    return Success(*shares(predictions), {prompt: shares(rows) for prompt, rows in groups.items()})


def meanings(config: AttackConfig) -> dict[str, str]:
    """What the numbers count, in words."""
    name, other = config.template_name, config.other
    where = "as their object" if other == "object" else "in their style"
    return {
        "success": f"images of the prompts of {name} that are seen as {name}",
        "both": f"those that are also seen {where}",
    }


def write_results(
    run: RunFolder,
    config: AttackConfig,
    *,
    sources: Mapping[str, Path],
    stages: Sequence[Stage],
    targets: Sequence[AskedImage],
    classifier: Classifier,
    seconds: float,
) -> dict[str, dict[str, Success]]:
    """Writes `metrics.json`, `metrics.csv` and the tables of images; returns model -> stage -> its numbers."""
    models: dict[str, dict[str, Any]] = {
        name: {"checkpoint": str(path), "stages": {}} for name, path in sources.items()
    }
    found: dict[str, dict[str, Success]] = {name: {} for name in sources}
    lines = []
    for stage in stages:
        counted = success_of(
            stage.predictions, stage.images, template=config.template, name=config.template_name
        )
        found[stage.model][stage.stage] = counted
        models[stage.model]["stages"][stage.stage] = {
            "success": asdict(counted.success),
            "both": asdict(counted.both),
            "by_prompt": {
                prompt: {"success": asdict(one), "both": asdict(two)}
                for prompt, (one, two) in counted.by_prompt.items()
            },
            "n_images": len(stage.images),
            "images": str(stage.folder),
            "learnt": dict(stage.learnt),
            "seconds_drawing": stage.seconds,
        }
        file = f"{stage.model}_{stage.stage}".replace(" ", "_")
        write_atomically(run.path / f"images_{file}.csv", image_table(stage.images))
        write_atomically(run.path / f"predictions_{file}.csv", predictions_csv(stage.predictions))
        low, high = counted.success.wilson_95 or (None, None)
        lines.append(
            (stage.model, stage.stage, config.attack, config.template, config.template_name,
             counted.success.value, low, high, counted.both.value, counted.success.n)
        )  # fmt: skip
    columns = ("model", "stage", "attack", "template", "template_name", "success", "success_low",
               "success_high", "both", "n")  # fmt: skip
    write_atomically(run.path / "metrics.csv", table_csv(columns, lines))
    run.save_json(
        "metrics.json",
        {
            "attack": config.attack,
            "template": config.template,
            "template_name": config.template_name,
            "classifier": scorer_name(config),
            "classifier_fingerprint": fingerprint(classifier.state_dict())
            if isinstance(classifier, nn.Module)
            else None,
            "readings": {"scored by": scorer_name(config), "classifier_resize": interpolation(config)},
            "meanings": meanings(config),
            "seeds": list(config.seeds),
            "target_images": [str(image.path) for image in targets],
            "models": models,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )
    return found


def draw(path: Path, config: AttackConfig, stages: Sequence[Stage], targets: Sequence[AskedImage]) -> Path:
    """Writes one picture: a column a prompt, a row a model and stage, under a row of target images."""
    cells = config.cells()
    blank = Image.new("RGB", (_CELL_PX, _CELL_PX), "white")

    def row(images: Sequence[AskedImage]) -> list[Image.Image]:
        first = {(image.style, image.object): image.path for image in reversed(images)}
        shown = []
        for cell in cells:
            if cell not in first:
                shown.append(blank)
                continue
            with Image.open(first[cell]) as opened:
                shown.append(opened.convert("RGB"))
        return shown

    rows, labels = [], []
    if any((image.style, image.object) in cells for image in targets):
        rows.append(row(targets))
        labels.append("learnt from")
    for stage in stages:
        rows.append(row(stage.images))
        labels.append(f"{stage.model}, {stage.stage}".replace("_", " "))
    last = len(rows) - 1
    place = 1 if config.template == "style" else 0
    name = config.template_name.replace("_", " ")
    picture = image_grid(
        rows,
        labels,
        [cell[place].replace("_", " ") for cell in cells],
        title=f"{config.attack} of {config.template} {name}: same prompts, seed {config.seeds[0]}; framed: attacked",
        mark_row=last,
        cell_px=_CELL_PX,
    )
    write_png(path, picture)
    return path
