"""CSV files with one row a line: every cell stands under its column, or a message says which lines do not fit.

All tables of the user are read here: prompts to sample, prompts with categories, captions. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.config_names import nearest
from mu.datasets.index import DataError, raise_problems

INDEX = ""
"""Name of the unnamed first column in which pandas writes its index; reading and writing again calls it Unnamed: 0."""
NUMBERS = ("case_number", "image_id", INDEX)
"""Columns that number the rows of a table; the first that is there counts. `image_id` is COCO's."""
_SHOWN = 60
QUOTING = 'A text with commas stands in double quotes, without a blank before them: 0.jpg,"a dog, sitting".'


@dataclass(frozen=True)
class TableRow:
    """One row: the line of the file on which it begins, and its cells by column, without blanks around them."""

    line: int
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """The rows whose cells fit the columns, and `misfits`, what is wrong with each of the other lines."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    misfits: tuple[str, ...]

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of these columns that the table has."""
        return next((name for name in names if name in self.columns), None)

    def refuse(self, problems: Sequence[str], *, advice: str) -> None:
        """Raises one DataError for the lines that do not fit and all other problems; nothing if there are none."""
        raise_problems(
            [*self.misfits, *problems],
            what=f"lines of {self.path} cannot be used",
            advice=f"{QUOTING} {advice}" if self.misfits else advice,
        )


def read_table(
    path: Path, *, required: Sequence[str], optional: Sequence[str] = (), advice: str = ""
) -> Table:
    """Reads a CSV file (UTF-8, with or without a byte-order mark) whose first line names the columns.

    Columns are found whatever their capitals; those that are neither required nor optional are left out of the rows.
    Empty lines, and lines of blanks, are none. A line with more or fewer cells than there are columns is never cut,
    filled or shifted: it is one of the table's `misfits`.

    Args:
        advice: what is said besides when a required column is not there.

    Raises:
        DataError: the file is no UTF-8 text or no CSV, has no rows, or a column is missing or there twice.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    lines: list[tuple[int, list[str]]] = []
    begins = 1
    try:
        for cells in reader:
            if len(cells) > 1 or (cells and not cells[0].isspace()):
                lines.append((begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file (line {begins}: {error}). {QUOTING}") from error
    columns = _column_names(lines[0][1]) if lines else ()
    wanted = (*required, *optional)
    for name in required:
        if name not in columns:
            there = [column for column in columns if column]
            raise DataError(
                f"{path} has no column {name!r}; its columns are: {', '.join(there) or 'none'}."
                f"{nearest(name, there)}{advice}"
            )
    twice = [name for name in wanted if columns.count(name) > 1]
    if twice:
        raise DataError(f"{path} has several columns called {twice[0]!r}; keep one.")
    if len(lines) == 1:
        raise DataError(f"{path} has columns, but no rows.")
    rows, misfits = [], []
    for line, cells in lines[1:]:
        if len(cells) == len(columns):
            named = zip(columns, cells, strict=True)
            rows.append(TableRow(line, {name: cell.strip() for name, cell in named if name in wanted}))
        else:
            misfits.append(f"line {line}: {_misfit(columns, cells)}")
    return Table(path, columns, tuple(rows), tuple(misfits))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark; raises DataError."""
    text, problem = text_or_problem(path)
    if text is None:
        raise DataError(f"{path} {problem}.")
    return text


def text_or_problem(path: Path) -> tuple[str | None, str]:
    """The text of a UTF-8 file; or None, and why it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return None, f"cannot be read ({error})"
    try:
        text = content.decode("utf-8-sig")
        place = content.find(b"\0")  # of UTF-16 without its mark, or of no text at all
    except UnicodeDecodeError as error:
        text, place = "", error.start
    if place < 0:
        return text, ""
    line = content[:place].count(b"\n") + 1
    return None, f"is not UTF-8 (byte 0x{content[place]:02x} on line {line}); save it as UTF-8"


def _column_names(header: Sequence[str]) -> tuple[str, ...]:
    names = []
    for place, name in enumerate(header):
        plain = name.strip().casefold()
        if place == 0 and plain in ("", "unnamed: 0"):
            names.append(INDEX)
        else:
            names.append(plain or f"(column {place + 1})")
    return tuple(names)


def _misfit(columns: Sequence[str], cells: Sequence[str]) -> str:
    text = " ".join(",".join(cells).split())
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    lacking = [name or "index" for name in columns[len(cells) :]]
    without = f" (without {', '.join(lacking)})" if lacking else ""
    return f"{len(cells)} cells for {len(columns)} columns{without}: {shown}"
