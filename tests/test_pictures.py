"""Cells, frames and labels lie where they should."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from PIL import Image

from mu.pictures import MARK, GridLayout, beside, grid_layout, image_grid

WHITE = (255, 255, 255)


def colour(row: int, column: int) -> tuple[int, int, int]:
    return (40 + 60 * row, 30 + 50 * column, 20)


def plain(rows: int, columns: int, size: int = 16) -> list[list[Image.Image]]:
    return [
        [Image.new("RGB", (size, size), colour(row, column)) for column in range(columns)]
        for row in range(rows)
    ]


def drawn(
    images: list[list[Image.Image]], rows: list[str], columns: list[str], *, cell_px: int = 64, **marks: Any
) -> tuple[Image.Image, GridLayout]:
    """A grid, and where its cells lie."""
    picture = image_grid(images, rows, columns, cell_px=cell_px, **marks)
    return picture, grid_layout(rows, columns, cell_px=cell_px)


def marked(picture: Image.Image) -> numpy.ndarray:
    """Where a pixel has the colour of the mark, (H, W)."""
    return (numpy.asarray(picture) == MARK).all(axis=-1)


def test_each_image_lies_whole_in_its_cell() -> None:
    picture, layout = drawn(plain(3, 2), ["a", "b", "c"], ["x", "y"], mark_row=1, mark_column=1, cell_px=16)
    pixels = numpy.asarray(picture)
    for row in range(3):
        for column in range(2):
            top, left = layout.top + row * layout.pitch, layout.left + column * layout.pitch
            assert (pixels[top : top + 16, left : left + 16] == colour(row, column)).all()


def test_the_marked_row_is_framed_and_no_other() -> None:
    picture, layout = drawn(plain(3, 4), ["a", "b", "c"], ["1", "2", "3", "4"], mark_row=1, cell_px=16)
    right = layout.left + 4 * layout.pitch
    lines = marked(picture)[:, layout.left : right - 6].all(axis=1).nonzero()[0]  # across all columns
    top = layout.top + layout.pitch
    assert lines.tolist() == [top - 3, top - 2, top - 1, top + 16, top + 17, top + 18]
    labels = marked(picture)[:, : layout.left - 5].any(axis=1).nonzero()[0]
    assert labels.size > 0
    assert top <= labels.min()
    assert labels.max() < top + 16


def test_one_frame_goes_round_a_range_of_rows() -> None:
    picture, layout = drawn(
        plain(4, 3), ["a", "b", "c", "d"], ["1", "2", "3"], mark_row=range(1, 3), cell_px=16
    )
    right = layout.left + 3 * layout.pitch
    lines = marked(picture)[:, layout.left : right - 6].all(axis=1).nonzero()[0]  # across all columns
    top, bottom = layout.top + layout.pitch, layout.top + 2 * layout.pitch + 16
    assert lines.tolist() == [top - 3, top - 2, top - 1, bottom, bottom + 1, bottom + 2]
    for row in range(4):
        first = layout.top + row * layout.pitch
        assert marked(picture)[first : first + 16, : layout.left - 5].any() == (row in (1, 2))


def test_a_range_of_no_row_marks_nothing() -> None:
    assert not marked(image_grid(plain(2, 2), ["a", "b"], ["x", "y"], mark_row=range(0))).any()


def test_the_marked_column_is_framed_and_no_other() -> None:
    picture, layout = drawn(plain(3, 4), ["a", "b", "c"], ["1", "2", "3", "4"], mark_column=2, cell_px=16)
    bottom = layout.top + 3 * layout.pitch
    lines = marked(picture)[layout.top : bottom - 6].all(axis=0).nonzero()[0]
    left = layout.left + 2 * layout.pitch
    assert lines.tolist() == [left - 3, left - 2, left - 1, left + 16, left + 17, left + 18]
    labels = marked(picture)[: layout.top - 5].any(axis=0).nonzero()[0]
    assert labels.size > 0
    assert left <= labels.min()
    assert labels.max() < left + 16


def test_without_a_mark_nothing_has_its_colour() -> None:
    assert not marked(image_grid(plain(2, 2), ["a", "b"], ["x", "y"], title="t")).any()


def test_images_of_other_sizes_are_fitted_whole() -> None:
    wide = Image.new("RGB", (200, 100), (10, 20, 200))
    picture, layout = drawn([[wide]], ["a"], ["x"], cell_px=40)
    cell = numpy.asarray(picture)[layout.top : layout.top + 40, layout.left : layout.left + 40]
    assert (cell[10:30] == (10, 20, 200)).all()
    assert (cell[:10] == WHITE).all()
    assert (cell[30:] == WHITE).all()


@pytest.mark.parametrize("label", ["a word " * 60, "W" * 300])
def test_a_long_label_is_kept_out_of_the_images(label: str) -> None:
    picture, layout = drawn([[Image.new("RGB", (64, 64), "white")]] * 2, [label, "b"], ["x"])
    assert layout.left < 250
    ink = (numpy.asarray(picture) < 128).any(axis=-1)  # (H, W)
    assert ink[layout.top : layout.top + 64, : layout.left].any()
    assert not ink[layout.top :, layout.left :].any()  # nothing over the images
    assert not ink[layout.top + 64 : layout.top + layout.pitch, :].any()  # nor into the next row


def test_labels_that_do_not_fit_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match="2 row labels and 3 column labels"):
        image_grid(plain(2, 2), ["a", "b"], ["x", "y", "z"])
    with pytest.raises(ValueError, match="0 rows"):
        image_grid([], [], [])


def test_pictures_beside_each_other_keep_their_pixels() -> None:
    first, second = Image.new("RGB", (100, 30), (1, 2, 3)), Image.new("RGB", (200, 20), (4, 5, 6))
    whole = numpy.asarray(beside([first, second]))
    assert whole.shape == (30, 300, 3)
    assert (whole[:30, :100] == (1, 2, 3)).all()
    assert (whole[:20, 100:] == (4, 5, 6)).all()
    titled = numpy.asarray(beside([first, second], title="Noto"))
    top = titled.shape[0] - 30
    assert (titled[top:, :100] == (1, 2, 3)).all()
    assert (titled[:top] < 128).any()
