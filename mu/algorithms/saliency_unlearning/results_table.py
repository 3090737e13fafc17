"""The results table: means of its rows, and its Markdown. Numbers are percent, to one decimal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCORES = ("UA", "IRA", "CRA", "own")
_HEADINGS = ("kind", "forgotten", "UA", "IRA", "base", "CRA", "base", "own", "base", "seconds")
_COLUMNS = ("UA", "IRA", "base_IRA", "CRA", "base_CRA", "own", "base_own")

Row = dict[str, Any]
"""One concept: `template`, `template_name`, the shares `before` and `after` by score, `seconds` by stage."""


def mean_of(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Means over the rows of a kind, in percent; of the base's scores too, as `base_UA` and so on."""
    own = [row for row in rows if row["template"] == kind]
    if not own:
        return {}
    means = {}
    for moment, prefix in (("after", ""), ("before", "base_")):
        for key in SCORES:
            means[prefix + key] = round(100 * sum(row[moment][key]["value"] for row in own) / len(own), 2)
    means["seconds"] = round(sum(sum(row["seconds"].values()) for row in own) / len(own), 1)
    return means


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, percent, with the means of styles and of objects below their rows."""
    lines = [f"| {' | '.join(_HEADINGS)} |", f"|---|---|{'---:|' * (len(_HEADINGS) - 2)}"]
    for kind in ("style", "object"):
        means = mean_of(rows, kind)
        for row in rows:
            if row["template"] == kind:
                lines.append(_line(kind, row["template_name"].replace("_", " "), mean_of([row], kind)))
        if means:
            lines.append(_line(f"**{kind}s**", "**mean**", means))
    return "\n".join(lines) + "\n"


def reading(cra_prompts: str, left_out: Sequence[str]) -> str:
    """What stands below a table whose scores are not read in the usual way; nothing for the usual one."""
    parts = []
    if cra_prompts != "retained":
        parts.append(f"CRA is counted on {cra_prompts} prompts, those of the forgotten concept too.")
    if left_out:
        parts.append(f"Not counted: {', '.join(left_out)}.")
    return f"\n{' '.join(parts)}\n" if parts else ""


def _line(kind: str, name: str, values: Mapping[str, float]) -> str:
    keys = ("UA", "IRA", "base_IRA", "CRA", "base_CRA", "own", "base_own")
    return (
        f"| {kind} | {name} | {' | '.join(f'{values[key]:.1f}' for key in keys)} | {values['seconds']:.0f} |"
    )
