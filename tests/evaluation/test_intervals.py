"""Bootstrap intervals hold the truth about as often as they say."""

from __future__ import annotations

import numpy
import pytest

from mu.evaluation import intervals
from mu.evaluation.intervals import Estimate, mean_estimate, normal_interval, spread_interval


def test_the_interval_of_a_mean_holds_the_truth_in_95_of_100_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)  # quicker, and a little coarser
    generator = numpy.random.default_rng(1)
    held = 0
    for _ in range(300):
        found = mean_estimate(list(generator.exponential(2.0, size=80)))
        assert found.bootstrap_95 is not None
        held += found.bootstrap_95[0] <= 2.0 <= found.bootstrap_95[1]
    assert 0.90 <= held / 300 <= 0.98


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    numbers = list(numpy.random.default_rng(0).normal(5.0, 1.0, size=400))
    found = mean_estimate(numbers)
    reach = 1.96 * float(numpy.std(numbers)) / 20
    assert found.value == pytest.approx(numpy.mean(numbers))
    assert found.bootstrap_95 == pytest.approx((found.value - reach, found.value + reach), abs=0.01)
    assert mean_estimate(numbers) == found  # drawn from a fixed seed


def test_a_total_is_the_mean_times_n() -> None:
    found = mean_estimate([0, 1, 2, 1], scale=4)
    assert (found.value, found.n) == (4.0, 4)
    assert found.bootstrap_95 is not None
    assert 0 <= found.bootstrap_95[0] < 4 < found.bootstrap_95[1] <= 8


def test_too_few_numbers_have_no_interval() -> None:
    assert mean_estimate([]) == Estimate(None, 0, None)
    assert mean_estimate([3.0]) == Estimate(3.0, 1, None)


def test_a_spread_lies_round_its_value() -> None:
    low, high = spread_interval(1.0, lambda draw: 10 + draw.normal(), resamples=4000) or (0, 0)
    assert (low, high) == pytest.approx((1 - 1.96, 1 + 1.96), abs=0.15)
    assert spread_interval(1.0, lambda draw: draw.normal(), resamples=0) is None


def test_a_normal_interval_is_of_the_standard_deviation() -> None:
    drawn: list[float] = []

    def statistic(generator: numpy.random.Generator) -> float:
        drawn.append(10 + generator.normal())
        return drawn[-1]

    calls = []
    low, high = normal_interval(1.0, statistic, resamples=400, done=lambda: calls.append(1)) or (0, 0)
    reach = 1.959964 * float(numpy.std(drawn, ddof=1))
    assert (low, high) == pytest.approx((1 - reach, 1 + reach), rel=1e-12)
    assert reach == pytest.approx(1.96, rel=0.1)
    assert len(calls) == 400
    assert normal_interval(1.0, lambda draw: draw.normal(), resamples=1) is None
