"""UnlearnCanvas, or any folder with its layout: `<root>/<Style>/<Class>/<n>.jpg`.

Styles and classes are those found in the folder. `Seed_Images` holds photographs, whose prompts say `Photo style`.
Source: Zhang et al., UnlearnCanvas, 2024 (arXiv 2402.11846).
"""

from __future__ import annotations

from pathlib import Path

from mu.datasets.index import (
    TEMPLATES,
    DataError,
    ForgetRetain,
    Row,
    check_choice,
    check_substitutes,
    choose_substitute,
    fill_substitute,
    natural_key,
    raise_problems,
    suggestion,
)
from mu.datasets.prompts import SEED_STYLE, canvas_prompt, style_words

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SAMPLE_IMAGES = 3
"""Images a class that `use_sample` keeps: as many as the published sample of the data set has."""


def index(
    root: Path | str,
    *,
    template: str,
    template_name: str,
    use_sample: bool = False,
    substitute: str | None = None,
) -> ForgetRetain:
    """The rows of a folder: those of `template_name` to forget, all others to retain.

    Args:
        root: the folder of the styles.
        template: what is forgotten, "style" or "object".
        template_name: its folder's name, e.g. `Van_Gogh` or `Cats`.
        use_sample: take only the first three images (in the order 1, 2, 10) of every class in every style.
        substitute: what stands in for the forgotten concept: another style (or object), or a whole prompt with
            `{object}` (or `{style}`). By default the same object as a photo; for an object the next object of the
            folder, in the same style. When the photos are forgotten, the next style of the folder.

    Raises:
        DataError: the folder is missing or has another layout, the name is not in it, images are empty or links
            that leave the folder.
    """
    root = Path(root)
    check_choice("template", template, TEMPLATES)
    images, problems = _scan(root, limit=SAMPLE_IMAGES if use_sample else None)
    raise_problems(
        problems,
        what=f"files of {root} cannot be used",
        advice="Replace or delete them; download the data set again if it is incomplete.",
    )
    styles = list(images)
    objects = sorted({name for classes in images.values() for name in classes}, key=natural_key)
    names = styles if template == "style" else objects
    if template_name not in names:
        raise DataError(
            f"template_name: there is no {template} {template_name!r} in {root}; found: {', '.join(names)}."
            f"{suggestion(template_name, names)}"
        )
    stand_in, whole_prompt = choose_substitute(
        substitute,
        template=template,
        target=template_name,
        allowed=sorted({*names, SEED_STYLE}) if template == "style" else names,
        default=_default_substitute(template, template_name, names),
    )

    forget: list[Row] = []
    retain: list[Row] = []
    for style, classes in images.items():
        for object, files in classes.items():
            concept = style if template == "style" else object
            if concept != template_name:
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
                (forget if concept == template_name else retain).append(row)
    if not forget:
        raise DataError(f"template_name: {root} has no image of the {template} {template_name!r}.")
    check_substitutes(forget)
    return ForgetRetain(tuple(forget), tuple(retain))


def _default_substitute(template: str, target: str, names: list[str]) -> str | None:
    if template == "style" and target != SEED_STYLE:
        return SEED_STYLE
    return names[(names.index(target) + 1) % len(names)]


def _scan(root: Path, *, limit: int | None) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
    """Images by style and class, all in natural order, and what is wrong with them."""
    if not root.is_dir():
        raise DataError(
            f"raw_dataset_dir: there is no folder {root}. Download it with `download_data sample quick_canvas`, "
            "or give a folder laid out as <Style>/<Class>/<n>.jpg."
        )
    inside = root.resolve()
    problems: list[str] = []

    def entries(folder: Path) -> list[Path]:
        kept = []
        for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
            if path.name.startswith((".", "__MACOSX")):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                problems.append(f"{path}: a link that leaves the folder (to {path.resolve()})")
            elif path.is_symlink():
                # Within the folder a link could bring images of the concept to forget among those to retain.
                problems.append(f"{path}: a link; images must be files of the folder itself")
            else:
                kept.append(path)
        return kept

    images: dict[str, dict[str, list[Path]]] = {}
    for style in entries(root):
        if not style.is_dir():
            continue
        classes: dict[str, list[Path]] = {}
        for object in entries(style):
            if not object.is_dir():
                continue
            files = [path for path in entries(object) if path.suffix.lower() in SUFFIXES and path.is_file()]
            files = files[:limit]
            problems += [f"{path}: an empty file" for path in files if path.stat().st_size == 0]
            if files:
                classes[object.name] = files
        if classes:
            images[style.name] = classes
    if not images and not problems:
        raise DataError(
            f"raw_dataset_dir: {root} holds no images laid out as <Style>/<Class>/<n>.jpg; "
            "is it the folder above or below the one that is meant?"
        )
    return images, problems
