"""The types in which weights are written, by the names that the keys of commands have for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.tensor_file import CheckpointError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Name -> type of written weights. A key that has `source` beside them means the type that each tensor has."""


def cast_weight(tensor: Tensor, dtype: torch.dtype, *, name: str, path: str | Path) -> Tensor:
    """A weight in another type, rounded to the nearest as torch does it.

    Args:
        name: the weight's name, for errors.
        path: where it is to be written, for errors.

    Raises:
        CheckpointError: a value is too large for the type.
    """
    cast = tensor.to(dtype)
    if tensor.dtype.itemsize < 2 or tensor.dtype == dtype:  # nothing in 8 bits is too large for any of them
        return cast
    lost = tensor.isfinite() & ~cast.isfinite()
    if bool(lost.any()):
        largest = float(tensor[lost].double().abs().max())
        raise CheckpointError(
            f"{path} is not written: {name} reaches {largest:.4g}, and the largest number of "
            f"{str(dtype).removeprefix('torch.')} is {torch.finfo(dtype).max:.4g}; choose "
            f"{'bf16 or fp32' if dtype == torch.float16 else 'fp32'}"
        )
    return cast
