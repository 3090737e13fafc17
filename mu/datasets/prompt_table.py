"""Prompts with a seed and a guidance of their own, from a CSV file, as benchmarks of concept removal publish them.

Columns, of which only `prompt` must be there: `case_number`; `evaluation_seed` (I2P: `sd_seed`); `evaluation_guidance`
(I2P: `sd_guidance_scale`). Any others are not looked at. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.datasets.index import DataError, raise_problems, suggestion

SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE_COLUMNS = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale")
SEED_LIMIT = 2**32
GUIDANCE_LIMIT = 100.0
_CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")


@dataclass(frozen=True)
class Case:
    """One row: the name that its images' files begin with, its prompt, and what it says of sampling (None: nothing)."""

    case_number: str
    prompt: str
    seed: int | None = None
    guidance_scale: float | None = None


def read_prompt_table(path: Path) -> tuple[Case, ...]:
    """The rows of a CSV file (UTF-8, with a header), in order.

    Where there is no column `case_number`, rows are numbered by the unnamed first column that pandas writes, else from
    0. A case may have several rows, each with another seed. A blank cell of seed or guidance says nothing.

    Raises:
        DataError: the file cannot be read, has no `prompt` column or no row, or rows are wrong; they are listed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error})") from error
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if any(row)]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error})") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if "prompt" not in header:
        near = suggestion("prompt", [name for name in header if name])
        raise DataError(
            f"{path} has no column `prompt` but {', '.join(header) or 'nothing'}.{near} The first line of a .csv names "
            "its columns; one prompt a line without columns is a .txt file"
        )
    if len(rows) == 1:
        raise DataError(f"{path} has columns, but no row")
    problems: list[str] = []
    cases = tuple(_cases(header, rows[1:], problems))
    counts = Counter((case.case_number, case.seed) for case in cases)
    twice = [number for (number, _), count in counts.items() if count > 1]
    if twice:
        problems.append(f"there more than once with one seed: case_number {', '.join(twice[:5])}")
    raise_problems(problems, what=f"mistakes in {path}", advice="Correct these cells, or delete their rows.")
    return cases


def _cases(header: Sequence[str], rows: Sequence[Sequence[str]], problems: list[str]) -> Iterator[Case]:
    numbering = "case_number" if "case_number" in header else "" if header[0] == "" else None
    seeds = next((name for name in SEED_COLUMNS if name in header), None)
    guidances = next((name for name in GUIDANCE_COLUMNS if name in header), None)
    for number, row in enumerate(rows):
        where = f"row {number + 1}"
        if len(row) != len(header):
            problems.append(f"{where}: {len(row)} cells for {len(header)} columns")
            continue
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        case = cells[numbering] if numbering is not None else str(number)
        if not _CASE.fullmatch(case):
            problems.append(
                f"{where}: case_number {case!r} cannot begin a file's name; take letters, digits, . and -"
            )
        prompt = " ".join(cells["prompt"].split())  # a line break means nothing to a text encoder
        if not prompt:
            problems.append(f"{where}: the prompt is empty")
        try:
            seed = _seed(cells[seeds]) if seeds is not None else None
            guidance = _guidance(cells[guidances]) if guidances is not None else None
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        yield Case(case, prompt, seed, guidance)


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
    if not 0.0 <= value <= GUIDANCE_LIMIT:
        raise ValueError(f"the guidance {cell!r} is no number from 0 to {GUIDANCE_LIMIT:g}")
    return value
