"""The EMA copy of the UNet in a CompVis checkpoint: `model_ema.` and the weight's name with its dots taken out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.tensor_file import CheckpointError

EMA_PREFIX = "model_ema."
_COUNTERS = frozenset({f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates"})


def ema_name(key: str) -> str:
    """The EMA copy's key of a UNet weight's key `model.diffusion_model.…`."""
    return EMA_PREFIX + key.removeprefix("model.").replace(".", "")


def is_ema_copy(key: str) -> bool:
    """Whether a key is of the EMA copy of a weight, and not of one of the counters."""
    return key.startswith(EMA_PREFIX) and key not in _COUNTERS


def has_ema(keys: Iterable[str]) -> bool:
    """Whether a checkpoint has EMA copies of weights, and not just their counters."""
    return any(map(is_ema_copy, keys))


def with_ema_weights(tensors: Mapping[str, Tensor], *, source: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint with the UNet's EMA copy in the place of its raw weights.

    Raises:
        CheckpointError: there is no EMA copy, or it lacks weights; the first few are listed.
    """
    if not has_ema(tensors):
        raise CheckpointError(
            f"{source} has no EMA weights (keys {EMA_PREFIX}*); leave use_ema out to take the raw weights"
        )
    raw = [key for key in tensors if key.startswith(UNET_PREFIX)]
    if missing := [ema_name(key) for key in raw if ema_name(key) not in tensors]:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"{source}: {len(missing)} EMA weights are missing ({shown}); take the raw weights"
        )
    return {**tensors, **{key: tensors[ema_name(key)] for key in raw}}


def updated_ema(
    written: Mapping[str, Tensor], before: Mapping[str, Tensor], *, use_ema: bool, source: str | Path
) -> dict[str, Tensor]:
    """EMA copies for a checkpoint whose weights have changed: nobody gets the old weights back by taking them.

    An entry of a weight that has changed is overwritten with its new value; all others stay as they were, to the bit.

    Args:
        written: the tensors that are about to be written.
        before: those of the checkpoint that they were made from.
        use_ema: whether the weights were made from the EMA copy and not from the raw weights.
        source: names that checkpoint in errors.

    Returns:
        All `model_ema.*` of `before`, so updated; nothing where there are none.

    Raises:
        CheckpointError: an EMA copy is of no known weight, or of another shape.
    """
    ema = {key: tensor for key, tensor in before.items() if key.startswith(EMA_PREFIX)}
    if not has_ema(ema):
        return {}
    weights = {ema_name(key): key for key in written if key.startswith(UNET_PREFIX)}
    for key in ema.keys() - _COUNTERS:
        if key not in weights or written[weights[key]].shape != ema[key].shape:
            raise CheckpointError(f"{source}: {key} is not the EMA copy of any weight of the UNet")
    for key in ema.keys() - _COUNTERS:
        new = written[weights[key]].detach().cpu()
        old = before[key] if use_ema else before[weights[key]]
        changed = new.to(old.dtype) != old
        if bool(changed.any()):
            ema[key] = torch.where(changed, new.to(ema[key].dtype), ema[key])
    return ema
