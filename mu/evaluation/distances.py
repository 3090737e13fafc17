"""FID and KID: how far apart two sets of images are, by their features.

FID is Heusel et al., 2017 (arXiv 1706.08500), KID Binkowski et al., 2018 (arXiv 1801.01401). The numbers are
torchmetrics', in double precision; the intervals draw images anew and reuse the features.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy
import torch
from torch import Tensor, nn

from mu.bars import bar
from mu.errors import MuError, first_line
from mu.evaluation.intervals import Estimate, normal_interval, spread_interval
from mu.memory import is_out_of_memory, telling

T = TypeVar("T")
_log = logging.getLogger(__name__)

FID_RESAMPLES = 50
"""How often images are drawn anew for FID's interval: of 5,100 images and 2,048 features, seconds each on a core."""
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
_KID_RESAMPLES = 1000
_SYNC = False
"""torchmetrics would add up the images of all processes of a run, of which one alone measures."""


class DistanceError(MuError, ValueError):
    """Two sets between which there is no distance."""


@dataclass(frozen=True)
class Distance(Estimate):
    """A distance between n images and n_reference others."""

    n_reference: int


class _Given(nn.Module):
    """Stands for torchmetrics' feature network: what it is given are the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(
    features: Tensor,
    reference: Tensor,
    *,
    paired: bool,
    resamples: int = FID_RESAMPLES,
    device: str = "cpu",
) -> Distance:
    """Frechet distance between the Gaussians of two sets of features.

    It shrinks with the number of images, so only distances of equally many images can be compared.

    Args:
        features: (N, F); reference: (M, F).
        paired: row i of both is of the same prompt and seed: pairs are drawn anew, not rows of each.
        resamples: of the interval (see `normal_interval`); fewer than 2: none.
        device: where the interval is counted.

    Raises:
        DistanceError: fewer than two images, other widths, or values that are not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    features, reference = _checked(features, reference, paired=paired)
    metric = FrechetInceptionDistance(_Given(features.shape[1]), sync_on_compute=_SYNC)
    metric.update(features, real=False)
    metric.update(reference, real=True)
    value = float(metric.compute())

    def interval(place: str) -> tuple[float, float] | None:
        sets = features.to(place), reference.to(place)

        def resampled(generator: numpy.random.Generator) -> float:
            rows, others = _draw(generator, len(features), len(reference), paired=paired)
            return frechet_distance(*sets, counts=_counts(rows, sets[0]), others=_counts(others, sets[1]))

        with bar("interval of FID", total=resamples, unit="resamples") as progress:
            return normal_interval(value, resampled, resamples=resamples, done=progress.update)

    return Distance(value, len(features), _where_it_fits(interval, device), len(reference))


def _where_it_fits(interval: Callable[[str], T], device: str) -> T:
    """On the device, or if its memory does not suffice, on the CPU."""
    if device != "cpu":
        try:
            return interval(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            _log.warning(
                "out of memory on %s (%s): FID's interval is counted on the CPU", device, first_line(error)
            )
    with telling("while counting FID's interval", advice="fewer images, or fid_reference none"):
        return interval("cpu")


def kid(features: Tensor, reference: Tensor, *, paired: bool, subset_size: int = KID_SUBSET_SIZE) -> Distance:
    """Squared maximum mean discrepancy of two sets of features, with the kernel (x.y / F + 1)^3.

    The value is the mean over 100 subsets of `subset_size` images; where both sets have no more than that, of all.
    The interval counts each pair of different images as often as both were drawn.

    Args, Raises: as `fid`.
    """
    from torchmetrics.image.kid import KernelInceptionDistance, poly_kernel

    features, reference = _checked(features, reference, paired=paired)
    size = min(subset_size, len(features), len(reference))
    whole = size == len(features) == len(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all features are kept in memory
        metric = KernelInceptionDistance(
            _Given(features.shape[1]),
            subsets=1 if whole else KID_SUBSETS,
            subset_size=size,
            sync_on_compute=_SYNC,
        )
    metric.update(features, real=False)
    metric.update(reference, real=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        value = float(metric.compute()[0])

    k_xx, k_yy = poly_kernel(features, features), poly_kernel(reference, reference)  # (N, N), (M, M)
    k_xy = poly_kernel(features, reference)  # (N, M)

    def resampled(generator: numpy.random.Generator) -> float:
        rows, others = _draw(generator, len(features), len(reference), paired=paired)
        a = torch.bincount(rows, minlength=len(features)).double()  # (N,)
        b = torch.bincount(others, minlength=len(reference)).double()  # (M,)
        across = a @ k_xy @ b / (a.sum() * b.sum())
        return float(_pairs(a, k_xx) + _pairs(b, k_yy) - 2 * across)

    return Distance(
        value, len(features), spread_interval(value, resampled, resamples=_KID_RESAMPLES), len(reference)
    )


def frechet_distance(
    features: Tensor, reference: Tensor, *, counts: Tensor | None = None, others: Tensor | None = None
) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two sets of features, fast enough to be asked many times.

    With C = A'A and C' = B'B, the trace of the root is the sum of the singular values of A B'. A and B are made as
    small as the lesser of images and features, and the singular values are roots of the eigenvalues of (A B')'(A B').

    Args:
        features, reference: float64 (N, F) and (M, F).
        counts, others: (N,) and (M,), how often each row is in its set; None: once.
    """
    (mean, a), (other, b) = _centred(features, counts), _centred(reference, others)
    product = _triangle(a) @ _triangle(b).T
    if product.shape[0] > product.shape[1]:
        product = product.T
    root = torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt().sum()
    return float((mean - other).square().sum() + a.square().sum() + b.square().sum() - 2 * root)


def _centred(features: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean (F,), and A with A'A the covariance; a row that is there several times is one of more weight."""
    if counts is None:
        counts = torch.ones(len(features), dtype=features.dtype, device=features.device)
    kept = counts > 0
    features, counts = features[kept], counts[kept]
    total = counts.sum()
    mean = counts @ features / total
    return mean, (features - mean) * (counts / (total - 1)).sqrt()[:, None]


def _triangle(a: Tensor) -> Tensor:
    """R with R'R = A'A, at most as tall as wide."""
    if a.shape[0] <= a.shape[1]:
        return a
    factor, failed = torch.linalg.cholesky_ex(a.T @ a, upper=True)
    # A covariance without an inverse, as of features that are always zero, has no such factor; QR takes longer.
    return torch.linalg.qr(a, mode="r").R if int(failed) else factor


def _pairs(weights: Tensor, kernel: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different images, weighted."""
    own = (weights.square() * kernel.diagonal()).sum()
    return (weights @ kernel @ weights - own) / (weights.sum() ** 2 - weights.square().sum())


def _draw(
    generator: numpy.random.Generator, n: int, n_reference: int, *, paired: bool
) -> tuple[Tensor, Tensor]:
    """Rows of both sets, drawn with replacement."""
    rows = _some(generator, n)
    return rows, rows if paired else _some(generator, n_reference)


def _counts(rows: Tensor, features: Tensor) -> Tensor:
    """How often each of the rows of `features` was drawn."""
    return torch.bincount(rows, minlength=len(features)).to(features)


def _some(generator: numpy.random.Generator, n: int) -> Tensor:
    while True:
        rows = generator.integers(n, size=n)
        if (rows != rows[0]).any():  # of one image alone there is neither a covariance nor a pair
            return torch.from_numpy(rows)


def _checked(features: Tensor, reference: Tensor, *, paired: bool) -> tuple[Tensor, Tensor]:
    if features.shape[1] != reference.shape[1]:
        raise DistanceError(
            f"features are {features.shape[1]} and {reference.shape[1]} wide; take one extractor"
        )
    if min(len(features), len(reference)) < 2:
        raise DistanceError(
            f"FID and KID need at least two images on each side; there are {len(features)} and {len(reference)}"
        )
    if paired and len(features) != len(reference):
        raise DistanceError(f"pairs need equally many images; there are {len(features)} and {len(reference)}")
    for set_ in (features, reference):
        if not torch.isfinite(set_).all():
            raise DistanceError("features hold values that are not finite (NaN or Inf)")
    return features.double().cpu(), reference.double().cpu()
