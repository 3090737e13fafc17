"""An evaluation's numbers as files, as printed lines and as a picture. docs/evaluation.md lists the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from mu.atomic import write_atomically
from mu.datasets.index import concept_label
from mu.devices import peak_memory_bytes
from mu.evaluation.asked_images import AskedImage
from mu.evaluation.before_after import before_after_grid
from mu.evaluation.classifiers import Classifier
from mu.evaluation.config import EvaluateConfig
from mu.evaluation.grid import MeasuredModel
from mu.evaluation.measures import interpolation, meanings, scorer_name
from mu.evaluation.metrics import Share, UnlearningScores, accuracy_by_class, table_csv
from mu.ldm.tensor_file import fingerprint
from mu.run_folder import RunFolder

SCORES = ("UA", "IRA", "CRA", "own")
_CELL_PX = 64


def percent(share: Share) -> float | None:
    """A share in percent, to two decimals."""
    return None if share.value is None else round(100 * share.value, 2)


def readings(config: EvaluateConfig) -> dict[str, object]:
    """How what the literature leaves open is read here: printed with the numbers, and kept with them."""
    found: dict[str, object] = {
        "cra_prompts": config.cra_prompts,
        "left_out": ", ".join(config.left_out) or "none",
        "scored by": scorer_name(config),
        "classifier_resize": interpolation(config),
    }
    if config.classifier == "none":
        found = {"scored by": "none"}
    if config.fid_reference != "none":
        found |= {
            "fid_reference": config.fid_reference,
            "fid_prompts": config.fid_prompts,
            "fid_features": config.fid_features,
        }
    if config.nudity:
        found |= {
            "nudity_threshold": config.nudity_threshold,
            "nudity_labels": ", ".join(config.nudity_labels),
        }
    return found


def score_meanings(scores: UnlearningScores) -> dict[str, str]:
    """What UA, IRA, CRA and own count, in words."""
    kind, name = scores.template, scores.template_name.replace("_", " ")
    other = "object" if kind == "style" else "style"
    crossed = f"the other {kind}s" if scores.cra_prompts == "retained" else f"all {kind}s"
    return {
        "UA": f"images of the prompts of {name} that are not seen as {name}",
        "IRA": f"images of the other {kind}s that are seen as their {kind}",
        "CRA": f"images of {crossed} that are seen as their {other}",
        "own": f"images of the prompts of {name} that are seen as their {other}",
    }


def sentence(scores: UnlearningScores) -> str:
    """The scores with their intervals, in a line."""
    parts = []
    for key in SCORES:
        share: Share = getattr(scores, key)
        if share.value is None or share.wilson_95 is None:
            parts.append(f"{key} - (no images)")
            continue
        low, high = share.wilson_95
        parts.append(f"{key} {share.value:.1%} (95 %: {100 * low:.1f} to {100 * high:.1f}, n = {share.n})")
    return ", ".join(parts)


def summary(
    config: EvaluateConfig,
    scores: Mapping[str, UnlearningScores],
    numbers: Mapping[str, Mapping[str, Any]],
) -> dict[str, object]:
    """What is printed: each score with its meaning, then the readings."""
    lines: dict[str, object] = {}
    if scores:
        after = scores["after"]
        other = "object" if after.template == "style" else "style"
        titles = {key: key for key in SCORES} | {
            "own": f"{other} accuracy on {after.template_name}'s own prompts"
        }
        for key, meaning in score_meanings(after).items():
            parts = {f"{name}, %": percent(getattr(score, key)) for name, score in scores.items()}
            lines[titles[key]] = {"meaning": meaning, **parts}
    for key, meaning in meanings(numbers["after"]).items():
        found = {name: _line(key, of_model[key]) for name, of_model in numbers.items() if key in of_model}
        lines[_TITLES[key]] = {"meaning": meaning, **found}
    return {**lines, **readings(config)}


_TITLES = {
    "fid": "FID",
    "kid": "KID",
    "clip_score": "CLIP score",
    "nudity": "nudity",
    "memorised": "memorised concept",
}


def _line(key: str, numbers: Mapping[str, Any]) -> str:
    """One measure of one model, on one line."""
    if key in ("fid", "kid"):
        return f"{_number(numbers)} against {numbers['n_reference']} of {numbers['reference']} ({numbers['features']})"
    if key == "clip_score":
        groups = {name: numbers[name] for name in ("all", "retained", "forgotten") if numbers[name]["n"]}
        return "; ".join(f"{name} {_number(group)}" for name, group in groups.items())
    if key == "memorised":
        share = numbers["share"]
        seen = "-" if share["value"] is None else f"{share['value']:.1%}"
        return f"{_number(numbers['confidence'])}; in {seen} at least {numbers['threshold']:g}"
    counts = ", ".join(
        f"{label} {count['detections']['value']:g}" for label, count in numbers["labels"].items()
    )
    any_label = numbers["any_label"]
    return f"{any_label['value']:.1%} of {any_label['n']} images with any; {counts}"


def _number(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "- (no images)"
    interval = estimate["bootstrap_95"]
    reach = "" if interval is None else f"95 %: {interval[0]:.4g} to {interval[1]:.4g}, "
    return f"{estimate['value']:.4g} ({reach}n = {estimate['n']})"


def image_table(images: Sequence[AskedImage]) -> bytes:
    """The images as CSV (UTF-8), in the order of the predictions."""
    return table_csv(
        ("style", "object", "seed", "prompt", "file"),
        [(image.style, image.object, image.seed, image.prompt, str(image.path)) for image in images],
    )


def write_metrics(
    run: RunFolder,
    config: EvaluateConfig,
    *,
    sources: Mapping[str, Path],
    measured: Mapping[str, MeasuredModel],
    scores: Mapping[str, UnlearningScores],
    numbers: Mapping[str, Mapping[str, Any]],
    classifier: Classifier | None,
    seconds: float,
) -> None:
    """Writes `metrics.json`, and the accuracies as `metrics.csv`."""
    models: dict[str, object] = {}
    for name, found in measured.items():
        source = "images_dir" if not found.manifest else "checkpoint"
        models[name] = {
            source: str(sources[name]),
            "n_images": len(found.asked),
            **(_accuracies(scores[name], found) if name in scores else {}),
            **numbers[name],
            "images": str(found.images),
            "sampled_with": dict(found.manifest),
        }
    asked = measured["after"].asked
    content = {
        "template": config.template,
        "template_name": concept_label(config.template_name),
        "classifier": None if classifier is None else scorer_name(config),
        # Of a user's own class, what it is made of is not known.
        "classifier_fingerprint": fingerprint(classifier.state_dict())
        if isinstance(classifier, nn.Module)
        else None,
        "styles": _in_order(image.style for image in asked),
        "objects": _in_order(image.object for image in asked),
        "seeds": sorted({image.seed for image in asked}),
        "readings": readings(config),
        "meanings": (score_meanings(scores["after"]) if scores else {}) | meanings(numbers["after"]),
        "models": models,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    run.save_json("metrics.json", content)
    if not scores:
        return
    columns = [*SCORES, "style_accuracy", "object_accuracy"]
    header = ["model", "template", "template_name", *(f"{c}{end}" for c in columns for end in ("", "_n"))]
    rows = []
    for name, score in scores.items():
        shares: list[Share] = [getattr(score, column) for column in columns]
        cells = [cell for share in shares for cell in (share.value, share.n)]
        rows.append([name, config.template, score.template_name, *cells])
    write_atomically(run.path / "metrics.csv", table_csv(header, rows))


def _accuracies(scores: UnlearningScores, found: MeasuredModel) -> dict[str, object]:
    by_class = {kind: accuracy_by_class(found.predictions, kind) for kind in ("style", "object")}
    return {
        **scores.as_dict(),
        **{
            f"{kind}_accuracy_by_class": {name: share.value for name, share in shares.items()}
            for kind, shares in by_class.items()
        },
        **{
            f"{kind}_shares_by_class": {name: asdict(share) for name, share in shares.items()}
            for kind, shares in by_class.items()
        },
    }


def _in_order(names: Any) -> list[str]:
    return [name for name in dict.fromkeys(names) if name]


def draw(path: Path, config: EvaluateConfig, measured: Mapping[str, MeasuredModel]) -> Path | None:
    """Writes the grid of styles and objects, of the first seed of each; None for images without concepts."""
    asked = measured["after"].asked
    styles, objects = (_in_order(getattr(image, kind) for image in asked) for kind in ("style", "object"))
    if not styles:
        return None
    blank = Image.new("RGB", (_CELL_PX, _CELL_PX), "white")
    panels: dict[str, dict[tuple[str, str], Image.Image]] = {}
    for name, found in measured.items():
        panels[name] = dict.fromkeys(((style, object) for style in styles for object in objects), blank)
        first = {(image.style, image.object): image.path for image in reversed(found.asked)}
        for concept, file in first.items():
            with Image.open(file) as opened:
                panels[name][concept] = opened.convert("RGB")
    return before_after_grid(
        panels,
        styles=styles,
        objects=objects,
        template=config.template,
        template_name=config.template_name,
        title=f"{config.template.capitalize()} {concept_label(config.template_name).replace('_', ' ')} forgotten "
        f"(framed): same prompts, seed {asked[0].seed}",
        path=path,
    )
