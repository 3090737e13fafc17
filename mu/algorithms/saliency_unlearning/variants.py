"""The rows of the results table before they are made: for a concept, each method with each threshold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mu.algorithms.saliency_unlearning.configs import BenchmarkConfig, MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.configs.benchmarking import METHODS
from mu.config import Config, keys_of, load_config, override
from mu.datasets.emoji_canvas import OBJECTS, STYLES

_PLACES = [
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
]
"""Keys that do not decide what a concept becomes, or (of the model) decide it through the model's fingerprint."""
_FIRST_KEYS = """
alpha batch_size c_guidance dataset_type draws_per_image epochs guidance_scale image_size images_per_prompt lr
lr_schedule mask_seed masking num_timesteps objects output_format pool precision raw_dataset_dir
retain_batch_size retain_images_per_prompt sample_prompts sample_seeds sample_steps seed styles substitute
target template template_name threshold train_method use_sample wandb wandb_project
"""
"""Keys that always count among a row's settings. One that came later counts where it is not at its default, so that
the rows of older tables stay."""


@dataclass(frozen=True)
class Variant:
    """A row that is to be made: a concept, and how it is forgotten.

    Attributes:
        threshold: fraction of the weights in the mask; None without one.
        mask: how its saliency mask is made; it has none if `train.masking` is not saliency.
        folder: where `made.json` and the unlearned model are.
    """

    method: str
    threshold: float | None
    mask: MaskConfig
    train: TrainConfig
    folder: Path

    def settings(self, model: str) -> str:
        """SHA-256 of all that decides what is unlearned, but for where files lie. `model` is the base's fingerprint."""
        mask = deciding(self.mask) if self.method == "salun" else None
        decides = [[mask, deciding(self.train)], model]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def kind_of(name: str) -> str:
    return "style" if name in STYLES else "object"


def concept_folder(config: BenchmarkConfig, name: str) -> Path:
    """Where all rows of a concept lie, of every table in this output_dir."""
    return Path(config.output_dir) / "runs" / f"{kind_of(name)}-{name}"


def recipes(config: BenchmarkConfig, name: str) -> tuple[MaskConfig, TrainConfig]:
    """The mask and training config of a concept: its kind's recipes, with everything below this table's folder."""
    kind = kind_of(name)
    runs = concept_folder(config, name)
    shared = {
        "template": kind,
        "template_name": name,
        "devices": config.devices[0],
        "processed_dataset_dir": str(Path(config.output_dir) / "processed"),
    }
    paths = {key: getattr(config, f"{kind}_{key}") for key in ("mask", "train")}
    mask = load_config(MaskConfig, config_path=paths["mask"])
    train = load_config(TrainConfig, config_path=paths["train"])
    return (
        override(mask, **shared, output_dir=str(runs / "masks")),
        override(train, **shared, output_dir=str(runs / "finetuned_models"), mask_path=str(runs / "masks")),
    )


def variants(config: BenchmarkConfig, name: str) -> list[Variant]:
    """The rows of a concept: each method, and of those with a mask each threshold.

    The recipe as it is has its files in the concept's folder, the others in `<method>-<threshold>` below it.
    """
    mask, recipe = recipes(config, name)
    found = []
    for method in config.methods:
        changes: dict[str, Any] = dict(METHODS[method])
        if method == "random":
            # A mask of its own for each concept: else all rows would share the luck of one draw.
            seed = recipe.mask_seed + (*STYLES, *OBJECTS).index(name)
            changes |= {"mask_pool": mask.pool, "mask_seed": seed}
        train = override(recipe, **changes)
        masked = train.masking != "none"
        for threshold in (masked and config.thresholds) or (recipe.threshold,):
            folder = concept_folder(config, name)
            if method != "salun" or threshold != recipe.threshold:
                folder /= f"{method}-{threshold}" if masked else method
            found.append(
                Variant(
                    method,
                    threshold if masked else None,
                    override(mask, threshold=threshold) if config.thresholds else mask,
                    override(train, threshold=threshold, output_dir=str(folder / "finetuned_models")),
                    folder,
                )
            )
    return found


def deciding(config: Config) -> dict[str, Any]:
    """The keys that decide what a concept becomes."""
    was = {"wandb": "off"}  # what null meant when these keys were first counted
    first = set(_FIRST_KEYS.split()) - ({"precision"} if isinstance(config, MaskConfig) else set())
    return {
        key.name: was.get(key.name) if value is None else value
        for key in keys_of(type(config))
        if key.name not in _PLACES
        and ((value := getattr(config, key.name)) != key.default or key.name in first)
    }
