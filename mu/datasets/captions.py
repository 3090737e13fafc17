"""The prompts of a folder of images: one for all, or written beside the images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mu.datasets.index import DataError, raise_problems, suggestion

METADATA = ("metadata.csv", "metadata.jsonl")
_FILE, _TEXT = "file_name", "text"


def captions(
    folder: Path, images: Sequence[Path], *, prompt: str | None, key: str, default: str | None = None
) -> dict[Path, str]:
    """The prompt of each image of a folder.

    With `prompt`, that one for all. Else the folder's `metadata.csv` or `metadata.jsonl` (columns `file_name`, a
    path below the folder, and `text`); else a text file of the image's name beside each (`7.txt` for `7.jpg`); else,
    when no image has one, `default`. Blanks and line breaks within a text become single blanks.

    Args:
        key: the config's key that gives `prompt`, for messages.

    Raises:
        DataError: images without a prompt or lines that are wrong (all of them), or a file that cannot be read.
    """
    if prompt is not None:
        return dict.fromkeys(images, prompt)
    tables = [path for name in METADATA if (path := folder / name).is_file() and not path.is_symlink()]
    if len(tables) > 1:
        raise DataError(f"{folder} has both {' and '.join(METADATA)}; keep one.")
    if tables:
        return _from_table(tables[0], folder, images)
    beside = {image: image.with_suffix(".txt") for image in images}
    written = {image: path for image, path in beside.items() if path.is_file() and not path.is_symlink()}
    if not written and default is not None:
        return dict.fromkeys(images, default)
    problems = [
        f"{image}: no {path.name} beside it" for image, path in beside.items() if image not in written
    ]
    texts: dict[Path, str] = {}
    for image, path in written.items():
        text = _words(_read(path))
        if text:
            texts[image] = text
        else:
            problems.append(f"{path}: empty")
    raise_problems(
        problems,
        what=f"images of {folder} have no prompt",
        advice=f"Write a text file beside each, or a {METADATA[0]} ({_FILE},{_TEXT}), or set {key}: one for all.",
    )
    return texts


def _from_table(table: Path, folder: Path, images: Sequence[Path]) -> dict[Path, str]:
    by_name = {image.relative_to(folder).as_posix(): image for image in images}
    texts: dict[Path, str] = {}
    problems = []
    lines = _csv_lines(table) if table.suffix == ".csv" else _json_lines(table)
    for line, name, text in lines:
        image = by_name.get(name.removeprefix("./"))
        if image is None:
            problems.append(f"line {line}: there is no image {name!r}.{suggestion(name, by_name)}")
        elif not text:
            problems.append(f"line {line}: {name} has no text")
        elif texts.setdefault(image, text) != text:
            problems.append(f"line {line}: {name} has another text already")
    missing = [name for name, image in by_name.items() if image not in texts]
    problems += [f"{name}: not in the table" for name in missing]
    raise_problems(
        problems,
        what=f"entries of {table} are wrong or missing",
        advice="Every image of the folder needs one line with its name and its text.",
    )
    return texts


def _csv_lines(table: Path) -> Iterator[tuple[int, str, str]]:
    """(line, file name, text) of each row."""
    reader = csv.DictReader(io.StringIO(_read(table), newline=""))
    columns = {(name or "").strip(): name for name in reader.fieldnames or ()}
    absent = [name for name in (_FILE, _TEXT) if name not in columns]
    if absent:
        found = ", ".join(columns) or "none"
        raise DataError(f"{table} has no column {absent[0]!r}; its columns are: {found}.")
    for cells in reader:
        yield reader.line_num, (cells[columns[_FILE]] or "").strip(), _words(cells[columns[_TEXT]] or "")


def _json_lines(table: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(_read(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry[_FILE], entry[_TEXT]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f'{table} line {number} is not like {{"{_FILE}": "1.jpg", "{_TEXT}": "a photo"}}.'
            ) from error
        yield number, name.strip(), _words(text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}).") from error


def _words(text: str) -> str:
    return " ".join(text.split())
