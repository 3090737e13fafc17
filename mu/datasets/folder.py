"""Any own images: a folder of those to forget, and another of those to retain.

Prompts are given, one for all images of a folder, or stand beside the images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mu.config_names import nearest
from mu.datasets.base import WITHOUT_IMAGES, DataSet, Problem
from mu.datasets.generated import substitute_key, substitute_problems, substitute_prompt
from mu.datasets.image_files import check_folder, find_images, image_problems, no_images, not_read
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_whole_prompt,
    concept_label,
    passed_over,
    raise_problems,
)
from mu.datasets.tables import QUOTING, read_table, read_text, text_or_problem

METADATA = ("metadata.csv", "metadata.jsonl")
_FILE, _TEXT = "file_name", "text"


class Folder(DataSet):
    about = "any images, with prompts."
    captioned = ("others",)

    def key_problems(self) -> Iterator[Problem]:
        config = self.config
        if config.raw_dataset_dir is None:
            yield (
                ("raw_dataset_dir", "dataset_type"),
                f"dataset_type folder needs a folder of images; {WITHOUT_IMAGES}",
            )
        if config.forget_prompts is not None and len(config.forget_prompts) > 1:
            message = "folder: give one prompt for all images, or texts beside them"
            yield ("forget_prompts", "dataset_type"), message
        yield from self.no_grid()
        yield from self.retain_prompts_problems()
        if self.retain_set == "generated":
            yield from self.no_retain_folder()
        elif config.retain_dataset_dir is None:
            message = "dataset_type folder needs a folder of images to retain, or retain_set generated"
            yield ("retain_dataset_dir", "dataset_type", "retain_set"), message
        yield from substitute_problems(self)
        yield from self.no_missing_images()

    @property
    def substitute_key(self) -> str:
        return substitute_key(self)

    def read(self) -> ForgetRetain:
        """The images of the folders, with those in folders below them.

        Raises:
            DataError: a folder is missing, has no images, or is a part of the other; images that cannot be used (all
                of them in one message); images without a prompt; a prompt that is to be forgotten and to be retained.
        """
        config, concept, substitute = (
            self.config,
            concept_label(self.config.template_name),
            substitute_prompt(self),
        )
        check_whole_prompt(substitute_key(self), substitute, (concept,))
        roots = {"raw_dataset_dir": Path(config.raw_dataset_dir)}
        if self.retain_set == "others":
            roots["retain_dataset_dir"] = Path(config.retain_dataset_dir)
        for key, root in roots.items():
            check_folder(key, root, advice="Any folder of images will do.")
        _check_separate(list(roots.values()))
        written = {key: getattr(config, key, None) for key in ("processed_dataset_dir", "output_dir")}
        _check_outside(roots, {key: Path(folder) for key, folder in written.items() if folder is not None})

        # The images.
        images: dict[str, list[Path]] = {}
        problems: list[str] = []
        notes: list[str] = []
        for key, root in roots.items():
            links: list[str] = []
            others: list[Path] = []
            images[key] = find_images(root, root.resolve(), links, others)
            problems += links
            if not images[key] and not links:
                raise DataError(no_images(key, root, others))
            notes += not_read(root, others)
        problems += image_problems((image for found in images.values() for image in found), others=problems)
        raise_problems(
            problems,
            what="files cannot be used",
            advice="Replace or delete them; copy the files that links lead to.",
        )
        _check_no_copies(images["raw_dataset_dir"], images.get("retain_dataset_dir", ()))

        # Their prompts.
        texts: dict[Path, str] = {}
        wrong: list[str] = []
        for key, root in roots.items():
            prompts_key = "forget_prompts" if key == "raw_dataset_dir" else "retain_prompts"
            given = getattr(config, prompts_key)
            prompt = None if given is None else given[0]
            try:
                texts |= captions(root, images[key], prompt=prompt, key=prompts_key, notes=notes)
            except DataError as error:
                wrong.append(str(error))
        if wrong:
            raise DataError("\n".join(wrong))

        def row(key: str, image: Path, concept: str, substitute: str | None = None) -> Row:
            part = "forget" if key == "raw_dataset_dir" else "retain"
            relative = f"{part}/{image.relative_to(roots[key]).as_posix()}"
            return Row(image, relative, texts[image], "", "", concept, substitute)

        forget = [row("raw_dataset_dir", image, concept, substitute) for image in images["raw_dataset_dir"]]
        retain = [
            row("retain_dataset_dir", image, "retain") for image in images.get("retain_dataset_dir", ())
        ]
        return ForgetRetain(tuple(forget), tuple(retain), tuple(notes))


def _check_separate(roots: list[Path]) -> None:
    if len(roots) < 2:
        return
    forget, retain = (root.resolve() for root in roots)
    if forget.is_relative_to(retain) or retain.is_relative_to(forget):
        raise DataError(
            f"retain_dataset_dir: {roots[1]} and raw_dataset_dir {roots[0]} must not be the same folder, nor one "
            "within the other."
        )


def _check_no_copies(forget: Sequence[Path], retain: Sequence[Path]) -> None:
    """Raises DataError for files of the same bytes, which would be forgotten and retained; lists all of them."""
    by_size: dict[int, list[Path]] = {}
    for path in forget:
        by_size.setdefault(path.stat().st_size, []).append(path)
    hashes: dict[int, dict[str, Path]] = {}  # size -> SHA-256 -> file: only files of one size are read
    copies = []
    for path in retain:
        if (size := path.stat().st_size) in by_size:
            if size not in hashes:
                hashes[size] = {_sha256(other): other for other in by_size[size]}
            if (other := hashes[size].get(_sha256(path))) is not None:
                copies.append(f"{other} and {path}")
    raise_problems(
        copies,
        what="images lie in raw_dataset_dir, to be forgotten, and as the same file in retain_dataset_dir",
        advice="Delete one of the two.",
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_outside(roots: Mapping[str, Path], written: Mapping[str, Path]) -> None:
    for key, folder in written.items():
        for root_key, root in roots.items():
            if folder.resolve().is_relative_to(root.resolve()):
                raise DataError(
                    f"{key}: {folder} lies in {root_key} {root}, of which all images are read, and so would be those "
                    "that are written there; choose a folder outside it."
                )


def captions(
    folder: Path,
    images: Sequence[Path],
    *,
    prompt: str | None,
    key: str,
    default: str | None = None,
    notes: list[str] | None = None,
) -> dict[Path, str]:
    """The prompt of each image of a folder.

    With `prompt`, that one for all. Else the folder's `metadata.csv` or `metadata.jsonl` (columns `file_name`, a
    path below the folder, and `text`); else a text file of the image's name beside each (`7.txt` for `7.jpg`); else,
    when no image has one, `default`. Blanks and line breaks within a text become single blanks.

    Args:
        key: the config's key that gives `prompt`, for messages.
        notes: what is said of texts that are not read is added to it.

    Raises:
        DataError: images without a prompt or lines that are wrong (all of them), or files that are no UTF-8 text (all
            of them).
    """
    tables = [path for name in METADATA if (path := folder / name).is_file() and not path.is_symlink()]
    beside = {image: image.with_suffix(".txt") for image in images}
    written = {image: path for image, path in beside.items() if path.is_file() and not path.is_symlink()}
    found = [] if notes is None else notes
    if prompt is not None:
        unread = [str(path) for path in (*tables, *written.values())]
        found += passed_over(unread, f"texts of the images of {folder}, for {key} is given")
        return dict.fromkeys(images, prompt)
    if len(tables) > 1:
        raise DataError(f"{folder} has both {' and '.join(METADATA)}; keep one.")
    folders = {image.parent for image in images}
    alone = sorted({path for inner in folders for path in inner.glob("*.txt")} - set(beside.values()))
    found += passed_over(
        [str(path) for path in alone], f"text files of {folder} without an image beside them"
    )
    if tables:
        unread = [str(path) for path in written.values()]
        found += passed_over(unread, f"text files beside images, for {tables[0]} has the texts")
        return _from_table(tables[0], folder, images)
    if not written and default is not None:
        return dict.fromkeys(images, default)
    problems = [
        f"{image}: no {path.name} beside it" for image, path in beside.items() if image not in written
    ]
    texts: dict[Path, str] = {}
    for image, path in written.items():
        text, problem = text_or_problem(path)
        if text is None:
            problems.append(f"{path}: {problem}")
        elif words := _words(text):
            texts[image] = words
        else:
            problems.append(f"{path}: empty")
    raise_problems(
        problems,
        what=f"images of {folder} have no prompt",
        advice=f"Write a UTF-8 text file beside each, or a {METADATA[0]} ({_FILE},{_TEXT}), or set {key}: one for all.",
    )
    return texts


def _from_table(table: Path, folder: Path, images: Sequence[Path]) -> dict[Path, str]:
    by_name = {image.relative_to(folder).as_posix(): image for image in images}
    texts: dict[Path, str] = {}
    problems: list[str] = []
    lines = list(_csv_lines(table, problems) if table.suffix == ".csv" else _json_lines(table, problems))
    unread = bool(problems)  # the images of these lines are not missing in the table
    for line, name, text in lines:
        image = by_name.get(name.removeprefix("./"))
        if image is None:
            problems.append(f"line {line}: there is no image {name!r}.{nearest(name, by_name)}")
        elif not text:
            problems.append(f"line {line}: {name} has no text")
        elif texts.setdefault(image, text) != text:
            problems.append(f"line {line}: {name} has another text already")
    if not unread:
        problems += [f"{name}: not in the table" for name, image in by_name.items() if image not in texts]
    raise_problems(
        problems,
        what=f"entries of {table} are wrong or missing",
        advice="Every image of the folder needs one line with its name and its text."
        + (f" {QUOTING}" if unread and table.suffix == ".csv" else ""),
    )
    return texts


def _csv_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str, str]]:
    """(line, file name, text) of each row; what is wrong with the others is added to `problems`."""
    table = read_table(path, required=(_FILE, _TEXT))
    problems += table.misfits
    for row in table.rows:
        yield row.line, row.cells[_FILE], _words(row.cells[_TEXT])


def _json_lines(table: Path, problems: list[str]) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry[_FILE], entry[_TEXT]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            problems.append(f'line {number} is not like {{"{_FILE}": "1.jpg", "{_TEXT}": "a photo"}}')
        else:
            yield number, name.strip(), _words(text)


def _words(text: str) -> str:
    return " ".join(text.split())
