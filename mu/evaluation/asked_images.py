"""The images that are measured: each with the style, object and seed that it was asked for, whatever made it.

A folder of images may be laid out in one of these ways, which is recognised:

- `<Style>/<Object>/<seed>.png`, as evaluation itself samples them, and as UnlearnCanvas is laid out;
- `<Style>_<Object>_seed<seed>.jpg` (or `_seed_<seed>`), all in one folder or each style's in a folder `<Style>`, as
  UnlearnCanvas' own sampling names them;
- a folder of the command `sample`, with its `images.csv`: prompts `A {object} image in {style} style.`;
- where nothing is asked about styles and objects: any images, with prompts if there is an `images.csv`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.config_names import nearest
from mu.datasets.canvas import canvas_prompt
from mu.datasets.image_files import (
    check_folder,
    entries,
    find_images,
    image_problems,
    is_image,
    no_images,
    not_read,
)
from mu.datasets.index import DataError, Row, passed_over, raise_problems
from mu.datasets.tables import read_table

INDEX = "images.csv"
_LAYOUTS = (
    "<Style>/<Object>/<seed>.png, <Style>_<Object>_seed<seed>.png (also in folders <Style>), or a folder of the "
    f"command sample with its {INDEX}"
)
_FLAT = re.compile(r"(.+)_seed_?([0-9]{1,10})")


@dataclass(frozen=True)
class AskedImage:
    """An image file and what it was asked to show. Without concepts, style and object are empty, prompt too perhaps."""

    path: Path
    prompt: str
    style: str = ""
    object: str = ""
    seed: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What two models' images are paired by."""
        return self.style, self.object, self.seed

    def asked(self, kind: str) -> str:
        """The style or the object that the prompt named."""
        return self.style if kind == "style" else self.object


def of_rows(rows: Sequence[Row]) -> tuple[AskedImage, ...]:
    """The images of a grid, see `mu.evaluation.grid.Grid`."""
    return tuple(
        AskedImage(row.image, row.prompt, row.style, row.object, int(row.image.stem)) for row in rows
    )


def folder_images(
    key: str,
    folder: Path | str,
    *,
    styles: Sequence[str],
    objects: Sequence[str],
    chosen_styles: Sequence[str] | None = None,
    chosen_objects: Sequence[str] | None = None,
    notes: list[str] | None = None,
) -> tuple[AskedImage, ...]:
    """The images of a folder that show these styles and objects, ordered by style, object and seed.

    Args:
        key: the setting that named the folder, for messages.
        styles, objects: all names that may occur.
        chosen_styles, chosen_objects: those that are wanted; None: all. Each must be there.
        notes: what is said of files that are not measured is added to it.

    Raises:
        DataError: there is no such folder, it has another layout, a name or prompt is unknown, an image is there
            twice or cannot be used, or a wanted style or object has no image.
    """
    folder = Path(folder)
    check_folder(key, folder, advice=f"It is laid out as {_LAYOUTS}.")
    problems: list[str] = []
    others: list[Path] = []
    unlisted: list[str] = []
    if (folder / INDEX).is_file():
        found = list(_indexed(folder, styles, objects, problems))
        unlisted = _not_listed(folder)
    else:
        inside = entries(folder, folder.resolve(), problems)
        flat = [path for path in inside if path.is_file() and is_image(path)]
        if flat:
            others += (path for path in inside if not (path.is_file() and is_image(path)))
            found = list(_flat(flat, styles, objects, problems))
        else:
            found = list(_nested(folder, styles, objects, problems, others))
    raise_problems(
        problems, what=f"entries of {folder} do not fit", advice=f"{key} is laid out as {_LAYOUTS}."
    )
    found = [
        image
        for image in found
        if image.style in (chosen_styles or styles) and image.object in (chosen_objects or objects)
    ]
    for kind, names in (("styles", chosen_styles), ("objects", chosen_objects)):
        lacking = set(names or ()) - {image.asked(kind[:-1]) for image in found}
        if lacking:
            raise DataError(f"{kind}: {folder} has no image of {', '.join(sorted(lacking))}.")
    if not found:
        raise DataError(no_images(key, folder, others, layout=f", laid out as {_LAYOUTS}"))
    if notes is not None:
        notes += [*not_read(folder, others), *unlisted]
    twice: dict[tuple[str, str, int], Path] = {}
    for image in found:
        if (other := twice.setdefault(image.key, image.path)) != image.path:
            raise DataError(
                f"{key}: {other} and {image.path} are both {image.style}, {image.object}, {image.seed}."
            )
    _check(found)
    order = {name: number for names in (styles, objects) for number, name in enumerate(names)}
    return tuple(sorted(found, key=lambda image: (order[image.style], order[image.object], image.seed)))


def has_concepts(folder: Path, styles: Sequence[str], objects: Sequence[str]) -> bool:
    """Whether a folder is laid out by style and object: a style's folder, name or prompt is among its own."""
    if not folder.is_dir():
        return False
    if (folder / INDEX).is_file():
        prompts = {canvas_prompt(object, style) for style in styles for object in objects}
        return any(prompt in prompts for _, prompt, _ in _rows(folder))
    concepts = {f"{style}_{object}" for style in styles for object in objects}
    flat = [match[1] for path in folder.iterdir() if is_image(path) and (match := _FLAT.fullmatch(path.stem))]
    return any((folder / style).is_dir() for style in styles) or not concepts.isdisjoint(flat)


def any_images(key: str, folder: Path | str, *, notes: list[str] | None = None) -> tuple[AskedImage, ...]:
    """All images of a folder and those in it, by name; those of an `images.csv` with their prompts.

    Args:
        notes: what is said of files that are not measured is added to it.

    Raises:
        DataError: there is no such folder, it has no images, or some cannot be used.
    """
    folder = Path(folder)
    check_folder(key, folder, advice="Any folder of images will do.")
    problems: list[str] = []
    others: list[Path] = []
    unlisted: list[str] = []
    if (folder / INDEX).is_file():
        found = [AskedImage(path, prompt, seed=seed) for path, prompt, seed in _rows(folder)]
        unlisted = _not_listed(folder)
    else:
        found = [AskedImage(path, "") for path in find_images(folder, folder.resolve(), problems, others)]
    raise_problems(problems, what=f"entries of {folder} cannot be used", advice="Remove them.")
    if not found:
        raise DataError(no_images(key, folder, others))
    if notes is not None:
        notes += [*not_read(folder, others), *unlisted]
    _check(found)
    return tuple(found)


def rebased(images: Sequence[AskedImage], folder: Path) -> Iterator[Row]:
    """The same styles, objects and seeds as rows to sample into a folder of `GeneratedImages`."""
    for image in images:
        relative = f"{image.style}/{image.object}/{image.seed}.png"
        prompt = canvas_prompt(image.object, image.style)
        yield Row(folder / relative, relative, prompt, image.style, image.object, image.style)


def _check(images: Sequence[AskedImage]) -> None:
    raise_problems(
        image_problems(image.path for image in images),
        what="images cannot be measured",
        advice="Sample them again, or remove them.",
    )


def _nested(
    folder: Path, styles: Sequence[str], objects: Sequence[str], problems: list[str], others: list[Path]
) -> Iterator[AskedImage]:
    inside = folder.resolve()
    for style in _folders(folder, inside, styles, "style", problems, others):
        named: list[Path] = []
        for object in _folders(style, inside, objects, "object", problems, named):
            for path in entries(object, inside, problems):
                if not is_image(path):
                    others.append(path)
                    continue
                if not path.stem.isdecimal():
                    problems.append(f"{path}: the name must be the seed, a number")
                    continue
                prompt = canvas_prompt(object.name, style.name)
                yield AskedImage(path, prompt, style.name, object.name, int(path.stem))
        images = [path for path in named if is_image(path)]
        others += (path for path in named if not is_image(path))
        yield from _flat(images, (style.name,), objects, problems)


def _folders(
    folder: Path,
    inside: Path,
    names: Sequence[str],
    kind: str,
    problems: list[str],
    files: list[Path],
) -> Iterator[Path]:
    """The folders of these names; the files beside them are added to `files`."""
    for path in entries(folder, inside, problems):
        if not path.is_dir():
            files.append(path)
        elif path.name in names:
            yield path
        else:
            problems.append(f"{path}: no {kind} that the classifier knows.{nearest(path.name, names)}")


def _flat(
    paths: Sequence[Path], styles: Sequence[str], objects: Sequence[str], problems: list[str]
) -> Iterator[AskedImage]:
    concepts = {f"{style}_{object}": (style, object) for style in styles for object in objects}
    for path in paths:
        match = _FLAT.fullmatch(path.stem)
        if match is None or match[1] not in concepts:
            known = (
                "names that the classifier knows" if len(styles) > 1 else f"{styles[0]} and a known object"
            )
            problems.append(f"{path}: is not called <Style>_<Object>_seed<seed>, with {known}")
            continue
        style, object = concepts[match[1]]
        yield AskedImage(path, canvas_prompt(object, style), style, object, int(match[2]))


def _indexed(
    folder: Path, styles: Sequence[str], objects: Sequence[str], problems: list[str]
) -> Iterator[AskedImage]:
    concepts = {canvas_prompt(object, style): (style, object) for style in styles for object in objects}
    for path, prompt, seed in _rows(folder):
        if prompt not in concepts:
            problems.append(
                f"{path}: the prompt {prompt!r} names no style and object that the classifier knows"
            )
            continue
        style, object = concepts[prompt]
        yield AskedImage(path, prompt, style, object, seed)


def _rows(folder: Path) -> Iterator[tuple[Path, str, int]]:
    """Path, prompt and seed of each row of `images.csv`, as the command `sample` writes it."""
    table = read_table(
        folder / INDEX,
        required=("prompt", "evaluation_seed", "file"),
        advice=" The command sample writes such a table beside its images.",
    )
    problems: list[str] = []
    found: list[tuple[Path, str, int]] = []
    for row in table.rows:
        file, seed = row.cells["file"], row.cells["evaluation_seed"]
        if not re.fullmatch(r"[0-9]{1,10}", seed):
            problems.append(f"line {row.line}: the seed {seed!r} is no whole number")
        elif not file:
            problems.append(f"line {row.line}: it names no file")
        elif not (folder / file).resolve().is_relative_to(folder.resolve()):
            problems.append(f"line {row.line}: {file} lies outside of {folder}")
        else:
            found.append((folder / file, row.cells["prompt"], int(seed)))
    table.refuse(problems, advice="Correct or delete these lines.")
    yield from found


def _not_listed(folder: Path) -> list[str]:
    """One sentence on the images of a folder that its `images.csv` does not list; the grids of `sample` are none."""
    listed = {path.resolve() for path, _, _ in _rows(folder)}
    links: list[str] = []  # what is not measured may be one
    spare = [
        str(path)
        for path in find_images(folder, folder.resolve(), links, [])
        if path.resolve() not in listed and not (path.parent == folder and path.match("grid*.png"))
    ]
    return passed_over(spare, f"images of {folder} that its {INDEX} does not list")


def paired(images: Sequence[AskedImage], others: Sequence[AskedImage]) -> bool:
    """Whether both are of the same styles, objects and seeds, in the same order."""
    return [image.key for image in images] == [other.key for other in others]
