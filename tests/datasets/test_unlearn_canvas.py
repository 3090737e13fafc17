from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mu.datasets.index import DataError, ForgetRetain
from tests.datasets.drawing import data_set

STYLES = ["Byzantine", "Van_Gogh", "Seed_Images"]
OBJECTS = ["Cats", "Dogs"]
Draw = Callable[..., Path]


def index(root: Path, **keys: Any) -> ForgetRetain:
    return data_set("unlearncanvas", root, **{"use_sample": False, **keys}).rows(None)


def test_a_style_is_forgotten_in_all_its_classes_and_all_else_retained(draw_canvas: Draw) -> None:
    rows = index(draw_canvas(STYLES, OBJECTS, 2), template="style", template_name="Van_Gogh")
    assert [row.relative for row in rows.forget] == [
        "Van_Gogh/Cats/1.jpg",
        "Van_Gogh/Cats/2.jpg",
        "Van_Gogh/Dogs/1.jpg",
        "Van_Gogh/Dogs/2.jpg",
    ]
    assert rows.forget[0].prompt == "A Cats image in Van Gogh style."
    assert rows.forget[0].substitute_prompt == "A Cats image in Photo style."
    assert rows.forget[2].substitute_prompt == "A Dogs image in Photo style."
    assert Counter(row.style for row in rows.retain) == {"Byzantine": 4, "Seed_Images": 4}
    assert {row.prompt for row in rows.retain if row.style == "Seed_Images"} == {
        "A Cats image in Photo style.",
        "A Dogs image in Photo style.",
    }
    assert all(row.concept == row.style for row in (*rows.forget, *rows.retain))
    assert all(row.substitute_prompt is None for row in rows.retain)


def test_an_object_is_forgotten_in_all_styles_and_the_next_takes_its_place(draw_canvas: Draw) -> None:
    rows = index(draw_canvas(STYLES, OBJECTS, 2), template="object", template_name="Dogs")
    assert Counter((row.style, row.object) for row in rows.forget) == {(style, "Dogs"): 2 for style in STYLES}
    assert Counter(row.object for row in rows.retain) == {"Cats": 6}
    assert {row.style: row.substitute_prompt for row in rows.forget} == {
        "Byzantine": "A Cats image in Byzantine style.",
        "Van_Gogh": "A Cats image in Van Gogh style.",
        "Seed_Images": "A Cats image in Photo style.",
    }


def test_photos_are_replaced_by_the_next_style(draw_canvas: Draw) -> None:
    rows = index(draw_canvas(STYLES, OBJECTS, 1), template="style", template_name="Seed_Images")
    assert rows.forget[0].substitute_prompt == "A Cats image in Van Gogh style."


def test_a_substitute_can_be_named_or_written(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 1)
    named = index(root, template="style", template_name="Van_Gogh", substitute="Byzantine")
    assert named.forget[1].substitute_prompt == "A Dogs image in Byzantine style."
    written = index(
        root, template="object", template_name="Cats", substitute="an empty room in {style} style"
    )
    assert [row.substitute_prompt for row in written.forget] == [
        f"an empty room in {words} style" for words in ("Byzantine", "Photo", "Van Gogh")
    ]


def test_images_are_taken_in_the_order_of_their_numbers(draw_canvas: Draw) -> None:
    root = draw_canvas(["Van_Gogh", "Seed_Images"], ["Cats"], 12)
    rows = index(root, template="style", template_name="Van_Gogh")
    assert [row.image.name for row in rows.forget] == [f"{n}.jpg" for n in range(1, 13)]
    sample = index(root, template="style", template_name="Van_Gogh", use_sample=True)
    assert [row.image.name for row in sample.forget] == ["1.jpg", "2.jpg", "3.jpg"]
    assert [row.image.name for row in sample.retain] == ["1.jpg", "2.jpg", "3.jpg"]


def test_files_that_are_no_images_are_left_out(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 1)
    (root / "README.md").write_text("hello")
    (root / "__MACOSX/Van_Gogh").mkdir(parents=True)
    (root / "Van_Gogh/Cats/.1.jpg.77.tmp").write_text("")
    (root / "Van_Gogh/Cats/._1.jpg").write_text("")
    (root / "Van_Gogh/Cats/Thumbs.db").write_text("")
    rows = index(root, template="style", template_name="Van_Gogh")
    assert len(rows.forget) == 2
    assert len(rows.retain) == 4


def test_keys_are_the_same_wherever_the_folder_lies(draw_canvas: Draw, tmp_path: Path) -> None:
    root = draw_canvas(STYLES, OBJECTS, 2)
    before = index(root, template="style", template_name="Van_Gogh")
    root.rename(tmp_path / "moved")
    after = index(tmp_path / "moved", template="style", template_name="Van_Gogh")
    assert [row.key for row in before.forget + before.retain] == [
        row.key for row in after.forget + after.retain
    ]
    assert len({row.key for row in before.forget + before.retain}) == 12


def test_an_unknown_name_lists_what_is_there_and_the_nearest(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 1)
    with pytest.raises(DataError, match=r"Byzantine, Seed_Images, Van_Gogh\. Did you mean 'Van_Gogh'\?"):
        index(root, template="style", template_name="van gough")
    with pytest.raises(DataError, match=r"no object '\.\./\.\./etc'"):
        index(root, template="object", template_name="../../etc")


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="download_data sample quick_canvas"):
        index(tmp_path / "nowhere", template="style", template_name="Van_Gogh")


def test_a_folder_of_another_layout_is_refused(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 1)
    with pytest.raises(DataError, match=r"<Style>/<Class>/<n>\.jpg"):
        index(root / "Van_Gogh", template="style", template_name="Cats")


def test_empty_files_are_listed_together(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 6)
    broken = sorted(root.glob("*/Cats/*.jpg"))
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="18 files") as raised:
        index(root, template="style", template_name="Van_Gogh")
    assert str(raised.value).count("an empty file") == 10
    assert "and 8 more" in str(raised.value)


def test_images_that_cannot_be_used_are_listed_together(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 2)
    (root / "Van_Gogh/Cats/1.jpg").write_text("<html>quota exceeded</html>")
    Image.new("RGB", (7, 30)).save(root / "Byzantine/Dogs/2.jpg")
    Image.new("1", (10_000, 9_000)).save(root / "Byzantine/Dogs/1.png")
    with open(root / "Seed_Images/Cats/3.jpg", "wb") as file:
        file.truncate(300 * 2**20)  # a hole, which takes no room on the disk
    with pytest.raises(DataError, match="4 files") as raised:
        index(root, template="style", template_name="Van_Gogh")
    for part in (
        "unreadable",
        "7 x 30 px is too small",
        "10000 x 9000 px is too large",
        "300 MiB is too large",
    ):
        assert part in str(raised.value)


def test_links_are_refused(draw_canvas: Draw, tmp_path: Path) -> None:
    root = draw_canvas(STYLES, OBJECTS, 1)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/1.jpg").write_bytes((root / "Van_Gogh/Cats/1.jpg").read_bytes())
    (root / "Byzantine/Cats/2.jpg").symlink_to(tmp_path / "secret/1.jpg")
    (root / "Byzantine/Birds").symlink_to(tmp_path / "secret")
    (root / "Byzantine/Fishes").symlink_to(root / "Van_Gogh/Cats")  # would retain what is to be forgotten
    with pytest.raises(DataError, match="3 files") as raised:
        index(root, template="style", template_name="Van_Gogh")
    assert str(raised.value).count("leaves the folder") == 2


def test_a_folder_reached_through_a_link_is_read(draw_canvas: Draw, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(draw_canvas(STYLES, OBJECTS, 1))
    assert len(index(tmp_path / "link", template="style", template_name="Van_Gogh").forget) == 2


def test_several_styles_are_forgotten_together_and_none_stands_in_for_another(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 1)
    rows = index(root, template="style", template_name=("Van_Gogh", "Byzantine"))
    assert [row.relative.split("/")[0] for row in rows.forget] == ["Byzantine"] * 2 + ["Van_Gogh"] * 2
    assert {row.substitute_prompt for row in rows.forget} == {
        "A Cats image in Photo style.",
        "A Dogs image in Photo style.",
    }
    assert {row.style for row in rows.retain} == {"Seed_Images"}
    with_photos = index(root, template="style", template_name=("Seed_Images", "Byzantine"))
    assert all(str(row.substitute_prompt).endswith("in Van Gogh style.") for row in with_photos.forget)
    with pytest.raises(DataError, match="'Byzantine' is one of the styles to forget"):
        index(root, template="style", template_name=("Van_Gogh", "Byzantine"), substitute="Byzantine")


def test_several_objects_are_replaced_by_the_next_that_is_kept(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, ["Bears", "Cats", "Dogs", "Trees"], 1)
    rows = index(root, template="object", template_name=["Cats", "Dogs", "Trees"])
    assert {(row.object, row.substitute_prompt) for row in rows.forget if row.style == "Byzantine"} == {
        ("Cats", "A Bears image in Byzantine style."),
        ("Dogs", "A Bears image in Byzantine style."),
        ("Trees", "A Bears image in Byzantine style."),
    }
    assert {row.object for row in rows.retain} == {"Bears"}
    with pytest.raises(DataError, match="'Bears', 'Cats', 'Dogs', 'Trees' are all objects here"):
        index(root, template="object", template_name=["Bears", "Cats", "Dogs", "Trees"])
    with pytest.raises(DataError, match="no object 'Catz'"):
        index(root, template="object", template_name=["Dogs", "Catz"])


def test_photos_alone_can_be_retained_and_never_those_of_the_target(draw_canvas: Draw) -> None:
    root = draw_canvas(STYLES, OBJECTS, 2)
    style = index(root, template="style", template_name="Van_Gogh", retain_set="seed_images")
    assert Counter((row.style, row.object) for row in style.retain) == {
        ("Seed_Images", "Cats"): 2,
        ("Seed_Images", "Dogs"): 2,
    }
    object = index(root, template="object", template_name="Cats", retain_set="seed_images")
    assert {(row.style, row.object) for row in object.retain} == {("Seed_Images", "Dogs")}
    whole = index(root, template="object", template_name="Cats")
    assert object.forget == whole.forget
    assert index(root, template="object", template_name="Cats", retain_set="generated").retain == ()


def test_photos_that_are_forgotten_or_absent_cannot_be_retained(draw_canvas: Draw) -> None:
    root = draw_canvas(["Byzantine", "Seed_Images"], OBJECTS, 1)
    with pytest.raises(DataError, match="retain_set: Seed_Images is to be forgotten"):
        index(root, template="style", template_name="Seed_Images", retain_set="seed_images")
    (root / "Seed_Images").rename(root / "Photos")
    with pytest.raises(DataError, match="retain_set: seed_images needs the photos"):
        index(root, template="style", template_name="Byzantine", retain_set="seed_images")


def test_two_folders_of_one_name_are_not_forgotten_and_retained(draw_canvas: Draw) -> None:
    root = draw_canvas(["Van_Gogh", "Van Gogh"], ["Cats"], 1)
    with pytest.raises(DataError, match="is a prompt to forget and"):
        index(root, template="style", template_name="Van_Gogh")
