from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mu.datasets.index import DataError, ForgetRetain
from tests.datasets.drawing import data_set, draw, write_table


def index(root: Path, **keys: Any) -> ForgetRetain:
    return data_set("generic", root, **{"missing_images": "error", **keys}).rows(None)


ROWS: list[dict[str, object]] = [
    {"prompt": "a wasp", "categories": "insects"},
    {"prompt": "a rose", "categories": "flowers"},
    {"prompt": "a bee on a daisy", "categories": "insects,flowers"},
    {"prompt": "a tulip", "categories": "flowers"},
]


def make(root: Path, first: int = 1) -> Path:
    """insects: rows 0 and 2; flowers: rows 1, 2 and 3, whose images 2 and 3 are of rows 2 and 3."""
    write_table(root / "prompts/b.csv", ROWS)
    for category, count in (("insects", 2), ("flowers", 3)):
        for number in range(first, first + count):
            draw(root / f"images/{category}/{number}.jpg", number)
    return root


@pytest.mark.parametrize("first", [0, 1])
def test_images_are_numbered_within_their_category(tmp_path: Path, first: int) -> None:
    rows = index(make(tmp_path, first), template_name="insects", substitute="a lawn")
    assert [(row.relative, row.prompt) for row in rows.forget] == [
        (f"images/insects/{first}.jpg", "a wasp"),
        (f"images/insects/{first + 1}.jpg", "a bee on a daisy"),
    ]
    assert {row.substitute_prompt for row in rows.forget} == {"a lawn"}
    assert [(row.relative, row.prompt) for row in rows.retain] == [
        (f"images/flowers/{first}.jpg", "a rose"),
        (f"images/flowers/{first + 2}.jpg", "a tulip"),  # the row between is to be forgotten
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_promise_31_images_with_zeros_before_their_numbers_are_counted_from_their_own_first(
    tmp_path: Path, first: int
) -> None:
    write_table(
        tmp_path / "prompts/b.csv",
        [{"prompt": prompt, "categories": "insects"} for prompt in ("a wasp", "a bee", "an ant")],
    )
    for number in range(first, first + 3):
        draw(tmp_path / f"images/insects/{number:03d}.jpg", number)
    rows = index(tmp_path, template_name="insects", substitute="a lawn", retain_set="generated")
    assert [(row.image.name, row.prompt) for row in rows.forget] == [
        (f"{first:03d}.jpg", "a wasp"),
        (f"{first + 1:03d}.jpg", "a bee"),
        (f"{first + 2:03d}.jpg", "an ant"),
    ]
    assert rows.notes == ()


def test_the_first_table_is_read(tmp_path: Path) -> None:
    root = make(tmp_path)
    write_table(root / "prompts/a.csv", [{"prompt": "an ant", "categories": "insects"}])
    rows = index(root, template_name="insects", substitute="a lawn", retain_set="generated")
    assert [row.prompt for row in rows.forget] == ["an ant"]
    expected = f"tables beside {root / 'prompts/a.csv'}: 1 passed over, the first is {root / 'prompts/b.csv'}"
    assert rows.notes[-1] == expected


def test_photos_can_be_retained_instead(tmp_path: Path) -> None:
    root = make(tmp_path)
    draw(root / "images/Seed_Images/inner/1.jpg")
    rows = index(root, template_name="insects", substitute="a lawn", retain_set="seed_images")
    assert [(row.relative, row.prompt) for row in rows.retain] == [
        ("images/Seed_Images/inner/1.jpg", "a lawn")
    ]


def test_when_all_categories_are_forgotten_nothing_is_left_to_retain(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="retain_set: others gives no image to retain"):
        index(make(tmp_path), template_name=("insects", "flowers"), substitute="a lawn")


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no prompts/\*\.csv"):
        index(tmp_path, template_name="insects", substitute="a lawn")


def test_a_hidden_table_is_passed_over_and_a_link_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "data")
    (root / "prompts/._b.csv").write_bytes(b"\0\5\26\7")  # as macOS leaves them beside the files
    assert index(root, template_name="insects", substitute="a lawn").forget
    (root / "prompts/b.csv").rename(tmp_path / "b.csv")
    (root / "prompts/b.csv").symlink_to(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"b\.csv: a link that leaves the folder"):
        index(root, template_name="insects", substitute="a lawn")
