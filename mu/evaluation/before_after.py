"""Pictures of an evaluation: the grid of styles and objects before and after unlearning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from mu.datasets.index import check_choice, concept_names
from mu.pictures import beside, image_grid, write_png

__all__ = ["before_after_grid", "image_grid"]

Panel = Mapping[tuple[str, str], Image.Image]


def before_after_grid(
    panels: Mapping[str, Panel],
    *,
    styles: Sequence[str],
    objects: Sequence[str],
    template: str,
    template_name: str | Sequence[str],
    title: str,
    path: Path,
    cell_px: int = 64,
) -> Path:
    """Writes one PNG with a panel for each model side by side: rows are styles, columns objects.

    Args:
        panels: a panel's heading ("before", "after") -> {(style, object): image}, the same prompts and seeds.
        template: "style" or "object"; the row (column) `template_name` is framed and labelled as forgotten. Of
            several, the rows (columns) are put first, so that one frame holds them all.
        title: a line above the panels.
        cell_px: side of an image in the picture.

    Returns:
        `path`, where the file was written whole.

    Raises:
        DataError: there is no such row or column.
        WriteError: the file cannot be written.
    """
    targets = concept_names(template_name)
    names = styles if template == "style" else objects
    for name in targets:
        check_choice("template_name", name, names)
    first, marked = names.index(targets[0]), len(targets)
    if marked > 1:  # together, so that one frame holds them all
        first, names = 0, sorted(names, key=lambda name: name not in targets)
        styles, objects = (names, objects) if template == "style" else (styles, names)
    frame = range(first, first + marked)
    pictures = [
        image_grid(
            [[panel[style, object] for object in objects] for style in styles],
            [style.replace("_", " ") for style in styles],
            [object.replace("_", " ") for object in objects],
            title=heading,
            mark_row=frame if template == "style" else None,
            mark_column=frame if template == "object" else None,
            cell_px=cell_px,
        )
        for heading, panel in panels.items()
    ]
    write_png(path, beside(pictures, title=title))
    return path
