"""The UNet of a checkpoint in another dtype than that of its file, with its EMA copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.dtypes import DTYPES
from mu.ldm.ema import is_ema_copy

SAVE_DTYPES: Mapping[str, torch.dtype | None] = {"source": None, **DTYPES}
"""Names of dtypes in a config; None: each tensor as in the file that it came from."""


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
