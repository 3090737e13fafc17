"""What README shows of the measurements: which methods have a row, and what stands in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme_text import method_source, scoreboard, speed_rows
from benchmarks.table_text import SCORES


def row(method: str, threshold: float | None, after: float, *, kind: str = "style") -> dict[str, Any]:
    return {
        "template": kind,
        "method": method,
        "threshold": threshold,
        "before": {score: {"value": 0.25} for score in SCORES},
        "after": {score: {"value": after} for score in SCORES},
        "seconds": {"mask": 1.0, "train": after * 10},
    }


def test_a_method_of_the_table_is_not_taken_from_the_controls() -> None:
    """Means over styles and objects together; random masks of another size than SalUn's, and ascent, have no row."""
    table = [row("salun", 0.5, 0.9), row("salun", 0.5, 0.8, kind="object"), row("uce", None, 0.5)]
    controls = [
        row("salun", 0.1, 0.1),
        row("uce", None, 0.1),
        row("random", 0.1, 0.2),
        row("random", 0.5, 0.7),
        row("none", None, 0.6),
        row("ascent", None, 1.0),
    ]
    lines = scoreboard(table, controls).splitlines()[2:]
    assert lines == [
        "| the model before | 2 |" + " 25.0 |" * 4 + " - |",
        "| SalUn | 2 |" + " 85.0 |" * 4 + " 10 |",
        "| UCE | 1 |" + " 50.0 |" * 4 + " 6 |",
        "| SalUn, random mask | 1 |" + " 70.0 |" * 4 + " 8 |",
        "| SalUn, no mask | 1 |" + " 60.0 |" * 4 + " 7 |",
    ]


def test_a_row_for_each_measurement_names_its_device() -> None:
    def report(weights: int, device: str, **summary: dict[str, float]) -> dict[str, Any]:
        return {
            "model": {"weights": {"unet": weights}},
            "settings": {"device": device},
            "cpu": "A CPU",
            "device": {"environment": {"torch": {"threads": 2, "devices": ["A GPU"]}}},
            "summary": summary,
        }

    ours = {"job_s": 12.34, "job_peak_bytes": 1.5e9}
    both = report(20_000_000, "cpu", plain={"job_s": 100.0, "job_peak_bytes": 2e9}, ours=ours)
    alone = report(10_000_000, "cuda", ours=ours)
    assert speed_rows([both, alone]).splitlines()[2:] == [
        "| 10 million | A GPU | - | - | 12.3 s | - | - | 1.5 GB |",
        "| 20 million | A CPU, 2 threads | 100 s | - | 12.3 s | 2 GB | - | 1.5 GB |",
    ]


def test_a_method_stands_as_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "class A:\n    def f(self):  # noqa: A001\n        return 1\n\n    x = 1\n", encoding="utf-8"
    )
    assert method_source(path, "A", "f") == "```python\ndef f(self):\n    return 1\n```"
    with pytest.raises(ValueError, match=r"no A\.h"):
        method_source(path, "A", "h")
