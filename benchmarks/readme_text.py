"""What README shows of the measurements: the methods side by side, a row a scale of the stopwatch, and ESD's loss."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed_text import Report, computes
from benchmarks.stopwatch import ARMS
from benchmarks.table_text import SCORES, Row, by_method

_NAMES = {
    "salun": "SalUn",
    "esd": "ESD",
    "uce": "UCE",
    "random": "SalUn, random mask",
    "none": "SalUn, no mask",
}
"""Methods of README's table, in its order. Those that are not measured have no row."""


def scoreboard(rows: Sequence[Row], controls: Sequence[Row]) -> str:
    """A line a method: means over all concepts, in percent, and above them the model before, on the same prompts.

    Args:
        rows: of the results table.
        controls: of the table of controls, for methods that `rows` has not; of random masks, those of SalUn's size.
    """
    salun = [row for row in rows if row.get("method", "salun") == "salun"]
    sizes = {None, *(row.get("threshold") for row in salun)}
    measured = {method: own for (method, _), own in by_method(rows).items()}
    for (method, size), own in by_method(controls).items():
        if size in sizes:
            measured.setdefault(method, own)
    lines = [
        f"| | concepts | {' | '.join(SCORES)} | seconds |",
        f"|---|---:|{'---:|' * len(SCORES)}---:|",
        _line("the model before", salun, "before", seconds="-"),
    ]
    for method, name in _NAMES.items():
        if found := measured.get(method):
            seconds = sum(sum(row["seconds"].values()) for row in found) / len(found)
            lines.append(_line(name, found, "after", seconds=f"{seconds:.0f}"))
    return "\n".join(lines)


def speed_rows(reports: Sequence[Report]) -> str:
    """A line a measurement of the stopwatch: seconds and peak memory of the whole job, by each way."""
    lines = [
        "| weights of the UNet | device | plain | careful | ours | memory: plain | careful | ours |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for report in sorted(reports, key=lambda report: report["model"]["weights"]["unet"]):
        cells = [
            f"{report['model']['weights']['unet'] / 1e6:,.0f} million",
            computes(report),
        ]
        for key, unit, scale in (("job_s", "s", 1.0), ("job_peak_bytes", "GB", 1e9)):
            for arm in ARMS:
                value = report["summary"].get(arm, {}).get(key)
                cells.append("-" if value is None else f"{value / scale:.3g} {unit}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def method_source(path: Path, cls: str, name: str) -> str:
    """A method of a class, as it stands in its file but for the linter's marks, in a fence."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == name:
                    lines = text.splitlines()[inner.lineno - 1 : inner.end_lineno]
                    shown = (line.partition("  # noqa")[0] for line in lines)
                    return "```python\n" + textwrap.dedent("\n".join(shown)) + "\n```"
    raise ValueError(f"{path} has no {cls}.{name}")


def _line(name: str, rows: Sequence[Row], moment: str, *, seconds: str) -> str:
    means = [100 * sum(row[moment][score]["value"] for row in rows) / len(rows) for score in SCORES]
    return f"| {name} | {len(rows)} | {' | '.join(f'{mean:.1f}' for mean in means)} | {seconds} |"
