"""What the table says: means, differences between methods, Markdown."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.table_text import (
    SCORES,
    compare,
    differences_markdown,
    label,
    markdown,
    mean_of,
    means_markdown,
    reading,
)


def pair(name: str, method: str, threshold: float | None, value: float) -> dict[str, Any]:
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


PAIRS = [
    pair("Noto", "salun", 0.5, 0.9),
    pair("Blob", "salun", 0.5, 0.8),
    pair("Blob", "random", 0.5, 0.7),
    pair("Noto", "random", 0.5, 0.6),
    pair("Noto", "salun", 0.1, 0.9),
    pair("Noto", "ascent", None, 1.0),
]


def test_a_concept_is_compared_with_itself() -> None:
    """The interval is that of the differences: the scores' own spread does not matter."""
    found = compare(PAIRS[:2], PAIRS[2:4], "UA")
    assert found is not None
    assert (found.value, found.n) == (pytest.approx(20.0), 2)
    assert found.bootstrap_95 == pytest.approx((10.0, 30.0))
    same = compare(PAIRS[:2], [pair("Blob", "random", 0.5, 0.6), pair("Noto", "random", 0.5, 0.7)], "UA")
    assert same is not None
    assert same.bootstrap_95 == pytest.approx((20.0, 20.0))
    assert compare(PAIRS[1:2], PAIRS[5:], "UA") is None


def test_each_threshold_has_the_control_of_its_size_and_those_without_one() -> None:
    lines = differences_markdown(PAIRS).splitlines()
    assert lines[2] == "| salun 0.5 | random 0.5 | 2 |" + " +20.0 (+10.0 to +30.0) |" * 4
    assert lines[3] == "| salun 0.5 | ascent | 1 |" + " -10.0 |" * 4
    assert lines[4:] == ["| salun 0.1 | ascent | 1 |" + " -10.0 |" * 4]


def test_a_label_holds_the_whole_threshold() -> None:
    assert [label("salun", size) for size in (None, 0.5, 1.0, 1, 1e-05)] == [
        "salun",
        "salun 0.5",
        "salun 1",
        "salun 1",
        "salun 1e-05",
    ]
    assert label("salun", 0.1234567) == "salun 0.1234567"
    assert label("salun", 0.30000001) != label("salun", 0.3)


# ---- counting


def row(template: str, name: str, seconds: float, **percents: tuple[float, float]) -> dict[str, Any]:
    """A row whose scores are (before, after) in percent."""
    return {
        "template": template,
        "template_name": name,
        "before": {key: {"value": before / 100} for key, (before, _) in percents.items()},
        "after": {key: {"value": after / 100} for key, (_, after) in percents.items()},
        "seconds": {"mask": seconds, "train": 2 * seconds},
    }


ROWS = [
    row("style", "Noto", 10.0, UA=(1, 100), IRA=(99, 90), CRA=(98, 94), own=(97, 80)),
    row("style", "High_Contrast", 20.0, UA=(2, 91), IRA=(97, 95), CRA=(96, 95), own=(95, 70)),
    row("object", "Cats", 30.0, UA=(0, 50), IRA=(100, 99), CRA=(98, 97.06), own=(99, 12.5)),
]


def test_means_are_of_the_rows_of_their_kind() -> None:
    assert mean_of(ROWS, "style") == {
        "UA": 95.5,
        "IRA": 92.5,
        "CRA": 94.5,
        "own": 75.0,
        "base_UA": 1.5,
        "base_IRA": 98.0,
        "base_CRA": 97.0,
        "base_own": 96.0,
        "seconds": 45.0,
    }
    assert mean_of(ROWS, "object")["CRA"] == 97.06
    assert mean_of(ROWS[:2], "object") == {}


def test_the_usual_reading_is_not_mentioned() -> None:
    assert reading("retained", ()) == ""
    assert reading("retained", ["Blob"]) == "\nNot counted: Blob.\n"


def test_the_markdown_table_is_the_hand_written_one() -> None:
    assert markdown(ROWS).splitlines() == [
        "| kind | forgotten | UA | IRA | base | CRA | base | own | base | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| style | Noto | 100.0 | 90.0 | 99.0 | 94.0 | 98.0 | 80.0 | 97.0 | 30 |",
        "| style | High Contrast | 91.0 | 95.0 | 97.0 | 95.0 | 96.0 | 70.0 | 95.0 | 60 |",
        "| **styles** | **mean** | 95.5 | 92.5 | 98.0 | 94.5 | 97.0 | 75.0 | 96.0 | 45 |",
        "| object | Cats | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
        "| **objects** | **mean** | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
    ]


def test_several_methods_have_a_table_each_below_their_means() -> None:
    rows = [
        *({**row, "method": "salun", "threshold": 0.5} for row in ROWS),
        {**ROWS[0], "method": "random", "threshold": 0.5},
        {**ROWS[2], "method": "ascent", "threshold": None},
    ]
    means, *tables = markdown(rows).split("\n### ")
    assert means == means_markdown(rows)
    assert means.splitlines()[2:] == [
        "| styles | salun 0.5 | 2 | 95.5 | 92.5 | 98.0 | 94.5 | 97.0 | 75.0 | 96.0 | 45 |",
        "| styles | random 0.5 | 1 | 100.0 | 90.0 | 99.0 | 94.0 | 98.0 | 80.0 | 97.0 | 30 |",
        "| objects | salun 0.5 | 1 | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
        "| objects | ascent | 1 | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
    ]
    assert [table.partition("\n\n")[0] for table in tables] == ["salun 0.5", "random 0.5", "ascent"]
    assert tables[0].partition("\n\n")[2].strip() == markdown(ROWS).strip()
