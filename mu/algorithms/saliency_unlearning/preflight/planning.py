"""From a config to the plan of its run: nothing is loaded, made or written.

No values are read but those of a mask, and of the UNet that it says it was made from.

What is found wrong is not raised but noted, so that a plan names all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import (
    MaskError,
    check_fingerprint,
    check_shapes,
    load_mask_metadata,
    marks_of,
)
from mu.algorithms.saliency_unlearning.preflight.plan import Plan, PlannedFiles, disk_problems
from mu.algorithms.saliency_unlearning.preflight.subject import Subject
from mu.algorithms.saliency_unlearning.preflight.written import mask_files, training_files
from mu.algorithms.saliency_unlearning.utils import find_mask
from mu.config import ConfigError
from mu.datasets.images import check_images
from mu.errors import MuError
from mu.ldm.checkpoint import check_state_dict, read_checkpoint
from mu.ldm.patch import base_fingerprint
from mu.ldm.tensor_file import open_state_dict
from mu.unlearning.checkpoints import (
    find_run_state,
    run_checkpoint_bytes,
)
from mu.unlearning.compute import (
    Compute,
    choose_for,
)
from mu.unlearning.moving import names_of
from mu.unlearning.output import (
    check_save_dtype,
    original_of,
)

T = TypeVar("T")


class Problems:
    """What was found wrong so far."""

    def __init__(self) -> None:
        self.found: list[MuError] = []

    def of(self, check: Callable[[], T]) -> T | None:
        """What `check` gives; or None, and its error is noted."""
        try:
            return check()
        except MuError as error:
            self.found.append(error)
            return None


def plan_mask(config: MaskConfig) -> Plan:
    """The plan of a mask.

    Raises:
        MuError: the model's structure cannot be built; all else is in the plan's `problems`.
    """
    problems = Problems()
    subject = Subject.of(config, problems.of)
    images = max(1, len(subject.rows.forget)) * config.draws_per_image
    methods = problems.of(lambda: names_of(subject.unet, config.train_method)) or []
    in_method = sum(subject.numel[name] for name in methods)
    ranked = in_method if config.pool == "train_method" else subject.total
    for threshold in config.thresholds:
        if not int(threshold * ranked):
            problems.found.append(ConfigError([f"threshold: {threshold} keeps none of {ranked:,} weights"]))
    return _plan(
        "mask",
        config,
        subject,
        problems,
        compute=choose_for(config, subject.device),
        steps=math.ceil(images / config.batch_size),
        weights={
            "total": subject.total,
            "train_method": in_method,
            "selected": int(max(config.thresholds) * ranked),
        },
        files=mask_files(config, subject),
    )


def plan_training(config: TrainConfig) -> Plan:
    """The plan of a training run.

    Raises:
        MuError: the model's structure cannot be built; all else is in the plan's `problems`.
    """
    problems = Problems()
    subject = Subject.of(config, problems.of)
    steps = config.epochs * math.ceil(max(1, len(subject.rows.forget)) / config.batch_size)
    methods = problems.of(lambda: names_of(subject.unet, config.train_method)) or []
    mask = problems.of(lambda: find_mask(config)) if config.masking == "saliency" else None
    selected: dict[str, int] = {}
    if mask is not None or config.masking != "saliency":
        selected = problems.of(lambda: _selected(config, subject, methods, mask)) or {}
    compute = choose_for(config, subject.device)
    there = problems.of(lambda: run_checkpoint_bytes(config)) or 0
    fingerprint = None
    if mask is not None and not problems.found:
        fingerprint = problems.of(lambda: _fingerprint_of_checkpoint(config, subject, mask))
    return _plan(
        "training",
        config,
        subject,
        problems,
        compute=compute,
        steps=steps,
        weights={
            "total": subject.total,
            "train_method": sum(subject.numel[name] for name in methods),
            "selected": sum(selected.values()),
        },
        files=training_files(config, subject, selected, steps=steps, there=there),
        mask=mask,
        fingerprint=fingerprint,
    )


def _fingerprint_of_checkpoint(config: TrainConfig, subject: Subject, mask: Path) -> str | None:
    """Of its UNet, once it has been compared with that of the mask; None where the mask tells none.

    Raises:
        MaskError: the mask says that it was made from another checkpoint.
    """
    metadata = load_mask_metadata(mask)
    if "model_fingerprint" not in metadata:
        return None
    found = read_checkpoint(
        subject.checkpoint, subject.params, use_ema=config.use_ema, read=open_state_dict
    ).tensors
    fingerprint = base_fingerprint(found)
    check_fingerprint(metadata, fingerprint)
    return fingerprint


def _plan(
    stage: str,
    config: MaskConfig | TrainConfig,
    subject: Subject,
    problems: Problems,
    *,
    compute: Compute,
    steps: int,
    weights: dict[str, int],
    files: list[PlannedFiles],
    mask: Path | None = None,
    fingerprint: str | None = None,
) -> Plan:
    lacking, warnings = disk_problems(files)
    warnings += subject.notes
    warnings += config.doubts()
    problems.found += [ConfigError([message]) for message in lacking]
    again = ", activations computed again" if compute.gradient_checkpointing else ""
    return Plan(
        stage=stage,
        device=str(subject.device),
        processes=subject.processes,
        checkpoint=subject.description,
        images=subject.images,
        steps=steps,
        weights=weights,
        files=files,
        compute=f"{compute.precision}{again}",
        problems=problems.found,
        warnings=warnings,
        rows=subject.listed,
        mask=mask,
        unet_fingerprint=fingerprint,
        examine=lambda: _problems_in_values(config, subject),
    )


def _problems_in_values(config: MaskConfig | TrainConfig, subject: Subject) -> list[MuError]:
    """What a run would refuse when it reads all weights, all pixels and the state that it goes on from."""
    problems = Problems()

    def weights() -> None:
        found = read_checkpoint(subject.checkpoint, subject.params, use_ema=config.use_ema)
        check_state_dict(subject.ldm, found.tensors, source=subject.checkpoint)
        if isinstance(config, TrainConfig):
            original = original_of(subject.checkpoint, subject.params, use_ema=config.use_ema)
            check_save_dtype(original, config.save_dtype)

    def pixels() -> None:
        there = [row for row in (*subject.rows.forget, *subject.rows.retain) if row.image.exists()]
        check_images([row.image for row in there], subject.image_size)

    problems.of(weights)
    problems.of(pixels)
    if isinstance(config, TrainConfig) and config.resume is not None:
        problems.of(lambda: find_run_state(config))
    return problems.found


def _selected(config: TrainConfig, subject: Subject, methods: list[str], mask: Path | None) -> dict[str, int]:
    """Name -> entries that will move, of tensors that have any.

    Raises:
        MaskError: the mask is damaged, is of another model, or marks nothing that may move.
    """
    marks = _marks(config, subject, mask)
    selected = {name: marks[name] for name in methods if marks[name]}
    if not selected and methods:
        raise MaskError(
            f"mask_path: the mask marks none of the weights that train_method {config.train_method!r} moves"
        )
    return selected


def _marks(config: TrainConfig, subject: Subject, mask: Path | None) -> dict[str, int]:
    if config.masking == "none":
        return subject.numel
    if config.masking == "random":
        pool: set[str] | dict[str, int] = subject.numel
        if config.mask_pool == "train_method":
            pool = set(names_of(subject.unet, config.train_method))
        # The draw is over all of them together: this is what a tensor has on average.
        return {
            name: math.ceil(config.threshold * count) if name in pool else 0
            for name, count in subject.numel.items()
        }
    assert mask is not None
    shapes, marks = marks_of(mask)
    check_shapes(shapes, subject.unet)
    return marks
