"""Differences to the controls, and their intervals."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from mu.algorithms.saliency_unlearning.controls import compare, controls_markdown, paired_difference
from mu.algorithms.saliency_unlearning.results_table import SCORES


def test_the_interval_is_that_of_the_mean_of_the_differences() -> None:
    """Of many pairs, about the normal one; the pairs' own spread, which is large, does not matter."""
    generator = numpy.random.default_rng(1)
    control = generator.normal(0, 50, size=400)
    differences = generator.normal(2, 3, size=400)
    found = paired_difference(control + differences, control)
    reach = 1.96 * differences.std() / 20
    assert found.n == 400
    assert found.mean == pytest.approx(differences.mean())
    assert found.interval == pytest.approx((found.mean - reach, found.mean + reach), abs=0.05)
    assert paired_difference(control + differences, control) == found


def test_equal_differences_have_an_interval_without_width_and_one_has_none() -> None:
    assert paired_difference([3.0, 5.0], [1.0, 3.0]).interval == (2.0, 2.0)
    assert paired_difference([3.0], [1.0]).interval is None
    with pytest.raises(ValueError, match="no pair"):
        paired_difference([], [])


def row(name: str, method: str, threshold: float | None, value: float) -> dict[str, Any]:
    scores = {key: {"value": value} for key in SCORES}
    return {
        "template": "style",
        "template_name": name,
        "method": method,
        "threshold": threshold,
        "before": scores,
        "after": scores,
        "seconds": {"train": 1.0},
    }


ROWS = [
    row("Noto", "salun", 0.5, 0.9),
    row("Blob", "salun", 0.5, 0.8),
    row("Blob", "random", 0.5, 0.7),
    row("Noto", "random", 0.5, 0.6),
    row("Noto", "salun", 0.1, 0.9),
    row("Noto", "ascent", None, 1.0),
]


def test_a_concept_is_compared_with_itself() -> None:
    found = compare(ROWS[:2], ROWS[2:4], "UA")
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(20.0), 2)
    assert found.interval == pytest.approx((10.0, 30.0))
    assert compare(ROWS[1:2], ROWS[5:], "UA") is None


def test_each_threshold_has_the_control_of_its_size_and_those_without_one() -> None:
    lines = controls_markdown(ROWS).partition("\n\n")[2].splitlines()
    assert lines[2] == "| salun 0.5 | random 0.5 | 2 |" + " +20.0 (+10.0 to +30.0) |" * 4
    assert lines[3] == "| salun 0.5 | ascent | 1 |" + " -10.0 |" * 4
    assert lines[4:] == ["| salun 0.1 | ascent | 1 |" + " -10.0 |" * 4]
