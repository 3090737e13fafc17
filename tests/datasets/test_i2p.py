from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mu.datasets.categories import SUBSTITUTES
from mu.datasets.index import DataError, ForgetRetain
from tests.datasets.drawing import PROMPTS, data_set, draw, draw_i2p, write_table


def index(root: Path, **keys: Any) -> ForgetRetain:
    return data_set("i2p", root, **{"template": "i2p", "missing_images": "error", **keys}).rows(None)


@pytest.mark.parametrize(("first", "variant"), [(0, "sd"), (4000, "evaluation")])
def test_rows_with_the_label_are_forgotten_with_the_prompts_of_the_table(
    tmp_path: Path, first: int, variant: str
) -> None:
    rows = index(draw_i2p(tmp_path, first=first, variant=variant), template_name="self-harm")
    assert [row.relative for row in rows.forget] == [
        f"images/self-harm/{first}.jpg",
        f"images/self-harm/{first + 2}.jpg",
    ]
    assert [row.prompt for row in rows.forget] == ["a knife, on a table", "a dark room"]
    assert {row.substitute_prompt for row in rows.forget} == {"a photo of a healthy person"}
    assert [row.relative for row in rows.retain] == [f"images/Seed_Images/{n}.jpg" for n in range(3)]
    assert {row.prompt for row in rows.retain} == {"a photo of a healthy person"}


def test_a_row_belongs_to_each_of_its_labels(tmp_path: Path) -> None:
    root = draw_i2p(tmp_path)
    assert [row.relative for row in index(root, template_name="violence").forget] == [
        "images/hate/1.jpg",  # its image lies under its other label
        "images/violence/3.jpg",
    ]
    draw(root / "images/violence/1.png", 9)
    assert index(root, template_name="violence").forget[0].relative == "images/violence/1.png"


def test_several_categories_are_forgotten_as_their_union(tmp_path: Path) -> None:
    rows = index(draw_i2p(tmp_path), template_name=("shocking", "hate"), retain_set="others")
    assert [(row.relative, row.substitute_prompt) for row in rows.forget] == [
        ("images/hate/1.jpg", SUBSTITUTES["hate"]),
        ("images/self-harm/2.jpg", SUBSTITUTES["shocking"]),
        ("images/shocking/4.jpg", SUBSTITUTES["shocking"]),
    ]
    assert [row.prompt for row in rows.retain] == ["a knife, on a table", "a burning car"]


def test_rows_without_the_label_can_be_retained_but_never_a_prompt_to_forget(tmp_path: Path) -> None:
    root = draw_i2p(tmp_path)
    table = root / "prompts/i2p.csv"
    table.write_text(table.read_text() + "A burning  car,hate,7,7.5\n")
    draw(root / "images/hate/5.jpg")
    rows = index(root, template_name="violence", retain_set="others")
    assert {row.prompt for row in rows.retain} == {"a knife, on a table", "a dark room", "a strange meal"}


def test_nothing_is_retained_where_that_is_to_be_sampled(tmp_path: Path) -> None:
    assert index(draw_i2p(tmp_path, seeds=0), template_name="hate", retain_set="generated").retain == ()


def test_the_prompts_of_retained_images_are_given_written_or_the_substitute(tmp_path: Path) -> None:
    root = draw_i2p(tmp_path)
    given = index(root, template_name="hate", retain_prompts=["a photo"])
    assert {row.prompt for row in given.retain} == {"a photo"}
    (root / "images/Seed_Images/9.txt").write_text("photo 9\n")
    (unread,) = index(root, template_name="hate", substitute="people").notes  # no image has a text
    (root / "images/Seed_Images/9.txt").unlink()
    for number in range(3):
        (root / f"images/Seed_Images/{number}.txt").write_text(f"photo {number}\n")
    written = index(root, template_name="hate", substitute="people")
    assert [row.prompt for row in written.retain] == ["photo 0", "photo 1", "photo 2"]
    assert written.notes == ()
    (root / "images/Seed_Images/9.txt").write_text("photo 9\n")
    (note,) = index(root, template_name="hate", substitute="people").notes
    assert (
        unread
        == note
        == (
            f"text files of {root / 'images/Seed_Images'} without an image beside them: 1 passed over, the first is "
            f"{root / 'images/Seed_Images/9.txt'}"
        )
    )
    assert written.forget[0].substitute_prompt == "people"


def test_every_category_of_i2p_has_a_substitute() -> None:
    assert set(SUBSTITUTES) == {
        "hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity",
    }  # fmt: skip
    assert SUBSTITUTES["sexual"] == "a photo of a person wearing clothes"


def test_a_folder_may_write_its_category_in_another_way(tmp_path: Path) -> None:
    write_table(tmp_path / "prompts/i2p.csv", [{"prompt": "a theft", "categories": "illegal activity"}])
    draw(tmp_path / "images/illegal_activity/0.jpg")
    rows = index(tmp_path, template_name="illegal activity", retain_set="generated")
    assert rows.forget[0].relative == "images/illegal_activity/0.jpg"


def test_a_row_without_an_image_is_an_error_or_passed_over(tmp_path: Path) -> None:
    root = draw_i2p(tmp_path)
    (root / "images/self-harm/0.jpg").unlink()
    with pytest.raises(DataError, match=r"1 files .*\n.*images/self-harm/0\.jpg: missing"):
        index(root, template_name="self-harm")
    rows = index(root, template_name="self-harm", missing_images="skip")
    assert [row.prompt for row in rows.forget] == ["a dark room"]
    assert rows.notes == (
        f"rows of {root / 'prompts/i2p.csv'} without an image (missing_images: skip): 1 passed over, the first is "
        f"{root / 'images/self-harm/0.jpg'}",
    )
    # Files of earlier versions have use_sample, which decides nothing here.
    for use_sample in (True, False):
        assert index(root, template_name="self-harm", missing_images=None, use_sample=use_sample) == rows
        with pytest.raises(DataError, match=r"images/self-harm/0\.jpg: missing\n.*missing_images: skip"):
            index(root, template_name="self-harm", use_sample=use_sample)
    (root / "images/self-harm/2.jpg").unlink()
    with pytest.raises(DataError, match=r"the first is looked for at .*images/self-harm/0\.jpg"):
        index(root, template_name="self-harm", missing_images="skip")


def test_all_images_that_cannot_be_used_are_listed_together(tmp_path: Path) -> None:
    root = draw_i2p(tmp_path, seeds=4)
    images = root / "images"
    (images / "self-harm/0.jpg").unlink()
    draw(images / "self-harm/2.jpg", size=(200, 7))
    (images / "Seed_Images/0.jpg").write_text("<html>quota exceeded</html>")
    (images / "Seed_Images/1.jpg").write_bytes(b"")
    Image.new("1", (10_000, 9_000)).save(images / "Seed_Images/2.png")
    (tmp_path.parent / f"{tmp_path.name}.jpg").write_bytes((images / "Seed_Images/3.jpg").read_bytes())
    (images / "Seed_Images/5.jpg").symlink_to(tmp_path.parent / f"{tmp_path.name}.jpg")
    with pytest.raises(DataError, match="6 files") as raised:
        index(root, template_name="self-harm")
    for part in (
        "0.jpg: missing",
        "200 x 7 px is too small",
        "unreadable",
        "an empty file",
        "is too large",
        "leaves",
    ):
        assert part in str(raised.value)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    root = draw_i2p(tmp_path / "data")
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"data/images: a link that leaves the folder"):
        index(root, template_name="hate")


def test_a_table_that_is_a_link_is_refused(tmp_path: Path) -> None:
    root = draw_i2p(tmp_path / "data")
    (root / "prompts/i2p.csv").rename(tmp_path / "i2p.csv")
    (root / "prompts/i2p.csv").symlink_to(tmp_path / "i2p.csv")
    with pytest.raises(DataError, match=r"i2p\.csv is a link"):
        index(root, template_name="hate")


def test_an_unknown_category_lists_what_is_there_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"it has: hate, self-harm, shocking, violence\. Did you mean 'self-harm'"
    ):
        index(draw_i2p(tmp_path), template_name="selfharm")


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*`download_data sample i2p`"):
        index(tmp_path / "nowhere", template_name="hate")
    with pytest.raises(DataError, match=r"there is no prompts/i2p\.csv in .*`download_data sample i2p`"):
        index(tmp_path, template_name="hate")
    root = draw_i2p(tmp_path, seeds=0)
    with pytest.raises(DataError, match=r"retain_set: there is no folder .*Seed_Images.*generated"):
        index(root, template_name="hate")


def test_a_category_of_ones_own_needs_a_substitute(tmp_path: Path) -> None:
    write_table(tmp_path / "prompts/i2p.csv", [{"prompt": "a wasp", "categories": "insects"}])
    draw(tmp_path / "images/insects/0.jpg")
    with pytest.raises(DataError, match="substitute: 'insects' is none of I2P's categories"):
        index(tmp_path, template_name="insects", retain_set="generated")
    named = index(tmp_path, template_name="insects", retain_set="generated", substitute="a lawn")
    assert named.forget[0].substitute_prompt == "a lawn"


@pytest.mark.parametrize("substitute", ["self harm", "a {object}", " ", "A  Knife, on a table", "a\nroom"])
def test_a_substitute_that_cannot_be_is_refused(tmp_path: Path, substitute: str) -> None:
    with pytest.raises(DataError, match="substitute: "):
        index(draw_i2p(tmp_path), template_name="self-harm", substitute=substitute)


def test_a_retained_prompt_that_is_to_be_forgotten_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a prompt to forget and, of .*Seed_Images/0\.jpg, one to retain"):
        index(draw_i2p(tmp_path), template_name="self-harm", retain_prompts=[PROMPTS[0][0]])
