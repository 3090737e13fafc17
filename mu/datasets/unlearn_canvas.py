"""UnlearnCanvas, or any folder with its layout: `<root>/<Style>/<Class>/<n>.jpg`.

Styles and classes are those found in the folder. `Seed_Images` holds photographs, whose prompts say `Photo style`.
Source: Zhang et al., UnlearnCanvas, 2024 (arXiv 2402.11846).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mu.datasets.image_files import check_folder, entries, image_problems, is_image, not_read
from mu.datasets.index import (
    TEMPLATES,
    DataError,
    ForgetRetain,
    Row,
    check_apart,
    check_choice,
    check_substitutes,
    choose_substitute,
    concept_names,
    fill_substitute,
    natural_key,
    next_kept,
    raise_problems,
    suggestion,
)
from mu.datasets.prompts import SEED_STYLE, canvas_prompt, style_words

SAMPLE_IMAGES = 3
"""Images a class that `use_sample` keeps: as many as the published sample of the data set has."""
_ADVICE = "Download it with `download_data sample quick_canvas`, or give a folder laid out as <Style>/<Class>/<n>.jpg."


def index(
    root: Path | str,
    *,
    template: str,
    template_name: str | Sequence[str],
    use_sample: bool = False,
    substitute: str | None = None,
    retain_set: str = "others",
) -> ForgetRetain:
    """The rows of a folder: those of `template_name` to forget, and others to retain.

    Args:
        root: the folder of the styles.
        template: what is forgotten, "style" or "object".
        template_name: its folder's name, e.g. `Van_Gogh` or `Cats`; or several, which are forgotten together.
        use_sample: take only the first three images (in the order 1, 2, 10) of every class in every style.
        substitute: what stands in for a forgotten concept: another style (or object), or a whole prompt with
            `{object}` (or `{style}`). By default the same object as a photo; for an object the next object of the
            folder that is kept, in the same style. When the photos are forgotten, the next style of the folder.
        retain_set: "others", all other styles (or objects); "seed_images", of these only the photos in
            `Seed_Images`; "generated", none of this folder.

    Raises:
        DataError: the folder is missing or has another layout, a name is not in it, or images cannot be used: links,
            or files that are empty, unreadable, tiny or absurdly large.
    """
    root = Path(root)
    check_choice("template", template, TEMPLATES)
    images, problems, others = _scan(root, limit=SAMPLE_IMAGES if use_sample else None)
    raise_problems(
        problems,
        what=f"files of {root} cannot be used",
        advice="Replace or delete them; download the data set again if it is incomplete.",
    )
    styles = list(images)
    objects = sorted({name for classes in images.values() for name in classes}, key=natural_key)
    names = styles if template == "style" else objects
    targets = concept_names(template_name)
    for target in targets:
        if target not in names:
            raise DataError(
                f"template_name: there is no {template} {target!r} in {root}; found: {', '.join(names)}."
                f"{suggestion(target, names)}"
            )
    check_seed_images(retain_set, template=template, targets=targets, styles=styles)
    stand_ins = choose_substitutes(substitute, template=template, targets=targets, names=names)

    forget: list[Row] = []
    retain: list[Row] = []
    for style, classes in images.items():
        for object, files in classes.items():
            concept = style if template == "style" else object
            if concept not in stand_ins and (
                retain_set == "generated" or (retain_set == "seed_images" and style != SEED_STYLE)
            ):
                continue
            stand_in, whole_prompt = stand_ins.get(concept, (None, None))
            if concept not in stand_ins:
                substitute_prompt = None
            elif whole_prompt is not None:
                substitute_prompt = fill_substitute(whole_prompt, style=style_words(style), object=object)
            elif template == "style":
                substitute_prompt = canvas_prompt(object, str(stand_in))
            else:
                substitute_prompt = canvas_prompt(str(stand_in), style)
            for file in files:
                row = Row(
                    image=file,
                    relative=f"{style}/{object}/{file.name}",
                    prompt=canvas_prompt(object, style),
                    style=style,
                    object=object,
                    concept=concept,
                    substitute_prompt=substitute_prompt,
                )
                (forget if concept in stand_ins else retain).append(row)
    check_substitutes(forget)
    rows = ForgetRetain(tuple(forget), tuple(retain), tuple(not_read(root, others)))
    check_apart(rows)
    return rows


def check_seed_images(
    retain_set: str, *, template: str, targets: Sequence[str], styles: Sequence[str]
) -> None:
    """Raises DataError if the photos are to be retained and are not there, or are themselves to be forgotten."""
    if retain_set != "seed_images":
        return
    if template == "style" and SEED_STYLE in targets:
        raise DataError(f"retain_set: {SEED_STYLE} is to be forgotten; use retain_set others.")
    if SEED_STYLE not in styles:
        raise DataError(
            f"retain_set: seed_images needs the photos in the folder {SEED_STYLE}, which is not there; "
            "use retain_set others."
        )


def choose_substitutes(
    substitute: str | None, *, template: str, targets: Sequence[str], names: Sequence[str]
) -> dict[str, tuple[str | None, str | None]]:
    """What stands in for each forgotten name: see `choose_substitute`, also for what is raised."""
    photo = template == "style" and SEED_STYLE not in targets
    return {
        target: choose_substitute(
            substitute,
            template=template,
            target=targets,
            allowed=sorted({*names, SEED_STYLE}) if template == "style" else names,
            default=SEED_STYLE if photo else next_kept(target, names, targets),
        )
        for target in targets
    }


def no_images(root: Path) -> str:
    """What is said of a folder of another layout."""
    return (
        f"{root} holds no images laid out as <Style>/<Class>/<n>.jpg; is it the folder above or below the one that is "
        "meant?"
    )


def _scan(root: Path, *, limit: int | None) -> tuple[dict[str, dict[str, list[Path]]], list[str], list[Path]]:
    """Images by style and class, all in natural order; what is wrong with them; and what else lies there."""
    check_folder("raw_dataset_dir", root, advice=_ADVICE)
    inside = root.resolve()
    problems: list[str] = []
    images: dict[str, dict[str, list[Path]]] = {}
    others: list[Path] = []
    for style in entries(root, inside, problems):
        if not style.is_dir():
            others.append(style)
            continue
        classes: dict[str, list[Path]] = {}
        for object in entries(style, inside, problems):
            if not object.is_dir():
                others.append(object)
                continue
            files: list[Path] = []
            for path in entries(object, inside, problems):
                (files if is_image(path) and path.is_file() else others).append(path)
            files = files[:limit]
            if files:
                classes[object.name] = files
        if classes:
            images[style.name] = classes
    files_of = (file for classes in images.values() for files in classes.values() for file in files)
    problems += image_problems(files_of, others=problems)
    if not images and not problems:
        raise DataError(f"raw_dataset_dir: {' '.join([no_images(root), *not_read(root, others)])}")
    return images, problems, others
