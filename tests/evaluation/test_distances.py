"""FID and KID against their formulas, and how far their intervals reach."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch

from mu.evaluation.distances import DistanceError, fid, frechet_distance, kid


def gaussian(n: int, mean: list[float], deviations: list[float], seed: int) -> torch.Tensor:
    """n draws whose mean and covariance are exactly those asked for."""
    draws = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws -= draws.mean(dim=0)
    draws = torch.linalg.qr(draws).Q * (n - 1) ** 0.5  # covariance 1
    return draws * torch.tensor(deviations).double() + torch.tensor(mean).double()


def test_fid_of_two_gaussians_is_the_closed_form() -> None:
    """Diagonal covariances: the squared distance of the means, and of the standard deviations."""
    a = gaussian(200, [0.0, 1.0, 2.0], [1.0, 2.0, 0.5], seed=0)
    b = gaussian(300, [1.0, 1.0, -1.0], [2.0, 2.0, 1.0], seed=1)
    expected = (1 + 0 + 9) + (1 + 0 + 0.25)
    found = fid(a, b, paired=False, resamples=0)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert (found.n, found.n_reference, found.bootstrap_95) == (200, 300, None)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "width"), [(50, 8), (10, 40), (30, 30)])
def test_the_quick_distance_is_torchmetrics_own(n: int, width: int) -> None:
    """Also with correlated features, and with fewer images than features."""
    torch.manual_seed(n)
    mixing = torch.randn(width, width, dtype=torch.float64)
    a = torch.randn(n, width, dtype=torch.float64) @ mixing
    b = torch.randn(n + 3, width, dtype=torch.float64) @ mixing + 0.3
    found = fid(a, b, paired=False, resamples=0).value
    # torchmetrics takes roots of rounded zeros where a covariance is singular.
    assert frechet_distance(a, b) == pytest.approx(found, rel=1e-9 if n > width else 1e-4)


@pytest.mark.parametrize(("n", "width"), [(60, 8), (20, 40), (40, 40)])
def test_rows_that_are_drawn_twice_count_twice(n: int, width: int) -> None:
    """The quick way of a resample, against the sets with each row as often as it was drawn."""
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n, width, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 0.4))
    a[:, 0] = b[:, 0] = 0.0  # a feature that is always zero: a covariance without an inverse
    rows, others = (torch.randint(n, (n,), generator=generator) for _ in range(2))
    counts, other_counts = (torch.bincount(drawn, minlength=n).double() for drawn in (rows, others))
    found = frechet_distance(a, b, counts=counts, others=other_counts)
    drawn_a, drawn_b = a[rows], b[others]
    centred = [drawn - drawn.mean(dim=0) for drawn in (drawn_a, drawn_b)]
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / (n - 1)
    traces = sum(float(drawn.var(dim=0).sum()) for drawn in (drawn_a, drawn_b))
    expected = float((drawn_a.mean(dim=0) - drawn_b.mean(dim=0)).square().sum()) + traces - 2 * float(root)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_interval_is_that_of_the_percentiles_of_many_draws() -> None:
    """The definition until version 0.1.0: centred percentiles, here of 2000 draws."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(120, 6, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 0.5))
    found = fid(a, b, paired=False, resamples=50)
    assert found.bootstrap_95 is not None
    draws = numpy.random.default_rng(1)
    direct = [
        frechet_distance(a[draws.integers(120, size=120)], b[draws.integers(120, size=120)])
        for _ in range(2000)
    ]
    low, high = numpy.percentile(direct, (2.5, 97.5)) - numpy.mean(direct) + found.value
    assert found.bootstrap_95[1] - found.bootstrap_95[0] == pytest.approx(high - low, rel=0.25)
    assert numpy.mean(found.bootstrap_95) == pytest.approx(found.value)


def test_the_interval_of_fid_is_as_wide_as_fid_varies_between_draws() -> None:
    def draw(seed: int, shift: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(150, 4, generator=generator, dtype=torch.float64) + shift

    values = [frechet_distance(draw(seed, 0.0), draw(seed + 1000, 1.0)) for seed in range(200)]
    low, high = numpy.percentile(values, (2.5, 97.5))  # of new images each time
    found = [
        fid(draw(seed, 0.0), draw(seed + 1000, 1.0), paired=False, resamples=100)
        for seed in range(2000, 2012)
    ]
    widths = [one.bootstrap_95[1] - one.bootstrap_95[0] for one in found if one.bootstrap_95]
    assert len(widths) == 12
    assert numpy.mean(widths) == pytest.approx(high - low, rel=0.2)
    held = [
        one.bootstrap_95[0] < numpy.mean(values) < one.bootstrap_95[1] for one in found if one.bootstrap_95
    ]
    assert sum(held) >= 10


def test_pairs_are_drawn_together() -> None:
    """The same images with a constant shift: the distance is the shift's, whichever pairs are drawn."""
    a = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = a + 2.0
    assert fid(a, shifted, paired=True, resamples=50).bootstrap_95 == pytest.approx((12.0, 12.0))
    low, high = fid(a, shifted, paired=False, resamples=50).bootstrap_95 or (0, 0)
    assert high - low > 1


def test_kid_is_its_formula() -> None:
    """The unbiased estimate of Binkowski et al., equation 4, pair by pair."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = [
        sum(kernel(s[i], s[j]) for i, j in itertools.permutations(range(7), 2)) / (7 * 6) for s in (x, y)
    ]
    across = sum(kernel(a, b) for a in x for b in y) / 49
    found = kid(x, y, paired=False)
    assert found.value == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert found.bootstrap_95 is not None
    assert found.bootstrap_95[0] < found.value < found.bootstrap_95[1]


def test_kid_of_subsets_is_the_same_each_time_and_near_the_whole() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 4), torch.randn(250, 4) + 1
    state = torch.random.get_rng_state()
    first = kid(x, y, paired=False, subset_size=50)
    assert kid(x, y, paired=False, subset_size=50) == first
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers change
    assert first.value == pytest.approx(kid(x[:200], y[:200], paired=False).value, rel=0.2)


def test_the_interval_of_kid_is_as_wide_as_kid_varies_between_draws() -> None:
    def draw(seed: int, shift: float) -> torch.Tensor:
        return torch.randn(80, 4, generator=torch.Generator().manual_seed(seed)) + shift

    low, high = kid(draw(0, 0.0), draw(1, 1.0), paired=False).bootstrap_95 or (0, 0)
    values = [kid_of(draw(seed, 0.0), draw(seed + 1000, 1.0)) for seed in range(2, 202)]
    wide = float(numpy.diff(numpy.percentile(values, (2.5, 97.5)))[0])
    assert high - low == pytest.approx(wide, rel=0.4)


def test_two_images_a_side_still_have_finite_intervals() -> None:
    x, y = torch.eye(2), torch.eye(2) + 1
    for found in (fid(x, y, paired=False, resamples=50), kid(x, y, paired=False), kid(x, y, paired=True)):
        assert found.bootstrap_95 is not None
        assert numpy.isfinite(found.bootstrap_95).all()


def kid_of(x: torch.Tensor, y: torch.Tensor) -> float:
    from torchmetrics.image.kid import poly_mmd

    return float(poly_mmd(x, y))


@pytest.mark.parametrize(
    ("features", "reference", "paired", "message"),
    [
        (torch.ones(1, 3), torch.ones(5, 3), False, "at least two images on each side; there are 1 and 5"),
        (torch.ones(5, 3), torch.ones(5, 4), False, "features are 3 and 4 wide"),
        (torch.ones(5, 3), torch.ones(4, 3), True, "pairs need equally many images; there are 5 and 4"),
        (torch.full((5, 3), float("nan")), torch.ones(5, 3), False, "not finite"),
    ],
)
def test_sets_without_a_distance_are_refused(
    features: torch.Tensor, reference: torch.Tensor, paired: bool, message: str
) -> None:
    with pytest.raises(DistanceError, match=message):
        fid(features, reference, paired=paired, resamples=0)
    with pytest.raises(DistanceError, match=message):
        kid(features, reference, paired=paired)
