"""The plans of SalUn's two runs: a mask, and a training under it; see `mu.unlearning.inspection`."""

from __future__ import annotations

import math
from pathlib import Path

from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import (
    MaskError,
    check_fingerprint,
    check_shapes,
    load_mask_metadata,
    marks_of,
)
from mu.algorithms.saliency_unlearning.utils import find_mask
from mu.config import ConfigError
from mu.unlearning.image_data import training_steps
from mu.unlearning.inspection import Inspection
from mu.unlearning.moving import names_of
from mu.unlearning.plan import Plan, PlannedFiles

_HEADER_BYTES = 160
"""What the head of a mask takes for a tensor: name, place and shape."""


def plan_mask(config: MaskConfig) -> Plan:
    """The plan of a mask.

    Raises:
        ModelConfigError: the model's YAML cannot be used; all else is in the plan's `problems`.
    """
    seen = Inspection(config)
    seen.read_rows(retain=False)
    images = max(1, len(seen.rows.forget)) * config.draws_per_image

    # Whether a threshold keeps anything.
    names = seen.noting(lambda: names_of(seen.unet, config.train_method)) or []
    total, in_method = sum(seen.numel.values()), sum(seen.numel[name] for name in names)
    ranked = in_method if config.pool == "train_method" else total
    for threshold in config.thresholds:
        if not int(threshold * ranked):
            seen.problems.append(ConfigError([f"threshold: {threshold} keeps none of {ranked:,} weights"]))

    masks = PlannedFiles(  # a bit a weight
        what="mask_*.safetensors",
        folder=Path(config.output_dir),
        key="output_dir",
        bytes=len(config.thresholds) * (total // 8 + _HEADER_BYTES * len(seen.numel)),
    )
    return seen.plan(
        "mask",
        steps=math.ceil(images / config.batch_size),
        weights={
            "total": total,
            "train_method": in_method,
            "selected": int(max(config.thresholds) * ranked),
        },
        files=[masks, *seen.cache_files()],
    )


def plan_training(config: TrainConfig) -> Plan:
    """The plan of a training run; its `inputs` have the mask, as `mask_path`.

    Raises:
        ModelConfigError: the model's YAML cannot be used; all else is in the plan's `problems`.
    """
    seen = Inspection(config)
    seen.read_rows(retain=True)
    steps = training_steps(config, seen.rows)

    # The mask: found, of this structure, marks something that may move, made from these very weights.
    names = seen.noting(lambda: names_of(seen.unet, config.train_method)) or []
    mask = seen.noting(lambda: find_mask(config)) if config.masking == "saliency" else None
    selected: dict[str, int] = {}
    if mask is not None or config.masking != "saliency":
        selected = seen.noting(lambda: _selected(config, seen, names, mask)) or {}
    fingerprint = None
    if mask is not None and not seen.problems:
        fingerprint = seen.noting(lambda: _checked_fingerprint(seen, mask))

    pictured = 2 + (steps // config.sample_every_steps if config.sample_every_steps is not None else 0)
    return seen.plan(
        "training",
        steps=steps,
        weights={
            "total": sum(seen.numel.values()),
            "train_method": sum(seen.numel[name] for name in names),
            "selected": sum(selected.values()),
        },
        files=[
            *seen.output_files(selected, pictured=pictured),
            *seen.run_checkpoints(selected, steps=steps),
            *seen.cache_files(),
        ],
        inputs={"mask_path": mask} if mask is not None else {},
        unet_fingerprint=fingerprint,
    )


def _checked_fingerprint(seen: Inspection, mask: Path) -> str | None:
    """The UNet's, once compared with the one that the mask was made from; None where the mask tells none."""
    metadata = load_mask_metadata(mask)
    if "model_fingerprint" not in metadata:
        return None
    fingerprint = seen.unet_fingerprint()
    check_fingerprint(metadata, fingerprint)
    return fingerprint


def _selected(config: TrainConfig, seen: Inspection, names: list[str], mask: Path | None) -> dict[str, int]:
    """Name -> entries that will move, of tensors that have any.

    Raises:
        MaskError: the mask is damaged, is of another model, or marks nothing that may move.
    """
    if mask is not None:
        shapes, marks = marks_of(mask)
        check_shapes(shapes, seen.unet)
    elif config.masking == "random":
        # The draw is over all of them together: this is what a tensor has on average.
        marks = {name: math.ceil(config.random_fraction * count) for name, count in seen.numel.items()}
    else:
        marks = seen.numel
    selected = {name: marks[name] for name in names if marks[name]}
    if not selected and names:
        raise MaskError(
            f"mask_path: the mask marks none of the weights that train_method {config.train_method!r} moves"
        )
    return selected
