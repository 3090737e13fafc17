"""The rows of the results table before they are made: each method for a concept, with each size of its mask."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS, Method
from benchmarks.table_config import CONCEPTS, TableConfig
from benchmarks.table_text import exact
from mu.config import Config, keys_of, override
from mu.datasets.emoji_canvas import STYLES

_PLACES = {
    "output_dir",
    "processed_dataset_dir",
    "mask_path",
    "ckpt_path",
    "model_config_path",
    "use_ema",
    "devices",
    "resume",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "logger",
}
"""Keys that do not decide what a concept becomes, or (of the model) decide it through the model's fingerprint."""


@dataclass(frozen=True)
class PlannedRow:
    """A row that is to be made: a concept, and how it is forgotten.

    Attributes:
        threshold: fraction of the weights in the mask; None without one.
        mask: how its mask is made; None without one, or with one that training draws itself.
        recipe: name of the YAML that `train` was made from.
        folder: where `made.json` and the unlearned model are.
    """

    name: str
    threshold: float | None
    mask: Config | None
    train: Any
    recipe: str
    folder: Path

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def settings(self, model: str) -> str:
        """SHA-256 of all that decides what is unlearned, but for where files lie. `model` is the base's fingerprint."""
        mask = None if self.mask is None else deciding(self.mask)
        decides = [self.name, mask, deciding(self.train), model]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def kind_of(concept: str) -> str:
    return "style" if concept in STYLES else "object"


def concept_folder(config: TableConfig, concept: str) -> Path:
    """Where all rows of a concept lie, of every table in this output_dir."""
    return Path(config.output_dir) / "runs" / f"{kind_of(concept)}-{concept}"


def planned_rows(config: TableConfig, concept: str) -> list[PlannedRow]:
    """The rows of a concept: each method, and of those with a mask each threshold.

    All that they make lies in the concept's folder: the masks in `masks`, which all rows share, the rest in
    `<method>-<threshold>` or `<method>`.
    """
    kind, folder = kind_of(concept), concept_folder(config, concept)
    here = {
        "template": kind,
        "template_name": concept,
        "devices": config.devices,
        "processed_dataset_dir": str(Path(config.output_dir) / "processed"),
    }
    salun_mask = METHODS["salun"].mask
    assert salun_mask is not None
    found = []
    for name in config.methods:
        # 1. How it is trained, whatever its mask
        method = METHODS[name]
        recipe: Any = method.train.load(kind, config.recipes)
        changes = {key: value for key, value in here.items() if hasattr(recipe, key)} | dict(method.changes)
        if method.seed_key is not None:
            changes[method.seed_key] = getattr(recipe, method.seed_key) + CONCEPTS.index(concept)
        if method.mask is not None:
            changes["mask_path"] = str(folder / "masks")
        train: Any = override(recipe, **changes)

        # 2. Without a mask one row; else one for each size: those asked for, or that of SalUn's recipe
        mask: Any = None
        thresholds: tuple[float | None, ...] = (None,)
        if method.size_key is not None and train.masking != "none":
            mask = salun_mask.load(kind, config.recipes)
            thresholds = config.thresholds or (float(recipe.threshold or mask.thresholds[0]),)
        for threshold in thresholds:
            own = folder / (name if threshold is None else f"{name}-{exact(threshold)}")
            size = {} if threshold is None else {str(method.size_key): threshold}
            made = None
            if method.mask is not None and threshold is not None:
                made = override(mask, **here, threshold=threshold, output_dir=str(folder / "masks"))
            row = override(train, **size, output_dir=str(own / "runs"))
            found.append(PlannedRow(name, threshold, made, row, method.train.recipe.format(kind=kind), own))
    return found


def deciding(config: Config) -> dict[str, Any]:
    """The keys that decide what a concept becomes, where they are not at their defaults."""
    return {
        key.name: value
        for key in keys_of(type(config))
        if key.name not in _PLACES and (value := getattr(config, key.name)) != key.default
    }
