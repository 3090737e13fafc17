"""Properties of patches: exact both ways whatever the bits are, and in any order where they share no entry."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mu.ldm.patch import apply_patch, apply_patches, bits_of, load_patch, make_patch, remove_patch, save_patch

QUICK = settings(max_examples=40, deadline=None)
UNET = "model.diffusion_model."
WIDTHS = {
    torch.float32: np.uint32,
    torch.float16: np.uint16,
    torch.bfloat16: np.uint16,
    torch.float64: np.uint64,
}
SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)
Tensors = dict[str, Tensor]


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, random: np.random.Generator) -> Tensor:
    """A tensor of any bits at all: NaNs of every payload, both zeros, infinities, denormals."""
    width: Any = WIDTHS[dtype]
    bits = random.integers(0, np.iinfo(width).max, size=shape, dtype=width, endpoint=True)
    return torch.from_numpy(np.asarray(bits).view(f"i{np.dtype(width).itemsize}").copy()).view(dtype)


@st.composite
def chains(draw: st.DrawFn, *, patches: int) -> tuple[Tensors, list[Tensors]]:
    """A checkpoint, and as many changed ones, of which no two changed the same entry."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(
        st.dictionaries(st.sampled_from(["a.weight", "a.bias", "b.0.c"]), SHAPES, min_size=1, max_size=3)
    )
    base, changed = (
        {"first_stage_model.w": torch.ones(2)},
        [{"first_stage_model.w": torch.ones(2)} for _ in range(patches)],
    )
    for name, shape in shapes.items():
        dtype = draw(st.sampled_from(list(WIDTHS)))
        before = any_bits(shape, dtype, random)
        base[UNET + name] = before
        owner = random.integers(0, patches + 1, size=max(1, before.numel()))  # the last one: nobody's
        for number, tensors in enumerate(changed):
            after, other = before.clone(), any_bits(shape, dtype, random)
            mine = torch.from_numpy(owner == number)[: before.numel()]
            bits_of(after)  # of the same dtype; entries are copied as bits
            after.view(-1).view(bits_of(after).dtype)[mine] = bits_of(other).reshape(-1)[mine]
            tensors[UNET + name] = after
    return base, changed


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and torch.equal(bits_of(one[key]), bits_of(other[key]))
        for key in one
    )


@QUICK
@given(chain=chains(patches=1))
def test_a_patch_is_exact_both_ways_also_through_its_file(
    chain: tuple[Tensors, list[Tensors]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    before, (after,) = chain
    patch = make_patch(before, after)
    path = tmp_path_factory.getbasetemp() / "p.patch.safetensors"
    save_patch(patch, path)
    read = load_patch(path)
    assert same(apply_patch(before, read), after)
    assert same(remove_patch(after, read), before)
    count = sum(int((bits_of(before[k]) != bits_of(after[k])).sum()) for k in before if k.startswith(UNET))
    assert read.weights_changed == patch.weights_changed == count


@QUICK
@given(chain=chains(patches=3))
def test_patches_without_a_common_entry_come_and_go_in_any_order(
    chain: tuple[Tensors, list[Tensors]],
) -> None:
    before, changed = chain
    patches = [make_patch(before, after) for after in changed]
    all_of_them, _ = apply_patches(before, patches)
    for order in itertools.permutations(patches):
        assert same(apply_patches(before, list(order))[0], all_of_them)
        result = before
        for patch in order:
            if patch.tensors:
                result = apply_patch(result, patch)
        assert same(result, all_of_them)
        for patch in order[::-2] + order[-2::-2]:
            if patch.tensors:
                result = remove_patch(result, patch)
        assert same(result, before)
