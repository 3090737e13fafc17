"""Prompts through the text encoder, as many at once as memory holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mu.ldm import LatentDiffusion
from mu.memory import ENCODING_ADVICE, AtOnce

_MOST = 64


@torch.no_grad()
def embedded(ldm: LatentDiffusion, prompts: Sequence[str]) -> Tensor:
    """(N, L, D) in fp32, of N prompts.

    Raises:
        OutOfMemoryError: memory does not suffice for one prompt at a time.
    """
    at_once = AtOnce("prompt", advice=ENCODING_ADVICE)
    at_once.most = _MOST
    return torch.cat(list(at_once.pieces(prompts, lambda some: ldm.embed(list(some)).float())))
