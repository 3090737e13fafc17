"""From a config to the plan of its run: nothing is loaded, made or written, and no values are read but those of a mask.

What is found wrong is not raised but noted, so that a plan names all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from mu import ranks
from mu.algorithms.saliency_unlearning.checkpoints import run_checkpoint_bytes
from mu.algorithms.saliency_unlearning.compute import Compute, choose_for, free_bytes
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.data_handler import SAMPLE_BATCH
from mu.algorithms.saliency_unlearning.mask_file import (
    MaskError,
    check_fingerprint,
    check_shapes,
    load_mask_metadata,
    marks_of,
)
from mu.algorithms.saliency_unlearning.model import names_of
from mu.algorithms.saliency_unlearning.passes import (
    Pass,
    decoding_pass,
    encoding_pass,
    forward_pass,
    gradient_pass,
)
from mu.algorithms.saliency_unlearning.preflight.memory import (
    Moving,
    mask_memory,
    training_memory,
)
from mu.algorithms.saliency_unlearning.preflight.plan import Plan, PlannedFiles, disk_problems, size
from mu.algorithms.saliency_unlearning.preflight.seconds import Work
from mu.algorithms.saliency_unlearning.preflight.subject import Subject, resident_bytes
from mu.algorithms.saliency_unlearning.preflight.work import (
    PICTURE_BATCH,
    mask_work,
    predicted,
    training_work,
    with_gradient,
)
from mu.algorithms.saliency_unlearning.preflight.written import mask_files, training_files
from mu.algorithms.saliency_unlearning.utils import find_mask
from mu.config import ConfigError
from mu.errors import MuError
from mu.ldm.formats import read_checkpoint
from mu.ldm.patch import base_fingerprint
from mu.ldm.tensor_file import open_state_dict
from mu.ldm.text_to_image import sampling_precision

T = TypeVar("T")
Memory = tuple[dict[str, int], dict[str, int]]
"""Phase -> bytes of the process, beside what it holds before; and of the GPU."""
_FLAGS = (
    "micro_batch_size, gradient_checkpointing, precision, optimizer, train_method, image_size or batch_size"
)


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
    at_once = subject.share(min(config.batch_size, images))
    batches = math.ceil(images / config.batch_size)
    methods = problems.of(lambda: names_of(subject.unet, config.train_method)) or []
    in_method = sum(subject.numel[name] for name in methods)
    ranked = in_method if config.pool == "train_method" else subject.total
    for threshold in config.thresholds:
        if not int(threshold * ranked):
            problems.found.append(ConfigError([f"threshold: {threshold} keeps none of {ranked:,} weights"]))
    images = at_once * (2 if config.c_guidance else 1)
    compute = choose_for(
        config,
        subject.params.unet,
        subject.device,
        moving=subject.numel,
        images=images,
        latent_shape=subject.latent_shape,
        left=free_bytes(subject.device) - subject.model.whole - subject.model.unet,
    )
    return _plan(
        "mask",
        config,
        subject,
        problems,
        compute=compute,
        gradients=partial(
            gradient_pass,
            subject.params.unet,
            images,
            subject.latent_shape,
            moving=frozenset(subject.numel),
            precision=compute.precision,
            gradient_checkpointing=compute.gradient_checkpointing,
            device=str(subject.device),
        ),
        memory=lambda activations, passes: mask_memory(
            subject.model,
            passes=passes,
            activations=activations,
            precision=compute.precision,
            thresholds=len(config.thresholds),
            shards=subject.shards,
            cuda=subject.cuda,
        ),
        steps=batches,
        weights={
            "total": subject.total,
            "train_method": in_method,
            "selected": int(max(config.thresholds) * ranked),
        },
        files=mask_files(config, subject),
        work=lambda gradients: mask_work(
            config, subject, compute, gradients, images / at_once / subject.processes
        ),
    )


def plan_training(config: TrainConfig) -> Plan:
    """The plan of a training run.

    Raises:
        MuError: the model's structure cannot be built; all else is in the plan's `problems`.
    """
    problems = Problems()
    subject = Subject.of(config, problems.of)
    forget = max(1, len(subject.rows.forget))
    batch, retain = min(config.batch_size, forget), config.retain_batch_size or config.batch_size
    steps = config.epochs * math.ceil(forget / config.batch_size)
    methods = problems.of(lambda: names_of(subject.unet, config.train_method)) or []
    selected = problems.of(lambda: _selected(config, subject, methods)) or {}
    moving = Moving(selected=selected, numel=subject.numel, mask=config.masking != "none")
    most = config.micro_batch_size or max(batch, retain)
    parts = [min(subject.share(images), most) for images in (batch, retain)]
    at_once = {"salun": sum(parts), "ascent": parts[0], "retain": parts[1]}[config.objective]
    in_method = sum(subject.numel[name] for name in methods)
    moving_names = frozenset(selected or subject.numel)
    compute = choose_for(
        config,
        subject.params.unet,
        subject.device,
        moving=moving_names,
        images=at_once,
        latent_shape=subject.latent_shape,
        left=free_bytes(subject.device) - subject.model.whole - 4 * in_method - 12 * moving.entries,
    )
    there = problems.of(lambda: run_checkpoint_bytes(config)) or 0
    return _plan(
        "training",
        config,
        subject,
        problems,
        compute=compute,
        gradients=partial(
            gradient_pass,
            subject.params.unet,
            at_once,
            subject.latent_shape,
            moving=moving_names,
            precision=compute.precision,
            gradient_checkpointing=compute.gradient_checkpointing,
            device=str(subject.device),
        ),
        memory=lambda activations, passes: training_memory(
            subject.model,
            moving,
            passes=passes,
            activations=activations,
            precision=compute.precision,
            optimizer=config.optimizer,
            frozen=config.objective == "salun" and "frozen" in (config.target, config.retain_target),
            channels_last=compute.channels_last,
            patch=config.patch,
            resumed=config.resume is not None,
            file_dtype_bytes=subject.file_dtype_bytes,
            shards=subject.shards,
            cuda=subject.cuda,
        ),
        steps=steps,
        weights={"total": subject.total, "train_method": in_method, "selected": moving.entries},
        files=training_files(
            config, subject, selected, steps=steps, precision=compute.precision, there=there
        ),
        work=lambda gradients: training_work(
            config,
            subject,
            compute,
            gradients,
            pieces=with_gradient(config, steps, forget, retain) / at_once / subject.processes,
            predicted=predicted(config, steps, forget, retain) / subject.processes,
        ),
        check=lambda: _of_this_checkpoint(config, subject),
    )


def _of_this_checkpoint(config: TrainConfig, subject: Subject) -> None:
    """Raises MaskError where the mask says that it was made from another checkpoint."""
    if config.masking != "saliency":
        return
    metadata = load_mask_metadata(find_mask(config))
    if "model_fingerprint" not in metadata:
        return
    found = read_checkpoint(
        subject.checkpoint, subject.params, use_ema=config.use_ema, read=open_state_dict
    ).tensors
    check_fingerprint(metadata, base_fingerprint(found))


def _plan(
    stage: str,
    config: MaskConfig | TrainConfig,
    subject: Subject,
    problems: Problems,
    *,
    compute: Compute,
    gradients: Callable[[], Pass],
    memory: Callable[[int, Mapping[str, int]], Memory],
    steps: int,
    weights: dict[str, int],
    files: list[PlannedFiles],
    work: Callable[[Pass], Work],
    check: Callable[[], object] = lambda: None,
) -> Plan:
    """A plan with what a run must know before it begins; the rest is found when it is `examined`.

    Args:
        memory: of the bytes at the peak of a pass with gradient, and of other phases' passes -> their bytes.
        work: of a pass with gradient.
    """
    held = resident_bytes()
    free = free_bytes(torch.device("cpu"))
    device_free = free_bytes(subject.device) if subject.cuda else 0
    lacking, warnings = disk_problems(files)
    warnings += subject.notes
    warnings += config.doubts()
    problems.found += [ConfigError([message]) for message in lacking]

    def phases(activations: int, passes: Mapping[str, int]) -> Memory:
        host, device = memory(activations, passes)
        return {name: count + held for name, count in host.items()}, device

    def too_little(host: Mapping[str, int], device: Mapping[str, int]) -> list[str]:
        return [
            f"{where}: about {size(needed)} are needed and {size(there)} there. A pass that does not fit is "
            f"halved; what saves memory: {_FLAGS}"
            for where, needed, there in (
                (
                    "memory",
                    subject.processes_here * max(host.values()),
                    ranks.local_world_size() * held + free,
                ),
                ("memory of the GPU", max(device.values(), default=0), device_free),
            )
            if needed > there
        ]

    # Where `choose` decides for this pass it has counted it, and the run will ask it again; else it is left out.
    counted = config.gradient_checkpointing is None and not compute.gradient_checkpointing
    at_least = phases(gradients().peak if counted else 0, {})

    def examine() -> Plan:
        further = Problems()
        if not problems.found:
            further.of(check)
        host, device = phases(gradients().peak, _passes(config, subject))
        return replace(
            plan,
            memory=host,
            device_memory=device,
            seconds=work(gradients()).seconds(),
            problems=(*plan.problems, *further.found),
            warnings=(*warnings, *too_little(host, device)),
            examine=None,
        )

    again = ", activations computed again" if compute.gradient_checkpointing else ""
    plan = Plan(
        stage=stage,
        device=str(subject.device),
        processes=subject.processes,
        checkpoint=subject.description,
        images=subject.images,
        steps=steps,
        weights=weights,
        files=files,
        compute=f"{compute.precision}{again}",
        memory_held=held,
        memory_free=free,
        device_memory_free=device_free,
        problems=problems.found,
        warnings=(*warnings, *too_little(*at_least)),
        examine=examine,
    )
    return plan


def _passes(config: MaskConfig | TrainConfig, subject: Subject) -> dict[str, int]:
    """Phase -> bytes at the peak of the passes before and beside the steps."""
    device, networks, shape = str(subject.device), subject.params, subject.latent_shape
    pictures = isinstance(config, TrainConfig) and config.sample_prompts != ()
    half = sampling_precision(config.sample_precision, subject.device) == "bf16"
    precision = "bf16-mixed" if half else "fp32"
    wanted = {
        "sample": min(SAMPLE_BATCH, subject.images["to_sample"]),
        "pictures": PICTURE_BATCH if pictures else 0,
    }
    found = {"encode": encoding_pass(networks.first_stage, subject.image_size, device=device).peak}
    for name, count in wanted.items():
        if count:
            predicted = forward_pass(networks.unet, 2 * count, shape, precision=precision, device=device)
            decoded = decoding_pass(networks.first_stage, 1, shape, precision=precision, device=device)
            found[name] = max(predicted.peak, decoded.peak)
    return found


def _selected(config: TrainConfig, subject: Subject, methods: list[str]) -> dict[str, int]:
    """Name -> entries that will move, of tensors that have any.

    Raises:
        MaskError: the mask is damaged, is of another model, or marks nothing that may move.
    """
    marks = _marks(config, subject)
    selected = {name: marks[name] for name in methods if marks[name]}
    if not selected and methods:
        raise MaskError(
            f"mask_path: the mask marks none of the weights that train_method {config.train_method!r} moves"
        )
    return selected


def _marks(config: TrainConfig, subject: Subject) -> dict[str, int]:
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
    path: Path = find_mask(config)
    shapes, marks = marks_of(path)
    check_shapes(shapes, subject.unet)
    return marks
