"""Properties of masks: one bit a weight and back, and the exact count of the threshold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mu.algorithms.saliency_unlearning.mask_file import MaskError, load_mask, load_mask_metadata, save_mask
from mu.algorithms.saliency_unlearning.masking import random_mask, threshold_mask, threshold_masks

QUICK = settings(max_examples=40, deadline=None)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def masks(draw: st.DrawFn) -> dict[str, Tensor]:
    shapes = draw(st.dictionaries(NAMES, SHAPES, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.floats(0, 1))
    return {name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()}


@st.composite
def saliencies(draw: st.DrawFn) -> dict[str, Tensor]:
    """With many ties, zeros, the smallest and the largest numbers."""
    odd = [0.0, 1e-45, 1.0, 1.0, 2.0, 3.4e38]
    value = st.sampled_from(odd) | st.floats(0, 2.0**100, width=32)
    shapes = draw(
        st.dictionaries(NAMES, st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=3)
    )
    made = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape, dtype=int))
        made[name] = torch.tensor(
            draw(st.lists(value, min_size=count, max_size=count)), dtype=torch.float32
        ).view(shape)
    next(iter(made.values())).view(-1)[0] = 1.0  # not all of it may be zero
    return made


@QUICK
@given(mask=masks(), metadata=st.dictionaries(st.text(max_size=8), JSON, max_size=3))
def test_a_mask_comes_back_to_the_bit(
    mask: dict[str, Tensor], metadata: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mask.safetensors"
    own = ("mask_format", "shapes", "kept", "total", "format", "mu.fingerprint")
    metadata = {key: value for key, value in metadata.items() if key not in own}
    save_mask(mask, path, metadata)
    if not any(bool(marked.any()) for marked in mask.values()):
        with pytest.raises(MaskError, match="no weight is marked"):
            load_mask(path)
        return
    loaded = load_mask(path)
    assert list(loaded) == list(mask)
    for name, marked in mask.items():
        assert (loaded[name].dtype, loaded[name].shape) == (torch.bool, marked.shape)
        assert torch.equal(loaded[name], marked)
    told = load_mask_metadata(path)
    assert told == {
        **metadata,
        "kept": sum(int(m.sum()) for m in mask.values()),
        "total": sum(m.numel() for m in mask.values()),
    }
    first = path.read_bytes()
    save_mask(loaded, path, metadata)
    assert path.read_bytes() == first


@QUICK
@given(saliency=saliencies(), threshold=st.floats(0, 1, exclude_min=True))
def test_a_threshold_keeps_its_exact_count_of_the_largest(
    saliency: dict[str, Tensor], threshold: float
) -> None:
    flat = torch.cat([values.reshape(-1) for values in saliency.values()])
    keep = int(threshold * flat.numel())
    if keep == 0:
        with pytest.raises(MaskError):
            threshold_mask(saliency, threshold)
        return
    marked = torch.cat([m.reshape(-1) for m in threshold_mask(saliency, threshold).values()])
    # By definition: the largest first, of equal ones the earlier.
    order = sorted(range(flat.numel()), key=lambda at: (-float(flat[at]), at))
    assert set(marked.nonzero().view(-1).tolist()) == set(order[:keep])
    drawn = random_mask(saliency, threshold, seed=3)
    assert sum(int(m.sum()) for m in drawn.values()) == keep


@QUICK
@given(saliency=saliencies(), thresholds=st.lists(st.floats(0.5, 1), min_size=2, max_size=4, unique=True))
def test_masks_of_several_thresholds_are_those_of_each_and_lie_in_each_other(
    saliency: dict[str, Tensor], thresholds: list[float]
) -> None:
    total = sum(values.numel() for values in saliency.values())
    thresholds = sorted(threshold for threshold in thresholds if int(threshold * total) > 0)
    if not thresholds:
        return
    several = threshold_masks(saliency, thresholds)
    for threshold, mask in zip(thresholds, several, strict=True):
        alone = threshold_mask(saliency, threshold)
        assert all(torch.equal(mask[name], alone[name]) for name in alone)
    for smaller, larger in itertools.pairwise(several):
        assert not any(bool((smaller[name] & ~larger[name]).any()) for name in smaller)
