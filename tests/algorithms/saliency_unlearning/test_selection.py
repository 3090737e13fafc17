from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mu.algorithms.saliency_unlearning import selection
from mu.algorithms.saliency_unlearning.masking import MaskError, threshold_mask, threshold_masks
from tests.algorithms.saliency_unlearning.reference_masks import assert_same_mask, by_stable_sort

DENORMAL = 2.0**-149
SPECIAL = [0.0, -0.0, DENORMAL, 3 * DENORMAL, 2.0**-127, 1e-30, 0.5, 0.5 + 2.0**-24, 1.0, 3e38]
"""Few values, so that equal ones are many; some differ in their last bit alone, or are denormal."""


@pytest.fixture(params=["numpy", "numpy in threads", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of counting and marking, in chunks so small that tensors are cut and joined. "torch" is the GPU's."""
    monkeypatch.setitem(selection._CHUNK, "cpu", 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3 if "threads" in request.param else 1)
    if request.param == "torch":
        monkeypatch.setattr(selection, "_on_cpu", lambda _: False)


def gaussian(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"a": (7, 11), "b": (), "c": (2, 3, 5), "none": (0, 4), "d": (101,)}
    return {name: torch.randn(shape, generator=generator).abs() for name, shape in shapes.items()}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.29, 0.5, 0.999, 1.0, 1 / 3])
def test_it_is_the_stable_sort(threshold: float) -> None:
    saliency = gaussian()
    assert_same_mask(threshold_mask(saliency, threshold), by_stable_sort(saliency, threshold))


@pytest.mark.usefixtures("way")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.lists(
            st.sampled_from(SPECIAL) | st.floats(0.0, 2.0**127, width=32),
            max_size=40,
        ),
        min_size=1,
        max_size=5,
    ),
    thresholds=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]), min_size=5, max_size=5
    ),
)
def test_it_is_the_stable_sort_with_ties_zeros_and_denormals(
    values: list[list[float]], thresholds: list[float], dtypes: list[torch.dtype]
) -> None:
    saliency = {
        str(i): torch.tensor(part, dtype=dtype)
        for i, (part, dtype) in enumerate(zip(values, dtypes, strict=False))
    }
    before = {name: part.clone() for name, part in saliency.items()}
    size = sum(map(len, values))
    fit = any(part.any() for part in saliency.values()) and all(p.isfinite().all() for p in saliency.values())
    if not fit or not int(min(thresholds) * size):
        with pytest.raises(MaskError):
            threshold_masks(saliency, thresholds)
        return
    for threshold, mask in zip(thresholds, threshold_masks(saliency, thresholds), strict=True):
        assert_same_mask(mask, by_stable_sort(saliency, threshold))
    for name, part in saliency.items():
        assert torch.equal(part, before[name])
        assert torch.equal(part.signbit(), before[name].signbit())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [DENORMAL, 1.0, 3e38])
@pytest.mark.parametrize("marked", range(1, 61, 6))
def test_among_equal_values_the_cut_falls_anywhere(value: float, marked: int) -> None:
    saliency = {str(i): torch.full((size,), value) for i, size in enumerate([3, 14, 1, 1, 20, 21])}
    mask = threshold_mask(saliency, (marked + 0.5) / 60)
    flat = torch.cat([mask[name] for name in saliency])
    assert flat.tolist() == [True] * marked + [False] * (60 - marked)


@pytest.mark.usefixtures("way")
def test_zeros_of_both_signs_tie() -> None:
    saliency = {"a": torch.tensor([-0.0, 0.0] * 10), "b": torch.tensor([1.0, 0.0, -0.0, 0.0])}
    for threshold in (0.05, 0.1, 0.5, 0.95):
        assert_same_mask(threshold_mask(saliency, threshold), by_stable_sort(saliency, threshold))


@pytest.mark.usefixtures("way")
def test_neighbouring_floats_are_told_apart() -> None:
    base = torch.tensor([0.1234567]).view(torch.int32)
    order = torch.randperm(7000, generator=torch.Generator().manual_seed(0)).int()
    values = {"w": (base + 17 * order).view(torch.float32)}
    assert_same_mask(threshold_mask(values, 0.4), by_stable_sort(values, 0.4))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("bad", "what"), [(math.nan, "finite"), (math.inf, "finite"), (-math.inf, "finite"), (-1e-40, "negative")]
)
def test_what_cannot_be_ranked_is_refused(bad: float, what: str, dtype: torch.dtype) -> None:
    saliency = {name: values.to(dtype) for name, values in gaussian().items()}
    saliency["d"][17] = bad
    with pytest.raises(MaskError, match=f"saliency of d .*{what}"):
        threshold_mask(saliency, 0.5)


def many() -> dict[str, Tensor]:
    """Chunks of the real size, with as many equal values as real gradients have, and more."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"large": 700_001, "small": 3, "smaller": 1, "middle": 200_000}
    saliency = {name: torch.randn(size, generator=generator).abs() for name, size in sizes.items()}
    saliency["middle"].mul_(64).round_().div_(64)
    return saliency


def test_chunks_of_their_real_size() -> None:
    saliency, thresholds = many(), [0.5, 0.1, 0.03]
    for threshold, mask in zip(thresholds, threshold_masks(saliency, thresholds), strict=True):
        assert_same_mask(mask, by_stable_sort(saliency, threshold))


@pytest.mark.gpu
def test_a_gpu_makes_the_same_mask() -> None:
    saliency = {**many(), **gaussian(), "zeros": torch.zeros(1000), "wide": torch.tensor([-0.0, DENORMAL])}
    on_gpu = {name: values.cuda() for name, values in saliency.items()}
    thresholds = [0.5, 0.1, 0.9995, 1.0]
    for mine, theirs in zip(
        threshold_masks(saliency, thresholds), threshold_masks(on_gpu, thresholds), strict=True
    ):
        assert all(marked.is_cuda for marked in theirs.values())
        assert_same_mask({name: marked.cpu() for name, marked in theirs.items()}, mine)
