"""CSV tables of prompts with their categories: I2P's own, in both variants, and tables like it.

The variants differ in the names of their seed and guidance columns, which say how an image is sampled; unlearning
needs neither, so these and all other columns are left alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.datasets.index import DataError
from mu.datasets.tables import INDEX, NUMBERS, TableRow, read_table

CASE_NUMBERS = tuple(name for name in NUMBERS if name != INDEX)


@dataclass(frozen=True)
class PromptRow:
    """One row. A `prompt` of "" is none: the row keeps its place and its number, and nothing is made of it.

    `number` is what its image is called by, from the column that numbers the rows; None: the table has none.
    """

    number: str | None
    prompt: str
    categories: tuple[str, ...]
    line: int


def read_category_table(path: Path, *, numbers: Sequence[str] = NUMBERS) -> tuple[PromptRow, ...]:
    """Reads a table with the columns `prompt` and `categories` (several labels are separated by commas).

    Blanks and line breaks within a prompt become single blanks. Of a row without a prompt nothing else is looked at.

    Args:
        numbers: the columns that may number the rows; the first that is there does.

    Raises:
        DataError: the file cannot be read, lacks a column or has no rows, or rows are wrong (all of them, by line).
    """
    table = read_table(path, required=("prompt", "categories"), optional=numbers)
    numbering = table.first_of(numbers)
    rows: list[PromptRow] = []
    problems: list[str] = []
    for row in table.rows:
        try:
            rows.append(_row(row, numbering))
        except ValueError as error:
            problems.append(f"line {row.line}: {error}")
    counts = Counter(row.number for row in rows if row.number is not None and row.prompt)
    problems += [
        f"the {numbering or 'index'} {number} is there {count} times"
        for number, count in counts.items()
        if count > 1
    ]
    table.refuse(problems, advice="Correct or delete these lines.")
    if not any(row.prompt for row in rows):
        raise DataError(f"{path} has no row with a prompt.")
    return tuple(rows)


def categories_of(rows: tuple[PromptRow, ...]) -> tuple[str, ...]:
    """All categories, in the order in which they appear."""
    return tuple(dict.fromkeys(category for row in rows for category in row.categories))


def plain_number(text: str) -> str:
    """A number without leading zeros, and as whole as it is where a column of floating point numbers has it (`3.0`)."""
    whole = re.fullmatch(r"0*([0-9]+)(?:\.0*)?", text)
    return text if whole is None else whole[1]


def _row(row: TableRow, numbering: str | None) -> PromptRow:
    """Raises ValueError for a row that is none."""
    prompt = " ".join(row.cells["prompt"].split())
    labels = (label.strip() for label in row.cells["categories"].split(","))
    categories = tuple(dict.fromkeys(label for label in labels if label))
    number = None if numbering is None else row.cells[numbering]
    if prompt and not categories:
        raise ValueError("the row has no category")
    if prompt and number is not None and not re.fullmatch(r"[0-9]{1,18}(\.0*)?", number):
        raise ValueError(f"the {numbering or 'index'} {number!r} is not a whole number from 0")
    return PromptRow(None if number is None else plain_number(number), prompt, categories, row.line)
