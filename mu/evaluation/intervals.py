"""Numbers with a bootstrap interval (Efron, 1979). Nothing here imports torch.

The images of a set are drawn anew, with replacement and from a fixed seed, and the number is counted again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
_SEED = 0
_NORMAL_95 = 1.959964
"""Standard deviations on each side of a normal distribution's mean that hold 95 % of it."""


@dataclass(frozen=True)
class Estimate:
    """A number of n images, in its own unit, with its 95 % interval.

    Attributes:
        value: None of no images.
        n: how many images there were.
        bootstrap_95: None of fewer than two images, and where no resamples were asked for.
    """

    value: float | None
    n: int
    bootstrap_95: tuple[float, float] | None


def mean_estimate(values: Sequence[float], *, scale: float = 1.0) -> Estimate:
    """The mean of a number of each image, times `scale`; the interval is made of percentiles."""
    n = len(values)
    if n == 0:
        return Estimate(None, 0, None)
    numbers = numpy.asarray(values, dtype=numpy.float64) * scale
    if n == 1:
        return Estimate(float(numbers[0]), 1, None)
    generator = numpy.random.default_rng(_SEED)
    drawn: list[NDArray[numpy.float64]] = []
    chunk = max(1, 2_000_000 // n)  # bounds the memory
    for start in range(0, RESAMPLES, chunk):
        picked = generator.integers(n, size=(min(chunk, RESAMPLES - start), n))
        drawn.append(numbers[picked].mean(axis=1))
    low, high = numpy.percentile(numpy.concatenate(drawn), PERCENTILES)
    return Estimate(float(numbers.mean()), n, (float(low), float(high)))


def spread_interval(
    value: float, statistic: Callable[[numpy.random.Generator], float], *, resamples: int
) -> tuple[float, float] | None:
    """The percentiles of a resampled statistic, moved so that their mean is `value`.

    A distance between sets grows when images are drawn twice, so its plain percentiles may all lie above it. What is
    told is its spread alone.

    Args:
        statistic: draws images anew with the generator and counts the number from them.
        resamples: how often; 0: no interval.
    """
    if resamples == 0:
        return None
    generator = numpy.random.default_rng(_SEED)
    drawn = numpy.array([statistic(generator) for _ in range(resamples)])
    low, high = numpy.percentile(drawn, PERCENTILES) - drawn.mean() + value
    return float(low), float(high)


def normal_interval(
    value: float,
    statistic: Callable[[numpy.random.Generator], float],
    *,
    resamples: int,
    done: Callable[[], object] = lambda: None,
) -> tuple[float, float] | None:
    """`value` and 1.96 standard deviations of a resampled statistic on each side (Efron & Tibshirani, 1993, 13.3).

    For a statistic that takes long: 50 resamples tell the standard deviation as closely as 200 tell the percentiles.

    Args:
        statistic: as of `spread_interval`.
        resamples: how often; fewer than 2: no interval.
        done: called after each of them.
    """
    if resamples < 2:
        return None
    generator = numpy.random.default_rng(_SEED)
    drawn = []
    for _ in range(resamples):
        drawn.append(statistic(generator))
        done()
    reach = _NORMAL_95 * float(numpy.std(drawn, ddof=1))
    return value - reach, value + reach
