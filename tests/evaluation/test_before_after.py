"""The before/after picture: the same prompts side by side, the forgotten row or column framed."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from PIL import Image

from mu.datasets.index import DataError
from mu.evaluation.before_after import before_after_grid
from mu.pictures import MARK

STYLES = ("Noto", "Fluent_Flat", "Blob")
OBJECTS = ("Cats", "Dogs")


def panel(shade: int) -> dict[tuple[str, str], Image.Image]:
    return {
        (style, object): Image.new("RGB", (64, 64), (shade, 40 + 60 * s, 40 + 60 * o))
        for s, style in enumerate(STYLES)
        for o, object in enumerate(OBJECTS)
    }


def draw(path: Path, template: str, template_name: str | tuple[str, ...]) -> numpy.ndarray:
    before_after_grid(
        {"before": panel(10), "after": panel(90)},
        styles=STYLES,
        objects=OBJECTS,
        template=template,
        template_name=template_name,
        title="forgotten",
        path=path,
    )
    with Image.open(path) as opened:
        assert opened.mode == "RGB"
        return numpy.asarray(opened)


def box(pixels: numpy.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """top, left, bottom, right (exclusive) of the pixels of a colour."""
    rows, columns = (pixels == colour).all(axis=-1).nonzero()
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def framed(pixels: numpy.ndarray, area: tuple[int, int, int, int]) -> bool:
    """Whether all of the line just outside an area has the colour of the mark."""
    top, left, bottom, right = area
    is_mark = (pixels == MARK).all(axis=-1)
    return bool(
        is_mark[top - 1, left:right].all()
        and is_mark[bottom, left:right].all()
        and is_mark[top:bottom, left - 1].all()
        and is_mark[top:bottom, right].all()
    )


def test_the_forgotten_style_is_framed_in_both_panels(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "pictures" / "grid.png", "style", "Fluent_Flat")
    corners = []
    for shade in (10, 90):
        cats, dogs = box(pixels, (shade, 100, 40)), box(pixels, (shade, 100, 100))  # rows: the second style
        assert (cats[2] - cats[0], cats[3] - cats[1]) == (64, 64)
        assert framed(pixels, (cats[0], cats[1], dogs[2], dogs[3]))
        assert not framed(pixels, cats)
        corners.append(cats[:2])
    (top_before, left_before), (top_after, left_after) = corners
    assert top_before == top_after  # side by side
    assert left_before < left_after


def test_several_forgotten_styles_stand_together_in_one_frame(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "grid.png", "style", ("Blob", "Noto"))
    for shade in (10, 90):
        noto, blob = box(pixels, (shade, 40, 40)), box(pixels, (shade, 160, 100))  # cats, dogs
        assert framed(pixels, (noto[0], noto[1], blob[2], blob[3]))
        assert box(pixels, (shade, 100, 40))[0] > blob[2]  # the kept style is below


def test_several_forgotten_objects_stand_together_in_one_frame(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "grid.png", "object", OBJECTS)
    first, last = box(pixels, (10, 40, 40)), box(pixels, (10, 160, 100))
    assert framed(pixels, (first[0], first[1], last[2], last[3]))


def test_the_forgotten_object_is_framed_in_both_panels(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "grid.png", "object", "Dogs")
    for shade in (10, 90):
        first, last = box(pixels, (shade, 40, 100)), box(pixels, (shade, 160, 100))
        assert framed(pixels, (first[0], first[1], last[2], last[3]))


def test_an_unknown_concept_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'Dog' is not one of: Cats, Dogs. Did you mean 'Dogs'"):
        draw(tmp_path / "grid.png", "object", "Dog")
    assert not list(tmp_path.iterdir())
