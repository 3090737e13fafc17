"""The files that a run will write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import stored_form as stored_mask
from mu.algorithms.saliency_unlearning.preflight.files import (
    DIGEST,
    checkpoint_bytes,
    latents_bytes,
    png_bytes,
    prompts_bytes,
    run_state_bytes,
    safetensors_bytes,
)
from mu.algorithms.saliency_unlearning.preflight.plan import PlannedFiles
from mu.algorithms.saliency_unlearning.preflight.subject import Subject
from mu.algorithms.saliency_unlearning.utils import layer_group
from mu.datasets.index import concept_label
from mu.ldm.checkpoint import tensors_of
from mu.ldm.convert import model_spec
from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import ema_name
from mu.ldm.patch import INTEGERS, Patch, TensorPatch, places_kind
from mu.ldm.patch_file import stored_form
from mu.ldm.tensor_file import FINGERPRINT_KEY
from mu.ldm.unet_dtype import SAVE_DTYPES
from mu.unlearning.find_checkpoint import DIFFUSERS_NAME, PATCH_NAME
from mu.unlearning.output import described_concept

_TEXT_BYTES = 20_000
_TEXT = "config.yaml, log.txt, metrics and environment"
_ROW_BYTES = 120
"""Of metrics.csv."""
_PROMPTS = 8
_REPORT_BYTES = 400_000
_LONG_FLOAT = 0.12345678901234567


def mask_files(config: MaskConfig, subject: Subject) -> list[PlannedFiles]:
    """Masks, what is sampled and encoded before, and the small ones."""
    described = {
        "concept": concept_label(config.concepts),
        "template": config.template,
        "template_name": config.concepts[0] if len(config.concepts) == 1 else list(config.concepts),
        "pool": config.pool,
        "train_method": config.train_method,
        "model_fingerprint": DIGEST,
        "c_guidance": config.c_guidance,
        "images": len(subject.rows.forget),
        "draws_per_image": config.draws_per_image,
        "seed": config.seed,
        "threshold": config.thresholds[0],
        "kept_fraction": dict.fromkeys(map(layer_group, subject.numel), _LONG_FLOAT),
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in subject.unet.named_parameters()}
    packed = {
        name: torch.empty(-(-count // 8), dtype=torch.uint8, device="meta")
        for name, count in subject.numel.items()
    }
    metadata = stored_mask(described, shapes, kept=subject.total // 2)
    one = safetensors_bytes(packed, {**metadata, FINGERPRINT_KEY: DIGEST})
    output = Path(config.output_dir)
    count = len(config.thresholds)
    masks = PlannedFiles(
        what="mask_*.safetensors", folder=output, key="output_dir", count=count, bytes=count * one
    )
    return [masks, *_processed(config, subject), _texts(output, _TEXT_BYTES)]


def training_files(
    config: TrainConfig,
    subject: Subject,
    selected: Mapping[str, int],
    *,
    steps: int,
    there: int = 0,
) -> list[PlannedFiles]:
    """The unlearned checkpoint, its patch, checkpoints of the run, pictures, and what is sampled and encoded before.

    Args:
        selected: UNet-relative name -> entries that will move.
        steps: of the whole run.
        there: bytes of checkpoints of the run that it goes on from.
    """
    output = Path(config.output_dir)
    suffix = config.output_format
    name = DIFFUSERS_NAME if suffix == "diffusers" else f"model.{suffix}"
    dtype = SAVE_DTYPES[config.save_dtype]
    tensors = tensors_of(subject.ldm, output / name, unet_dtype=dtype)
    if subject.ldm.file_has_ema and suffix != "diffusers":
        copies = {ema_name(key): value for key, value in tensors.items() if key.startswith(UNET_PREFIX)}
        tensors |= copies
    spec = model_spec(subject.params, title=f"{concept_label(config.concepts)} unlearned")
    sizes = [(name, checkpoint_bytes(tensors, suffix, subject.params, spec), "exactly")]
    if config.patch:  # weights that come out as they were, as halves often do, are not in it
        how = "about" if config.masking == "random" else "at most"
        sizes.append((PATCH_NAME, _patch_bytes(config, subject, selected), how))
    files = [
        PlannedFiles(what=what, folder=output, key="output_dir", count=1, bytes=size, how=how)
        for what, size, how in sizes
    ]
    state = run_state_bytes(selected)
    files += _run_checkpoints(config, steps, state, there=there)
    files += _processed(config, subject)
    if (pictures := _pictures(config, subject, steps)) is not None:
        files.append(pictures)
    return [*files, _texts(output, _TEXT_BYTES + _ROW_BYTES * steps + _REPORT_BYTES * config.report)]


def _run_checkpoints(config: TrainConfig, steps: int, state: int, *, there: int) -> Iterator[PlannedFiles]:
    """Of `state` bytes each: those that are there when the unlearned checkpoint is written, and one more."""
    every, keep = config.checkpoint_every_steps, config.keep_checkpoints
    due = steps // every if every is not None else 0
    if not due and config.checkpoint_every_minutes is None:
        return
    count = min(keep, due) if due else keep
    planned = partial(PlannedFiles, folder=Path(config.output_dir), key="keep_checkpoints")
    yield planned(
        what="checkpoints/step-*.safetensors",
        count=count,
        bytes=max(0, count * state - there),
        how="exactly" if config.resume is None else "at most",
        certain=bool(due),
    )
    if due > keep or not due:  # while one is written, as many as are kept are still there
        yield planned(what="checkpoints/.step-*.tmp", count=1, bytes=state, certain=False)


def _patch_bytes(config: TrainConfig, subject: Subject, selected: Mapping[str, int]) -> int:
    """Of a patch in which all entries that may move have changed."""
    parts: dict[str, TensorPatch] = {}
    cast: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, parameter in subject.unet.named_parameters():
        key, size = UNET_PREFIX + name, parameter.numel()
        old = subject.ldm.file_dtypes.get(key, torch.float32)
        dtype = SAVE_DTYPES[config.save_dtype] or old
        if dtype != old:
            cast |= dict.fromkeys((key, ema_name(key)) if subject.ldm.file_has_ema else (key,), (old, dtype))
        if not (count := selected.get(name, 0)):
            continue
        kind = places_kind(count, size)
        index = torch.empty(count, dtype=torch.int32, device="meta") if kind == "index" else None
        bits = torch.empty(-(-size // 8), dtype=torch.uint8, device="meta") if kind == "bits" else None
        part = TensorPatch(
            shape=tuple(parameter.shape),
            dtype=dtype,
            values=torch.empty(count, dtype=INTEGERS[dtype.itemsize], device="meta"),
            bits=bits,
            index=index,
            old="0" * 64,
            new="0" * 64,
        )
        parts[key] = part
        if subject.ldm.file_has_ema:
            parts[ema_name(key)] = part
    patch = Patch(
        tensors=parts,
        base_fingerprint=DIGEST,
        has_ema=subject.ldm.file_has_ema,
        cast=cast,
        metadata=described_concept(config),
    )
    stored, metadata = stored_form(patch, Path(PATCH_NAME))
    return safetensors_bytes(stored, {**metadata, FINGERPRINT_KEY: DIGEST})


def _processed(config: MaskConfig | TrainConfig, subject: Subject) -> Iterator[PlannedFiles]:
    """Sampled images, latents and embeddings: made where they are not there yet."""
    folder, key = Path(config.processed_dataset_dir), "processed_dataset_dir"
    rows = (*subject.rows.forget, *subject.rows.retain)
    if missing := subject.images["to_sample"]:
        yield PlannedFiles(
            what="generated/*.png" if config.retain_set != "generated" else "generated_prompts/*.png",
            folder=folder,
            key=key,
            count=missing,
            bytes=missing * png_bytes(subject.image_size),
            how="about",
        )
    if rows:
        count, size = latents_bytes(rows, subject.latent_shape)
        yield PlannedFiles(
            what="latents/*.safetensors", folder=folder, key=key, count=count, bytes=size, how="at most"
        )
    prompts = {row.prompt for row in rows} | {row.substitute_prompt for row in rows if row.substitute_prompt}
    if subject.params.cond_stage is not None and prompts:
        size = prompts_bytes(["", *prompts], subject.params.cond_stage.hidden_size)
        yield PlannedFiles(
            what="latents/prompts-*.safetensors", folder=folder, key=key, count=1, bytes=size, how="at most"
        )


def _pictures(config: TrainConfig, subject: Subject, steps: int) -> PlannedFiles | None:
    prompts = _PROMPTS if config.sample_prompts is None else len(config.sample_prompts)
    if not prompts:
        return None
    during = 0 if config.sample_every_steps is None else steps // config.sample_every_steps
    cells = prompts * len(config.sample_seeds) * (2 + during)
    side = max(64, min(256, subject.image_size))
    return PlannedFiles(
        what="pictures/*.png",
        folder=Path(config.output_dir),
        key="output_dir",
        count=1 + during,
        bytes=cells * png_bytes(side),
        how="about",
    )


def _texts(folder: Path, size: int) -> PlannedFiles:
    return PlannedFiles(what=_TEXT, folder=folder, key="output_dir", count=1, bytes=size, how="at most")
