"""What both stages need around their mathematics: the model of a config, its fingerprint, the mask of a concept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.configs import ConceptKeys, ModelKeys, TrainConfig, mask_command
from mu.algorithms.saliency_unlearning.mask_file import Mask, MaskError, load_mask_metadata
from mu.algorithms.saliency_unlearning.model import TrainingError
from mu.config import resolve_path
from mu.datasets.index import concept_label, concept_names
from mu.devices import resolve_devices
from mu.ldm import LatentDiffusion, load_model
from mu.ldm.checkpoint import SCHEDULE_KEYS, fingerprint, read_state_dict

UNET_PREFIX = "model.diffusion_model."

_log = logging.getLogger(__name__)


def model_of(config: ModelKeys) -> LatentDiffusion:
    """The model that `ckpt_path`, `model_config_path` and `devices` name, in eval mode.

    Raises:
        CheckpointError, ModelConfigError, DeviceError: see `mu.ldm.load_model` and `mu.devices.resolve_devices`.
    """
    checkpoint = config.checkpoint()
    device = resolve_devices(config.devices)
    _log.info("loading %s on %s", checkpoint, device)
    return load_model(resolve_path(config.model_config_path), checkpoint, device=device)


def unet_fingerprint(model: LatentDiffusion) -> str:
    """What a mask remembers of the model it was made from: SHA-256 of the UNet's weights, as they are in the file."""
    parameters = dict(model.unet.named_parameters())
    dtypes = {name: model.file_dtypes.get(UNET_PREFIX + name, p.dtype) for name, p in parameters.items()}
    return fingerprint(parameters, dtypes=dtypes)


def run_name(config: ConceptKeys) -> str:
    """What a run's folder is called, before its date: `style-Noto`, `style-Noto+Blob`."""
    return f"{config.template}-{concept_label(config.concepts)}"


def layer_groups(mask: Mapping[str, Tensor]) -> dict[str, float]:
    """Kept fraction of each block of the UNet: `input_blocks.1`, `middle_block.0`, `time_embed`, ..."""
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, marked in mask.items():
        parts = name.split(".")
        group = ".".join(parts[:2]) if parts[0].endswith(("_blocks", "_block")) else parts[0]
        kept[group] = kept.get(group, 0) + int(marked.count_nonzero())
        total[group] = total.get(group, 0) + marked.numel()
    return {group: kept[group] / total[group] for group in total}


def find_mask(config: TrainConfig) -> Path:
    """The mask file that `mask_path` leads to: itself, or in a folder the newest of this concept and threshold.

    Raises:
        MaskError: the folder has no such mask; names the command that makes it.
    """
    assert config.mask_path is not None
    path = resolve_path(config.mask_path)
    if path.is_file():
        return path
    wanted = {"template": config.template, "threshold": config.threshold}
    fitting = []
    for candidate in path.rglob("mask_*.safetensors"):
        metadata = load_mask_metadata(candidate)
        forgotten = concept_names(metadata.get("template_name", ()))
        if set(forgotten) == set(config.concepts) and wanted.items() <= metadata.items():
            fitting.append(candidate)
    if not fitting:
        raise MaskError(
            f"mask_path: no mask of {config.template} {concept_label(config.concepts)} with threshold "
            f"{config.threshold} below {path}; make it: {mask_command(config)}"
        )
    newest = max(fitting, key=lambda candidate: (candidate.stat().st_mtime_ns, str(candidate)))
    _log.info("mask_path: taking %s, the newest of %d", newest, len(fitting))
    return newest


def verify_written(before: Path, after: Path, selected: Mask) -> int:
    """Compare two checkpoint files, bit by bit, outside the entries that were allowed to move.

    Args:
        before: the checkpoint that training started from.
        after: the unlearned one, as it lies on disk.
        selected: UNet-relative name -> bool tensor of the entries that may differ.

    Returns:
        The number of entries that do differ.

    Raises:
        TrainingError: another entry differs, a tensor changed its dtype, a weight of the UNet is missing, or there is
            one that was not there before.
    """
    old, _ = read_state_dict(before)
    new, _ = read_state_dict(after)
    lost = [name for name in old if name.startswith(UNET_PREFIX) and name not in new]
    if lost:
        raise TrainingError(f"{after}: {len(lost)} tensors of {before} are missing: {', '.join(lost[:5])}")
    changed = 0
    for name, tensor in new.items():
        # Newer releases of transformers name the text encoder's weights without `text_model.`.
        original = old.get(name, old.get(name.replace(".transformer.text_model.", ".transformer.")))
        if name in SCHEDULE_KEYS and (original is None or original.dtype.itemsize < 4):
            continue  # the model's own, exact one, which loading has compared
        if original is None:
            if name.endswith(".position_ids"):  # 0, 1, 2, ...; not in every file
                continue
            raise TrainingError(f"{after}: {name} was not in {before}")
        if original.dtype != tensor.dtype or original.shape != tensor.shape:
            raise TrainingError(f"{after}: {name} is {tensor.dtype}, in {before} it is {original.dtype}")
        same = _bits(original) == _bits(tensor)  # of the tensor's shape
        if bool(same.all()):
            continue
        allowed = selected.get(name.removeprefix(UNET_PREFIX)) if name.startswith(UNET_PREFIX) else None
        if allowed is None or not bool((same | allowed.cpu()).all()):
            raise TrainingError(f"{after}: {name} differs from {before} outside the mask")
        changed += int((~same).count_nonzero())
    return changed


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers: NaN and -0.0 compare as what they are."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.dtype.itemsize])
