"""The scoreboard of robustness as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
"""A model and a stage of an attack: `template`, `template_name`, `attack`, `subject`, `stage`, `success`, `both`."""
BASE = "base"
OTHER_NAME = "base, taught by another name"


def markdown(rows: Sequence[Row]) -> str:
    """For each concept its subjects, a column an attack and stage: images that are seen as the concept, in percent."""
    parts = []
    for concept in dict.fromkeys((row["template"], row["template_name"]) for row in rows):
        own = [row for row in rows if (row["template"], row["template_name"]) == concept]
        name = concept[1].replace("_", " ")
        parts.append(f"### {concept[0].capitalize()} {name}\n\n{table(own)}")
    return "\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """The subjects of one concept. Of each number the 95 % interval (Wilson); n is the same for all."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        column = "plain" if row["stage"] == "plain" else _column(row)
        cells.setdefault(row["subject"], {})[column] = _cell(row["success"])
    columns = list(dict.fromkeys(column for found in cells.values() for column in found))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for subject, found in cells.items():
        lines.append(f"| {subject} | {' | '.join(found.get(column, '-') for column in columns)} |")
    return "\n".join(lines) + "\n"


def _column(row: Row) -> str:
    attack = str(row["attack"]).replace("_", "-")
    return attack if row["stage"] == "attacked" else f"{attack}, {row['stage']}"


def _cell(share: Mapping[str, Any]) -> str:
    low, high = share["wilson_95"]
    return f"{100 * share['value']:.0f} ({100 * low:.0f}-{100 * high:.0f})"
