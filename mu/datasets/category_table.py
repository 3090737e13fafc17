"""CSV tables of prompts with their categories: I2P's own, in both variants, and tables like it.

The variants differ in the names of their seed and guidance columns, which say how an image is sampled; unlearning
needs neither, so these and all other columns are left alone.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mu.datasets.index import DataError, raise_problems, suggestion

_INDEX_COLUMNS = ("", "unnamed: 0")
"""What pandas writes, and reads back, for an index without a name."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt.

    `number` is what the table's unnamed first column says, or, without that column, the row's place from 0.
    """

    number: int
    prompt: str
    categories: tuple[str, ...]


def read_category_table(path: Path) -> tuple[PromptRow, ...]:
    """Reads a table with the columns `prompt` and `categories` (several labels are separated by commas).

    Blanks and line breaks within a prompt become single blanks.

    Raises:
        DataError: the file cannot be read, lacks a column or has no rows, or rows are wrong (all of them, by line).
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = {(name or "").strip().casefold(): name for name in reader.fieldnames or ()}
            _check_columns(path, list(columns))
            rows: list[PromptRow] = []
            problems: list[str] = []
            for place, cells in enumerate(reader):
                try:
                    rows.append(_row(cells, columns, place))
                except ValueError as error:
                    problems.append(f"line {reader.line_num}: {error}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table of prompts ({error}).") from error
    numbers = Counter(row.number for row in rows)
    problems += [
        f"the index {number} is there {count} times" for number, count in numbers.items() if count > 1
    ]
    raise_problems(problems, what=f"rows of {path} cannot be used", advice="Correct or delete them.")
    if not rows:
        raise DataError(f"{path} has no rows.")
    return tuple(rows)


def categories_of(rows: tuple[PromptRow, ...]) -> tuple[str, ...]:
    """All categories, in the order in which they appear."""
    return tuple(dict.fromkeys(category for row in rows for category in row.categories))


def _check_columns(path: Path, columns: list[str]) -> None:
    for wanted in ("prompt", "categories"):
        if wanted not in columns:
            found = ", ".join(name for name in columns if name) or "none"
            raise DataError(
                f"{path} has no column {wanted!r}; its columns are: {found}.{suggestion(wanted, columns)}"
            )


def _row(cells: Mapping[str, str | None], columns: Mapping[str, str], place: int) -> PromptRow:
    """Raises ValueError for a row that is none."""

    def cell(*names: str) -> str | None:
        name = next((columns[name] for name in names if name in columns), None)
        text = cells.get(name) if name is not None else None
        return text.strip() if text is not None and text.strip() else None

    prompt, labels = cell("prompt"), cell("categories")
    if prompt is None:
        raise ValueError("the prompt is empty")
    categories = [label.strip() for label in (labels or "").split(",") if label.strip()]
    if not categories:
        raise ValueError("the row has no category")
    number = cell(*_INDEX_COLUMNS)
    return PromptRow(
        number=place if number is None else _whole(number),
        prompt=" ".join(prompt.split()),
        categories=tuple(dict.fromkeys(categories)),
    )


def _whole(text: str) -> int:
    """A whole number, also as a column of floating point numbers writes it (`3.0`)."""
    if not re.fullmatch(r"[0-9]{1,18}(\.0*)?", text):
        raise ValueError(f"the index {text!r} is not a whole number from 0")
    return int(text.partition(".")[0])
