"""What a mask must be, written down in the plainest way."""

from __future__ import annotations

import torch
from torch import Tensor


def by_stable_sort(saliency: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The definition: sort everything, largest first, earlier first among equals, and take the head."""
    flat = torch.cat([values.reshape(-1).double() for values in saliency.values()])
    order = torch.sort(flat, descending=True, stable=True).indices
    marked = torch.zeros(len(flat), dtype=torch.bool)
    marked[order[: int(threshold * len(flat))]] = True
    parts = marked.split([values.numel() for values in saliency.values()])
    return {name: part.view(saliency[name].shape) for name, part in zip(saliency, parts, strict=True)}


def assert_same_mask(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, marked in got.items():
        assert marked.dtype == torch.bool
        assert torch.equal(marked, expected[name]), name
