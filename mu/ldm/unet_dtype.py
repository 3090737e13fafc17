"""The dtypes in which a checkpoint is written: of all its weights, or of the UNet with its EMA copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import is_ema_copy
from mu.ldm.tensor_file import CheckpointError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Names of dtypes in a config."""
SAVE_DTYPES: Mapping[str, torch.dtype | None] = {"source": None, **DTYPES}
"""The same; None: each tensor as in the file that it came from."""


def largest_lost(tensor: Tensor, dtype: torch.dtype) -> float | None:
    """The largest of a weight's values that would become Inf in another dtype; None where all of them stay finite."""
    if not tensor.is_floating_point() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return None
    if not tensor.numel() or float(tensor.abs().max()) <= torch.finfo(dtype).max:
        return None
    lost = tensor.isfinite() & ~tensor.to(dtype).isfinite()
    return float(tensor[lost].double().abs().max()) if bool(lost.any()) else None


def cast_weight(tensor: Tensor, dtype: torch.dtype, *, name: str, path: str | Path) -> Tensor:
    """A weight in another dtype, rounded to the nearest as torch does it.

    Args:
        name: the weight's name, for errors.
        path: where it is to be written, for errors.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    if (largest := largest_lost(tensor, dtype)) is not None:
        raise CheckpointError(
            f"{path} is not written: {name} reaches {largest:.4g}, and the largest number of "
            f"{str(dtype).removeprefix('torch.')} is {torch.finfo(dtype).max:.4g}; choose "
            f"{'bf16 or fp32' if dtype == torch.float16 else 'fp32'}"
        )
    return tensor.to(dtype)


def is_of_unet(key: str) -> bool:
    """Whether a key of a checkpoint is of the UNet or of its EMA copy."""
    return key.startswith(UNET_PREFIX) or is_ema_copy(key)


class WithUNetDtype(Mapping[str, Tensor]):
    """Tensors of a checkpoint, of which those of the UNet and of its EMA copy are cast when they are read.

    The EMA copy follows the weights: in a narrower dtype than theirs it would keep values that unlearning changed.

    Args:
        tensors: under CompVis' names.
        dtype: None: nothing is cast.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self._tensors = tensors
        self._dtype = dtype

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        return tensor.to(self._dtype) if self._dtype is not None and is_of_unet(key) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every finite number of one float dtype is one of another: casting there and back changes nothing."""
    one, other = torch.finfo(wide), torch.finfo(narrow)
    # The smallest subnormal number is tiny * eps.
    return one.eps <= other.eps and one.max >= other.max and one.tiny * one.eps <= other.tiny * other.eps
