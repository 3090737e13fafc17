"""Folders of images, however they are laid out, as the same images asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mu.datasets.index import DataError
from mu.evaluation.asked_images import any_images, folder_images, has_concepts, paired

NAMES = {"styles": ("Noto", "Fluent_Flat"), "objects": ("Cats", "Fluent_Dogs")}
ASKED = [("Noto", "Cats", 2), ("Noto", "Cats", 10), ("Fluent_Flat", "Fluent_Dogs", 2)]


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(path)


def nested(root: Path) -> None:
    for style, object, seed in ASKED:
        save(root / style / object / f"{seed}.png")
    (root / "manifest.json").write_text("{}")


def flat(root: Path) -> None:
    for style, object, seed in ASKED:
        save(root / f"{style}_{object}_seed{seed}.jpg")


def by_style(root: Path) -> None:
    """As UnlearnCanvas' own tools name what they generate."""
    for style, object, seed in ASKED:
        save(root / style / f"{style}_{object}_seed_{seed}.jpg")


def sampled(root: Path) -> None:
    """As the command sample leaves it; the rows in another order than the names."""
    rows = ["case_number,prompt,evaluation_seed,evaluation_guidance,file"]
    for number, (style, object, seed) in enumerate(reversed(ASKED)):
        save(root / "images" / f"{number:04d}_{seed}.png")
        prompt = f"A {object.replace('_', ' ')} image in {style.replace('_', ' ')} style."
        rows.append(f"{number:04d},{prompt},{seed},7.5,images/{number:04d}_{seed}.png")
    save(root / "grid.png")  # a picture of them all, and none of the images
    (root / "images.csv").write_text("\n".join(rows))


def test_promise_31_images_named_as_unlearn_canvas_names_them_are_read(tmp_path: Path) -> None:
    by_style(tmp_path)
    save(tmp_path / "Fluent_Flat" / "Fluent_Flat_Cats_seed188.png")
    found = folder_images("images_dir", tmp_path, **NAMES)
    assert [image.key for image in found] == [*ASKED[:2], ("Fluent_Flat", "Cats", 188), ASKED[2]]
    assert found[0].path.name == "Noto_Cats_seed_2.jpg"
    save(tmp_path / "Noto" / "Fluent_Flat_Cats_seed_1.jpg")  # the folder tells the style
    with pytest.raises(
        DataError,
        match=r"Fluent_Flat_Cats_seed_1.jpg: is not called <Style>_<Object>_seed<seed>, with Noto and",
    ):
        folder_images("images_dir", tmp_path, **NAMES)


@pytest.mark.parametrize("layout", [nested, flat, by_style])
def test_promise_30_files_that_are_not_measured_are_counted(layout, tmp_path: Path) -> None:
    layout(tmp_path)
    for read in (folder_images, any_images):
        notes: list[str] = []
        read("images_dir", tmp_path, **(NAMES if read is folder_images else {}), notes=notes)
        assert notes == []
    (tmp_path / "a.heic").write_bytes(b"x")
    if layout is not flat:
        (tmp_path / "Noto/b.heic").write_bytes(b"x")
    for read in (folder_images, any_images):
        read("images_dir", tmp_path, **(NAMES if read is folder_images else {}), notes=notes)
    assert len(notes) == 2
    for note in notes:
        assert note.startswith(f"files of {tmp_path} ")
        assert f": {1 if layout is flat else 2} passed over, " in note
        assert note.endswith("a.heic" if layout is flat or "Noto" not in note else "b.heic")


def test_promise_30_images_that_the_table_does_not_list_are_counted(tmp_path: Path) -> None:
    """Of a folder of the command sample; its grids are none of them."""
    sampled(tmp_path)
    save(tmp_path / "grid_2.png")
    for read in (folder_images, any_images):
        names = NAMES if read is folder_images else {}
        notes: list[str] = []
        assert len(read("images_dir", tmp_path, **names, notes=notes)) == 3
        assert notes == []
    save(tmp_path / "images/0009_1.png")
    save(tmp_path / "more/grid.png")
    for read in (folder_images, any_images):
        names = NAMES if read is folder_images else {}
        assert len(read("images_dir", tmp_path, **names, notes=notes)) == 3
    assert set(notes) == {
        f"images of {tmp_path} that its images.csv does not list: 2 passed over, the first is "
        f"{tmp_path / 'images/0009_1.png'}"
    }
    assert len(notes) == 2


@pytest.mark.parametrize("layout", [nested, flat, by_style, sampled])
def test_each_layout_gives_the_same_images_in_the_same_order(layout, tmp_path: Path) -> None:
    folder, other = tmp_path / "given", tmp_path / "other"
    folder.mkdir()
    layout(folder)
    found = folder_images("images_dir", folder, **NAMES)
    assert [image.key for image in found] == ASKED
    assert found[2].prompt == "A Fluent Dogs image in Fluent Flat style."
    assert all(image.path.is_file() for image in found)
    assert has_concepts(folder, **NAMES)
    nested(other)
    assert paired(found, folder_images("images_dir", other, **NAMES))
    chosen = folder_images("images_dir", folder, **NAMES, chosen_styles=("Noto",))
    assert [image.key for image in chosen] == ASKED[:2]


def test_any_folder_does_where_no_concepts_are_asked_for(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.jpg", "a/10.png", "a/9.png"):
        save(tmp_path / name)
    found = any_images("images_dir", tmp_path)
    assert [image.path.relative_to(tmp_path).as_posix() for image in found] == [
        "a/9.png",
        "a/10.png",
        "a/c.jpg",
        "b.png",
    ]
    assert not has_concepts(tmp_path, **NAMES)
    sampled(tmp_path / "run")
    assert any_images("images_dir", tmp_path / "run")[0].prompt == "A Fluent Dogs image in Fluent Flat style."


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: save(root / "Notto" / "Cats" / "1.png"),
            "no style that the classifier knows. Did you mean 'Noto'",
        ),
        (
            lambda root: save(root / "Noto" / "Cats" / "first.png"),
            "first.png: the name must be the seed, a number",
        ),
        (lambda root: save(root / "Noto" / "Cats" / "2.jpg"), "2.jpg and .*2.png are both Noto, Cats, 2"),
        (lambda root: (root / "Noto" / "Cats" / "3.png").write_bytes(b"no"), "3.png: unreadable"),
        (
            lambda root: save(root / "Noto_Dogs_seed1.png"),
            "Noto_Dogs_seed1.png: is not called <Style>_<Object>_seed",
        ),
        (
            lambda root: (root / "images.csv").write_text("a,b\n1,2\n"),
            "has no column 'prompt'; its columns are: a, b",
        ),
        (
            lambda root: (root / "images.csv").write_text("prompt,evaluation_seed,file\na cat,1,x.png\n"),
            "the prompt 'a cat' names no style and object",
        ),
        (
            lambda root: (root / "images.csv").write_text("prompt,evaluation_seed,file\na cat,1,../x.png\n"),
            "lies outside",
        ),
        (
            lambda root: (root / "images.csv").write_text("prompt,evaluation_seed,file\na cat,1,\n"),
            "line 2: it names no file",
        ),
    ],
)
def test_what_does_not_fit_is_told(spoil, message: str, tmp_path: Path) -> None:
    nested(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        folder_images("images_dir", tmp_path, **NAMES)


def test_an_empty_folder_and_a_style_that_is_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images_dir: there is no folder"):
        folder_images("images_dir", tmp_path / "none", **NAMES)
    with pytest.raises(DataError, match=r"holds no images \(.*<Style>/<Object>/<seed>.png"):
        folder_images("images_dir", tmp_path, **NAMES)
    save(tmp_path / "Noto" / "Cats" / "1.png")
    with pytest.raises(DataError, match=r"styles: .* has no image of Fluent_Flat"):
        folder_images("images_dir", tmp_path, **NAMES, chosen_styles=("Noto", "Fluent_Flat"))
