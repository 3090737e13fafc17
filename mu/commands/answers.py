"""What the commands say at their end: in plain words what was made, where it is, and what can be typed next.

Each function takes the settings, the result of the run, and the settings file that was given (None without one). All
numbers of a run are in its metrics.json, and `--json` prints them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mu.cli import recipe_beside
from mu.console import Answer, called, duration
from mu.datasets.index import concept_names, concept_words
from mu.run_folder import RESULT

_SALUN = "mu.algorithms.saliency_unlearning.scripts"
Result = Mapping[str, Any]


def masked(config: Any, result: Result, config_path: str | None) -> Answer:
    """Of generate_mask."""
    kept, total = result["kept"], result["total"]
    shares = ", ".join(
        f"{count:,} ({count / total:.1%}{f', threshold {threshold:g}' if len(kept) > 1 else ''})"
        for threshold, count in kept.items()
    )
    masks = {
        "mask" if len(kept) == 1 else f"mask {threshold:g}": path
        for threshold, path in result["masks"].items()
    }
    recipe = recipe_beside(config_path, "train") or _of_both_stages(config_path) or "YOUR.yaml"
    train = ["--config_path", recipe, *_concept(config), "--mask_path", str(next(iter(masks.values())))]
    return Answer(
        [
            f"Found the weights that matter most for {_what(config)}: {shares} of the {total:,} weights of the "
            f"UNet, from {_count(result['images'], 'image')}, in {duration(result['seconds'])}."
        ],
        made={**masks, "numbers": result["run"] / RESULT},
        following=[("To forget it, moving these weights alone", _command("train", train))],
    )


def trained(config: Any, result: Result, config_path: str | None) -> Answer:
    """Of all methods' train."""
    moved, total = result["weights_changed"], result["weights_total"]
    steps = f" by {_count(result['steps'], 'step')}" if "steps" in result else ""
    kind = "in the mask" if result.get("mask") is not None else "that may move"
    recipe = recipe_beside(config_path, "evaluate")
    run = str(result["run"])
    following = []
    if recipe is not None:
        words = ["--config_path", recipe, *_concept(config), "--ckpt_path", run]
        following.append(("To measure what it forgot and what it kept", _command("evaluate", words)))
    model = ["--model_config_path", config.model_config_path]
    if config.output_format != "diffusers":
        words = [str(result["checkpoint"]), f"{run}/{_DIFFUSERS}", *model]
        following.append(("For diffusers", _command("convert", words)))
    return Answer(
        [
            f"Made the model forget {_what(config)}{steps}, in {duration(result['seconds'])}: {moved:,} of its "
            f"{total:,} UNet weights changed, and not one bit of the file outside the {result['weights_selected']:,} "
            f"{kind}."
        ],
        made={
            "model": result["checkpoint"],
            "patch": result["patch"],
            "pictures": result["pictures"],
            "report": result.get("report"),
            "numbers": result["run"] / RESULT,
        },
        following=following,
    )


def sampled(config: Any, result: Result, config_path: str | None) -> Answer:  # noqa: ARG001
    """Of sample."""
    new, every = result["sampled"], result["images"]
    drew = f"{new:,} of {_count(every, 'image')}" if new < every else _count(every, "image")
    return Answer(
        [
            f"Drew {drew} in {duration(result['seconds'])}{'; the rest was there already' if new < every else ''}."
        ],
        made={
            "images": result["run"] / "images",
            "grid": result.get("grid"),
            "index": result["index"],
            "numbers": result["run"] / RESULT,
        },
    )


def evaluated(config: Any, result: Result, config_path: str | None) -> Answer:  # noqa: ARG001
    """Of evaluate: the scores as a table, a line for each."""
    measured = {
        key: value for key, value in result.items() if isinstance(value, Mapping) and "meaning" in value
    }
    shares = {key: value for key, value in measured.items() if "after, %" in value}
    lines = [
        f"Measured {_count(result['images of each model'], 'image')} of each model, in "
        f"{duration(result['seconds'])}; to be forgotten: {_what(config)}."
    ]
    if shares:
        models = [name for name in ("before", "after") if f"{name}, %" in next(iter(shares.values()))]
        width = max(len(value["meaning"]) for value in shares.values())
        lines.append(f"{'':{width + 6}}" + "".join(f"{name:>9}" for name in models))
        for key, value in shares.items():
            cells = [value[f"{name}, %"] for name in models]
            numbers = "".join("        -" if cell is None else f"{cell:>7.1f} %" for cell in cells)
            label = key if key in ("UA", "IRA", "CRA") else "own"
            lines.append(f"{label:<6}{value['meaning']:<{width}}{numbers}")
    for key, value in measured.items():
        if key not in shares:
            lines += [f"{key}, {name}: {value[name]}" for name in ("before", "after") if name in value]
    run = Path(result["run"])
    return Answer(
        lines,
        made={"report": result.get("report"), "picture": result.get("picture"), "numbers": run / RESULT},
    )


def converted(config: Any, result: Result, config_path: str | None) -> Answer:  # noqa: ARG001
    """Of convert."""
    lines = [f"Read {result['read']} ({result['kind']}) and wrote it as {result['format']}{_dtype(result)}."]
    usage = f'StableDiffusionPipeline.from_pretrained("{result["wrote"]}")'
    return Answer(
        lines,
        made={"model": result["wrote"]},
        following=[("In Python, with diffusers", usage)] if result["format"] == "diffusers" else [],
    )


def patched(config: Any, result: Result, config_path: str | None) -> Answer:  # noqa: ARG001
    """Of apply_patch."""
    what = "Took off" if config.remove else "Put on"
    return Answer(
        [
            f"{what} {_count(len(config.patches), 'patch', 'patches')}: {_count(result['entries'], 'weight')} changed."
        ],
        made={"model": result["wrote"], "patch to take it off again": result.get("combined_patch")},
    )


def reported(config: Any, result: Result, config_path: str | None) -> Answer:  # noqa: ARG001
    """Of report."""
    return Answer(
        [f"Wrote the report of {result['run']}; it is one file that opens in any browser."],
        made={"report": result["report"]},
    )


_DIFFUSERS = "diffusers"
"""Where the suggested conversion writes, in the run's folder."""


def _what(config: Any) -> str:
    return concept_words(config.template, config.template_name)


def _of_both_stages(config_path: str | None) -> str | None:
    """The settings file itself, unless its name says that it is the mask's."""
    return None if config_path is None or Path(config_path).name.startswith("mask_") else config_path


def _concept(config: Any) -> list[str]:
    return ["--template_name", ",".join(concept_names(config.template_name))]


def _command(door: str, words: list[str]) -> str:
    return f"{called(f'{_SALUN}.{door}')} {shlex.join(words)}"


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _dtype(result: Result) -> str:
    return "" if result["dtype"] == "source" else f", in {result['dtype']}"
