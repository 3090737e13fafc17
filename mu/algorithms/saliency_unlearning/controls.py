"""Does the method beat its controls? Differences between rows of the same concept, and what chance makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from mu.algorithms.saliency_unlearning.results_table import SCORES, Row, by_method, label, means_markdown

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """The mean of n paired differences, with the bootstrap's 95 % interval of it; None of fewer than two pairs."""

    mean: float
    interval: tuple[float, float] | None
    n: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """`first` minus `second`, pair by pair. The pairs are drawn anew (Efron 1979); the same numbers, the same interval.

    Raises:
        ValueError: there are no pairs, or one is left over.
    """
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        raise ValueError("there is no pair to take a difference of")
    differences = numpy.array([one - other for one, other in pairs])  # (n,)
    n = len(differences)
    if n < 2:
        return Difference(float(differences[0]), None, n)
    drawn = numpy.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    low, high = numpy.percentile(differences[drawn].mean(1), (2.5, 97.5))
    return Difference(float(differences.mean()), (float(low), float(high)), n)


def compare(own: Sequence[Row], control: Sequence[Row], score: str) -> Difference | None:
    """A score after unlearning, in percentage points, over the concepts that both have; None where there are none."""

    def scores(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
        return {(row["template"], row["template_name"]): 100 * row["after"][score]["value"] for row in rows}

    first, second = scores(own), scores(control)
    both = [concept for concept in first if concept in second]
    if not both:
        return None
    return paired_difference([first[concept] for concept in both], [second[concept] for concept in both])


def controls_markdown(rows: Sequence[Row]) -> str:
    """The means of each method, and SalUn minus each control: of the same threshold, where the control has one."""
    groups = by_method(rows)
    lines = [
        f"| SalUn | minus | concepts | {' | '.join(SCORES)} |",
        f"|---|---|---:|{'---:|' * len(SCORES)}",
    ]
    for (method, threshold), own in groups.items():
        if method != "salun":
            continue
        for (control, size), others in groups.items():
            if control == "salun" or size not in (None, threshold):
                continue
            found = [difference for score in SCORES if (difference := compare(own, others, score))]
            if found:
                cells = " | ".join(map(_cell, found))
                lines.append(
                    f"| {label(method, threshold)} | {label(control, size)} | {found[0].n} | {cells} |"
                )
    return f"{means_markdown(rows)}\n" + "\n".join(lines) + "\n"


def _cell(difference: Difference) -> str:
    if difference.interval is None:
        return f"{difference.mean:+.1f}"
    low, high = difference.interval
    return f"{difference.mean:+.1f} ({low:+.1f} to {high:+.1f})"
