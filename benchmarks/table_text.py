"""The results table in words: means of its rows, differences between methods, Markdown.

Numbers but FID are percent, to one decimal. A row without method is one of SalUn: the first tables had no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mu.evaluation.intervals import Estimate, mean_estimate

SCORES = ("UA", "IRA", "CRA", "own")

Row = dict[str, Any]
"""One concept: `template`, `template_name`, `method`, `recipe`, `threshold`; the shares `before` and `after` by score;
`seconds` by stage."""


# ---- means


def scores_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The scores that all rows have: `SCORES`, and FID where it was measured."""
    return (*SCORES, "FID") if rows and all("FID" in row["after"] for row in rows) else SCORES


def mean_of(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Means over the rows of a kind, in percent; of the base's scores too, as `base_UA` and so on."""
    own = [row for row in rows if row["template"] == kind]
    if not own:
        return {}
    means = {}
    for moment, prefix in (("after", ""), ("before", "base_")):
        for key in scores_of(own):
            unit = 1 if key == "FID" else 100
            means[prefix + key] = round(unit * sum(row[moment][key]["value"] for row in own) / len(own), 2)
    means["seconds"] = round(sum(sum(row["seconds"].values()) for row in own) / len(own), 1)
    return means


def by_method(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    """(method, threshold) -> its rows, in their order."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.get("method", "salun"), row.get("threshold")), []).append(row)
    return groups


def label(method: str, threshold: float | None) -> str:
    """`salun 0.5`, or `ascent`."""
    return method if threshold is None else f"{method} {exact(threshold)}"


def exact(threshold: float) -> str:
    """The threshold as it was given, so that no two have the same text."""
    return f"{threshold!r}".removesuffix(".0")


# ---- differences


def compare(own: Sequence[Row], others: Sequence[Row], score: str) -> Estimate | None:
    """The mean of a score's differences after unlearning, in percentage points, over the concepts that both have.

    Its interval is the bootstrap's, of pairs drawn anew (Efron 1979); None where no concept is in both.
    """
    first, second = (
        {(row["template"], row["template_name"]): 100 * row["after"][score]["value"] for row in rows}
        for rows in (own, others)
    )
    both = [first[concept] - second[concept] for concept in first if concept in second]
    return mean_estimate(both) if both else None


def differences_markdown(rows: Sequence[Row]) -> str:
    """SalUn minus each other method: of the same threshold, where the other has one."""
    groups = by_method(rows)
    lines = [
        f"| SalUn | minus | concepts | {' | '.join(SCORES)} |",
        f"|---|---|---:|{'---:|' * len(SCORES)}",
    ]
    for (method, threshold), own in groups.items():
        if method != "salun":
            continue
        for (other, size), others in groups.items():
            if other == "salun" or size not in (None, threshold):
                continue
            found = [difference for score in SCORES if (difference := compare(own, others, score))]
            if found:
                cells = " | ".join(map(_difference, found))
                lines.append(
                    f"| {label(method, threshold)} | {label(other, size)} | {found[0].n} | {cells} |"
                )
    return "\n".join(lines) + "\n"


def _difference(difference: Estimate) -> str:
    text = f"{difference.value:+.1f}"
    if difference.bootstrap_95 is None:
        return text
    return f"{text} ({difference.bootstrap_95[0]:+.1f} to {difference.bootstrap_95[1]:+.1f})"


# ---- Markdown


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, percent; of several methods or thresholds their means, and then a table of each."""
    groups = by_method(rows)
    if len(groups) < 2:
        return _table(rows)
    parts = (f"### {label(*which)}\n\n{_table(own)}" for which, own in groups.items())
    return "\n".join((means_markdown(rows), *parts))


def means_markdown(rows: Sequence[Row]) -> str:
    """The means alone: a line for each kind, method and threshold; n is the number of concepts."""
    columns = _columns(rows)
    lines = _head(("kind", "method"), ("n", *columns.values()))
    for kind in ("style", "object"):
        for which, own in by_method(rows).items():
            if means := mean_of(own, kind):
                count = sum(row["template"] == kind for row in own)
                lines.append(_line(f"{kind}s", f"{label(*which)} | {count}", means, columns))
    return "\n".join(lines) + "\n"


def reading(cra_prompts: str, left_out: Sequence[str]) -> str:
    """What stands below a table whose scores are not read in the usual way; nothing for the usual one."""
    parts = []
    if cra_prompts != "retained":
        parts.append(f"CRA is counted on {cra_prompts} prompts, those of the forgotten concept too.")
    if left_out:
        parts.append(f"Not counted: {', '.join(left_out)}.")
    return f"\n{' '.join(parts)}\n" if parts else ""


def _table(rows: Sequence[Row]) -> str:
    """Rows of one method, with the means of styles and of objects below them."""
    columns = _columns(rows)
    lines = _head(("kind", "forgotten"), columns.values())
    for kind in ("style", "object"):
        for row in rows:
            if row["template"] == kind:
                name = row["template_name"].replace("_", " ")
                lines.append(_line(kind, name, mean_of([row], kind), columns))
        if means := mean_of(rows, kind):
            lines.append(_line(f"**{kind}s**", "**mean**", means, columns))
    return "\n".join(lines) + "\n"


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    """Key -> heading of the columns before the seconds: each score, and that of the base, which has no UA."""
    columns = {}
    for score in scores_of(rows):
        columns[score] = score
        if score != "UA":
            columns[f"base_{score}"] = "base"
    return columns


def _head(names: Sequence[str], numbers: Iterable[str]) -> list[str]:
    headings = (*names, *numbers, "seconds")
    rules = "---|" * len(names) + "---:|" * (len(headings) - len(names))
    return [f"| {' | '.join(headings)} |", f"|{rules}"]


def _line(kind: str, name: str, values: Mapping[str, float], columns: Iterable[str]) -> str:
    return f"| {kind} | {name} | {' | '.join(f'{values[key]:.1f}' for key in columns)} | {values['seconds']:.0f} |"
