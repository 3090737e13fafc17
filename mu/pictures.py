"""Pictures of many images: rows and columns with labels, one of them marked. Pillow alone, no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mu.atomic import write_atomically

MARK = (208, 0, 70)
"""Colour of the frame and label of the marked row or column; it is in no drawing's background."""

_TEXT = (30, 30, 30)
_PAPER = (255, 255, 255)
_GAP_PX = 4
_FRAME_PX = 3
_MARGIN_PX = 10
_LABEL_MAX_PX = 220
_FONT_PX = 14
_SMALLEST_FONT_PX = 8

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_png(path: str | Path, picture: Image.Image) -> None:
    """The whole picture at `path`, or what was there before."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_atomically(path, content.getvalue())


@dataclass(frozen=True)
class GridLayout:
    """Where things lie in a grid, in pixels: cell (r, c) begins at x = left + c * pitch, y = top + r * pitch."""

    left: int
    top: int
    pitch: int
    cell: int


def image_grid(
    images: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str = "",
    mark_row: int | range | None = None,
    mark_column: int | range | None = None,
    cell_px: int = 64,
) -> Image.Image:
    """One picture of images in rows and columns.

    Args:
        images: rows of equally many images; each is fitted into a square cell.
        row_labels, column_labels: one for each; long ones are wrapped or made smaller.
        title: a line above.
        mark_row, mark_column: the row, the column (or a range of them) with a coloured frame and label.
        cell_px: side of a cell.

    Raises:
        ValueError: the numbers of labels and images do not fit.
    """
    if not images or len(images) != len(row_labels) or any(len(row) != len(column_labels) for row in images):
        raise ValueError(
            f"{len(row_labels)} row labels and {len(column_labels)} column labels do not fit rows of "
            f"{sorted({len(row) for row in images})} images, {len(images)} rows"
        )
    marked = _as_range(mark_row)
    layout = grid_layout(row_labels, column_labels, title=title, cell_px=cell_px)
    pitch = layout.pitch
    width = layout.left + len(column_labels) * pitch + _MARGIN_PX
    if title:
        width = max(width, 2 * _MARGIN_PX + _width(title, _font(_FONT_PX + 4)))
    picture = Image.new("RGB", (width, layout.top + len(row_labels) * pitch + _MARGIN_PX), _PAPER)
    pen = ImageDraw.Draw(picture)
    if title:
        pen.text((_MARGIN_PX, _MARGIN_PX), title, fill=_TEXT, font=_font(_FONT_PX + 4))

    for r, (lines, font) in enumerate(_wrapped(label, cell_px) for label in row_labels):
        middle = layout.top + r * pitch + cell_px / 2
        fill = MARK if r in marked else _TEXT
        for number, line in enumerate(lines):
            y = middle + (number - (len(lines) - 1) / 2) * _line_height(font)
            pen.text((layout.left - 8, y), line, fill=fill, font=font, anchor="rm")
        for c, image in enumerate(images[r]):
            corner = (layout.left + c * pitch, layout.top + r * pitch)
            picture.paste(_in_cell(image, cell_px), corner)
    for c, (lines, font) in enumerate(_fitted([label], _heading_px(cell_px)) for label in column_labels):
        fill = MARK if c in _as_range(mark_column) else _TEXT
        position = (layout.left + c * pitch + cell_px / 2, layout.top - 10)
        pen.text(position, lines[0], fill=fill, font=font, anchor="ms")  # one baseline for all

    if marked:
        _frame(pen, layout, rows=(marked[0], marked[-1]), columns=(0, len(column_labels) - 1))
    if framed := _as_range(mark_column):
        _frame(pen, layout, rows=(0, len(row_labels) - 1), columns=(framed[0], framed[-1]))
    return picture


def grid_layout(
    row_labels: Sequence[str], column_labels: Sequence[str], *, title: str = "", cell_px: int = 64
) -> GridLayout:
    """Where the cells of an `image_grid` with these labels lie."""
    columns = [_fitted([label], _heading_px(cell_px)) for label in column_labels]
    rows = [_wrapped(label, cell_px) for label in row_labels]
    title_height = _line_height(_font(_FONT_PX + 4)) + 6 if title else 0
    return GridLayout(
        left=_MARGIN_PX + max(_width(line, font) for lines, font in rows for line in lines) + 8,
        top=_MARGIN_PX + title_height + max(_line_height(font) for _, font in columns) + 6,
        pitch=cell_px + _GAP_PX,
        cell=cell_px,
    )


def beside(pictures: Sequence[Image.Image], *, title: str = "") -> Image.Image:
    """Pictures from left to right in one, under a title."""
    font = _font(_FONT_PX + 8)
    top = _line_height(font) + _MARGIN_PX + 4 if title else 0
    width = max(sum(picture.width for picture in pictures), 2 * _MARGIN_PX + _width(title, font))
    whole = Image.new("RGB", (width, top + max(picture.height for picture in pictures)), _PAPER)
    if title:
        ImageDraw.Draw(whole).text((_MARGIN_PX, _MARGIN_PX), title, fill=_TEXT, font=font)
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, top))
        left += picture.width
    return whole


def _heading_px(cell_px: int) -> int:
    """Room for the label of a column: headings do not touch."""
    return cell_px + _GAP_PX - 2


def _as_range(mark: int | range | None) -> range:
    if mark is None:
        return range(0)
    return mark if isinstance(mark, range) else range(mark, mark + 1)


def _frame(
    pen: ImageDraw.ImageDraw, layout: GridLayout, *, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    """A frame just outside the cells, so that it covers none of them."""
    left, top = layout.left + columns[0] * layout.pitch, layout.top + rows[0] * layout.pitch
    right = layout.left + columns[1] * layout.pitch + layout.cell - 1
    bottom = layout.top + rows[1] * layout.pitch + layout.cell - 1
    box = (left - _FRAME_PX, top - _FRAME_PX, right + _FRAME_PX, bottom + _FRAME_PX)
    pen.rectangle(box, outline=MARK, width=_FRAME_PX)


def _in_cell(image: Image.Image, cell_px: int) -> Image.Image:
    """The whole image, centred in a white square cell."""
    if image.size == (cell_px, cell_px):
        return image
    scale = cell_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    cell = Image.new("RGB", (cell_px, cell_px), _PAPER)
    cell.paste(
        image.convert("RGB").resize(size, method), ((cell_px - size[0]) // 2, (cell_px - size[1]) // 2)
    )
    return cell


def _font(size_px: float) -> Font:
    return ImageFont.load_default(size_px)


def _width(text: str, font: Font) -> int:
    return round(font.getlength(text))


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ågjy")
    return round(bottom - top) + 2


def _fitted(lines: list[str], width_px: int) -> tuple[list[str], Font]:
    """The largest font in which the lines are that narrow; what is too long for the smallest is cut."""
    for size in range(_FONT_PX, _SMALLEST_FONT_PX - 1, -1):
        font = _font(size)
        if all(_width(line, font) <= width_px for line in lines):
            return lines, font
    return [_cut(line, width_px, font) for line in lines], font


def _cut(line: str, width_px: int, font: Font) -> str:
    if _width(line, font) <= width_px:
        return line
    while line and _width(f"{line}...", font) > width_px:
        line = line[:-1]
    return f"{line}..."


def _wrapped(text: str, height_px: int) -> tuple[list[str], Font]:
    """Text in lines of a label's greatest width, as many as fit the height; the rest is cut."""
    font = _font(_FONT_PX)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or _width(longer, font) <= _LABEL_MAX_PX:
            lines[-1] = longer
        else:
            lines.append(word)
    most = max(1, height_px // _line_height(font))
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
    return [_cut(line, _LABEL_MAX_PX, font) for line in lines], font
