"""CSV tables of prompts: of those to sample, as benchmarks of concept removal publish them, and of categories, as I2P.

Both number their rows in one way. Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.datasets.index import DataError, passed_over
from mu.datasets.tables import INDEX, NUMBERS, Table, TableRow, read_table

CASE_NUMBERS = tuple(name for name in NUMBERS if name != INDEX)
SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE_COLUMNS = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale")
SEED_LIMIT = 2**32
GUIDANCE_LIMIT = 100.0
_CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
_ADVICE = " The first line of a .csv names its columns; one prompt a line without columns is a .txt file."


@dataclass(frozen=True)
class Case:
    """One row: the name that its images' files begin with, its prompt, and what it says of sampling (None: nothing)."""

    case_number: str
    prompt: str
    seed: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class PromptTable:
    """The cases of a table, and what is said of the rows that are passed over."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()


class _OutOfRange(Exception):
    """A guidance that is a number, and none that can be used."""


def read_prompt_table(path: Path, *, use_row_settings: bool = True) -> PromptTable:
    """The prompts to sample of a CSV file (UTF-8, with a header), in order.

    Of its columns only `prompt` must be there: others are `case_number` (COCO: `image_id`), `evaluation_seed` (I2P:
    `sd_seed`) and `evaluation_guidance` (I2P: `sd_guidance_scale`). Any more are not looked at.
    Rows are numbered by `case_number`, else `image_id`, else the unnamed first column that pandas writes, else from 0.
    A case may have several rows with the same prompt, each with another seed. A blank cell of seed or guidance says
    nothing. Rows without a prompt, and those whose guidance is out of range, are passed over.

    Args:
        use_row_settings: False: the cells of seed and guidance are not looked at, and a case is there once.

    Raises:
        DataError: the file cannot be read, has no `prompt` column or no row, or rows are wrong; they are listed.
    """
    settings = (*SEED_COLUMNS, *GUIDANCE_COLUMNS) if use_row_settings else ()
    table = read_table(path, required=("prompt",), optional=(*NUMBERS, *settings), advice=_ADVICE)
    cases: dict[int, Case] = {}  # by line
    problems: list[str] = []
    empty, out_of_range = _read_cases(table, settings, cases, problems)
    if not use_row_settings:
        first = {case: line for line, case in reversed(cases.items())}
        cases = {line: case for line, case in cases.items() if first[case] == line}
    problems += _repeated(table, cases)
    table.refuse(problems, advice="Correct these lines, or delete them.")
    notes = [
        *passed_over(empty, f"rows of {path} without a prompt"),
        *passed_over(
            out_of_range,
            f"rows of {path} that have a guidance outside 0 to {GUIDANCE_LIMIT:g}",
            advice="use_row_settings: false samples them with guidance_scale",
        ),
    ]
    if not cases:
        raise DataError(f"{path} has no row that can be sampled: {'; '.join(notes)}.")
    return PromptTable(tuple(cases.values()), tuple(notes))


def _read_cases(
    table: Table, settings: tuple[str, ...], cases: dict[int, Case], problems: list[str]
) -> tuple[list[str], list[str]]:
    """Fills `cases` and `problems`; returns the rows without a prompt, and those whose guidance is out of range."""
    numbering = table.first_of(NUMBERS)
    seeds, guidances = (
        table.first_of([name for name in names if name in settings])
        for names in (SEED_COLUMNS, GUIDANCE_COLUMNS)
    )
    empty, out_of_range = [], []
    for place, row in enumerate(table.rows):
        where = f"line {row.line}"
        prompt = " ".join(row.cells["prompt"].split())  # a line break means nothing to a text encoder
        if not prompt:
            empty.append(where)
            continue
        number = row.cells[numbering] if numbering is not None else str(place)
        if whole := re.fullmatch(r"([0-9]+)\.0*", number):  # of a column of floating point numbers
            number = whole[1]
        if not _CASE.fullmatch(number):
            problems.append(
                f"{where}: {numbering or 'index'} {number!r} cannot begin a file's name; take letters, digits, . and -"
            )
        try:
            seed = _seed(row.cells[seeds]) if seeds is not None else None
            guidance = _guidance(row.cells[guidances]) if guidances is not None else None
        except ValueError as error:
            problems.append(f"{where}: {error}")
        except _OutOfRange as error:
            out_of_range.append(f"{where}: {error}")
        else:
            cases[row.line] = Case(number, prompt, seed, guidance)
    return empty, out_of_range


def _repeated(table: Table, cases: dict[int, Case]) -> list[str]:
    """What is wrong with the cases of one number."""
    named = table.first_of(NUMBERS) or "index"
    prompts: dict[str, tuple[int, str]] = {}
    problems = []
    for line, case in cases.items():
        before, prompt = prompts.setdefault(case.case_number, (line, case.prompt))
        if prompt != case.prompt:
            problems.append(
                f"line {line}: {named} {case.case_number} is that of another prompt on line {before}"
            )
    counts = Counter((case.case_number, case.prompt, case.seed) for case in cases.values())
    twice = [number for (number, _, _), count in counts.items() if count > 1]
    if twice:
        problems.append(f"there more than once with one seed: {named} {', '.join(twice[:5])}")
    return problems


def _seed(cell: str) -> int | None:
    if not cell:
        return None
    whole = re.fullmatch(
        r"([0-9]{1,10})(?:\.0*)?", cell
    )  # pandas writes 12.0 where a cell of the column is blank
    if whole is None or int(whole[1]) >= SEED_LIMIT:
        raise ValueError(f"the seed {cell!r} is no whole number from 0 to {SEED_LIMIT - 1}")
    return int(whole[1])


def _guidance(cell: str) -> float | None:
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"the guidance {cell!r} is no number from 0 to {GUIDANCE_LIMIT:g}")
    if not 0.0 <= value <= GUIDANCE_LIMIT:
        raise _OutOfRange(cell)
    return value


@dataclass(frozen=True)
class PromptRow:
    """One row of a table of categories.

    A `prompt` of "" is none: the row keeps its place and its number, and nothing is made of it.

    `number` is what its image is called by, from the column that numbers the rows; None: the table has none.
    """

    number: str | None
    prompt: str
    categories: tuple[str, ...]
    line: int


def read_category_table(path: Path, *, numbers: Sequence[str] = NUMBERS) -> tuple[PromptRow, ...]:
    """Reads a table with the columns `prompt` and `categories` (several labels are separated by commas).

    I2P's seeds and guidances, which say how an image is sampled, and all other columns are left alone.
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
