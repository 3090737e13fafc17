from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mu.datasets.index import DataError, ForgetRetain
from tests.datasets.drawing import data_set, draw, write_table


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two images to forget, one of them in a folder, and two to retain."""
    draw(tmp_path / "mine/2.jpg", 1)
    draw(tmp_path / "mine/sub/a b.PNG", 2)
    draw(tmp_path / "other/1.webp", 3)
    draw(tmp_path / "other/10.jpeg", 4)
    return tmp_path / "mine", tmp_path / "other"


def read(folders: tuple[Path, Path], **changes: Any) -> ForgetRetain:
    """Of a folder alone where the other is None: nothing is to be retained from one."""
    forget, retain = folders
    wanted = {
        "template_name": "dog",
        "substitute": "a cat",
        "forget_prompts": ["my dog"],
        "retain_prompts": ["a pet"],
        "retain_dataset_dir": str(retain),
        "retain_set": "generated" if retain is None else None,
    }
    return data_set("folder", forget, **wanted | changes).rows(None)


def test_one_prompt_serves_all_images_of_a_folder(folders: tuple[Path, Path]) -> None:
    rows = read(folders)
    assert [(row.relative, row.prompt, row.substitute_prompt) for row in rows.forget] == [
        ("forget/2.jpg", "my dog", "a cat"),
        ("forget/sub/a b.PNG", "my dog", "a cat"),
    ]
    assert [(row.relative, row.prompt, row.substitute_prompt) for row in rows.retain] == [
        ("retain/1.webp", "a pet", None),
        ("retain/10.jpeg", "a pet", None),
    ]


def test_texts_beside_the_images_are_their_prompts(folders: tuple[Path, Path]) -> None:
    (folders[0] / "2.txt").write_text("my dog\n in the snow \n")
    with pytest.raises(
        DataError, match=r"1 images .* have no prompt:\n.*a b\.PNG: no a b\.txt beside it"
    ) as raised:
        read(folders, forget_prompts=None)
    assert "forget_prompts" in str(raised.value)
    (folders[0] / "sub/a b.txt").write_text("my dog asleep")
    assert [row.prompt for row in read(folders, forget_prompts=None).forget] == [
        "my dog in the snow",
        "my dog asleep",
    ]
    (folders[0] / "2.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"2\.txt: empty"):
        read(folders, forget_prompts=None)


def test_promise_30_files_that_are_not_read_are_counted_and_the_first_is_named(
    folders: tuple[Path, Path],
) -> None:
    kinds = (".jfif", ".bmp", ".tif", ".gif", ".webp")
    for number, suffix in enumerate(kinds):
        Image.new("RGB", (20, 20)).save(
            folders[0] / f"x{number}{suffix}", "JPEG" if suffix == ".jfif" else None
        )
        (folders[0] / f"x{number}.txt").write_text("one of my dogs")
    for name in ("2.txt", "sub/a b.txt"):
        (folders[0] / name).write_text("my dog")
    (given,) = read(folders).notes  # with one prompt for all
    assert given.startswith(
        f"texts of the images of {folders[0]}, for forget_prompts is given: 7 passed over, "
    )
    (folders[1] / "metadata.csv").write_text("file_name,text\n1.webp,a cat\n")
    assert read(folders).notes == (
        given,
        f"texts of the images of {folders[1]}, for retain_prompts is given: 1 passed over, the first is "
        f"{folders[1] / 'metadata.csv'}",
    )
    (folders[1] / "metadata.csv").unlink()
    for name in ("sub/1.heic", "sub/2.svg", "z.psd"):
        (folders[0] / name).write_bytes(b"x")
    (folders[0] / "sub/1.txt").write_text("my dog, asleep")
    (folders[0] / "Thumbs.db").write_bytes(b"x")
    (folders[1] / "film.mp4").write_bytes(b"x")
    rows = read(folders, forget_prompts=None)
    assert len(rows.forget) == 2 + len(kinds)
    of_mine, of_other, texts = rows.notes
    assert of_mine == (
        f"files of {folders[0]} that are not where images are read, or no .jpg, .jpeg, .jfif, .png, .webp, .bmp, .tif, "
        f".tiff, .gif, .avif: 3 passed over, the first is {folders[0] / 'sub/1.heic'}"
    )
    assert of_other.startswith(f"files of {folders[1]} ")
    assert texts == (
        f"text files of {folders[0]} without an image beside them: 1 passed over, the first is "
        f"{folders[0] / 'sub/1.txt'}"
    )


def test_promise_30_a_folder_of_other_files_is_not_called_empty(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/1.heic").write_bytes(b"x")
    with pytest.raises(
        DataError,
        match=r"raw_dataset_dir: .* holds no images .*Files of .* 1 passed over, the first is .*1\.heic",
    ):
        read((tmp_path / "phone", folders[1]))


def test_texts_of_both_folders_that_are_not_utf_8_are_listed_together(folders: tuple[Path, Path]) -> None:
    for name, content in (("2.txt", "caf\u00e9"), ("sub/a b.txt", "one\nna\u00efve")):
        (folders[0] / name).write_bytes(content.encode("latin-1"))
    (folders[1] / "1.txt").write_bytes("\ufeffa pet".encode("utf-16"))
    (folders[1] / "10.txt").write_bytes("a p\u00e8t".encode("utf-8-sig"))
    with pytest.raises(DataError) as raised:
        read(folders, forget_prompts=None, retain_prompts=None)
    for part in (
        f"{folders[0] / '2.txt'}: is not UTF-8 (byte 0xe9 on line 1); save it as UTF-8\n",
        f"{folders[0] / 'sub/a b.txt'}: is not UTF-8 (byte 0xef on line 2); save it as UTF-8\n",
        f"{folders[1] / '1.txt'}: is not UTF-8 (byte 0xff on line 1); save it as UTF-8\n",
    ):
        assert part in str(raised.value)
    assert "10.txt" not in str(raised.value)
    (folders[1] / "1.txt").write_bytes("\ufeffa cat".encode())
    found = read(folders, retain_prompts=None).retain
    assert [row.prompt for row in found] == ["a cat", "a p\u00e8t"]  # without the byte-order mark


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_that_is_not_utf_8_is_told_and_a_byte_order_mark_is_read(
    folders: tuple[Path, Path], kind: str
) -> None:
    line = {"csv": "{0},{1}\n", "jsonl": '{{"file_name": "{0}", "text": "{1}"}}\n'}[kind]
    text = ("file_name,text\n" if kind == "csv" else "") + line.format("2.jpg", "caf\u00e9")
    text += line.format("sub/a b.PNG", "x")
    path = folders[0] / f"metadata.{kind}"
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(
        DataError, match=r"metadata\.\w+ is not UTF-8 \(byte 0xe9 on line \d\); save it as UTF-8"
    ):
        read(folders, forget_prompts=None)
    path.write_bytes(text.encode("utf-8-sig"))
    assert [row.prompt for row in read(folders, forget_prompts=None).forget] == ["caf\u00e9", "x"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_names_and_texts_is_read(folders: tuple[Path, Path], kind: str) -> None:
    lines = [{"file_name": "./sub/a b.PNG", "text": "one, two"}, {"file_name": "2.jpg", "text": "three"}]
    path = folders[0] / f"metadata.{kind}"
    if kind == "csv":
        write_table(path, lines)
    else:
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    (folders[0] / "2.txt").write_text("four")
    rows = read(folders, forget_prompts=None)
    assert {row.relative: row.prompt for row in rows.forget} == {
        "forget/2.jpg": "three",
        "forget/sub/a b.PNG": "one, two",
    }
    assert rows.notes == (
        f"text files beside images, for {path} has the texts: 1 passed over, the first is {folders[0] / '2.txt'}",
    )


def test_all_that_is_wrong_in_a_table_is_listed(folders: tuple[Path, Path]) -> None:
    lines = [{"file_name": "../other/1.webp", "text": "x"}, {"file_name": "2.jpg", "text": " "}]
    write_table(folders[0] / "metadata.csv", lines)
    with pytest.raises(DataError, match="4 entries") as raised:
        read(folders, forget_prompts=None)
    for part in (
        "line 2: there is no image '../other/1.webp'",
        "line 3: 2.jpg has no text",
        "2.jpg: not in the table",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file,text\n2.jpg,x\n", "no column 'file_name'; its columns are: file, text"),
        ("metadata.jsonl", '{"file_name": "2.jpg"}\n', r"line 1 is not like"),
        ("metadata.jsonl", "2.jpg x\n[]\n", r"2 entries .*\n  line 1 is not like .*\n  line 2 is not like"),
    ],
)
def test_a_table_of_another_form_is_refused(
    folders: tuple[Path, Path], name: str, text: str, message: str
) -> None:
    (folders[0] / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read(folders, forget_prompts=None)


def test_two_tables_are_one_too_many(folders: tuple[Path, Path]) -> None:
    for name in ("metadata.csv", "metadata.jsonl"):
        (folders[0] / name).write_text("")
    with pytest.raises(DataError, match=r"both metadata\.csv and metadata\.jsonl"):
        read(folders, forget_prompts=None)


def test_images_of_both_folders_that_cannot_be_used_are_listed_together(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    draw(folders[0] / "tiny.png", size=(7, 7))
    (folders[1] / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    draw(tmp_path / "secret.jpg")
    (folders[1] / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match="3 files cannot be used") as raised:
        read(folders)
    for part in ("7 x 7 px is too small", "cut.jpg: unreadable", "link.jpg: a link that leaves the folder"):
        assert part in str(raised.value)


def test_a_folder_of_links_is_not_an_empty_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links/1.jpg").symlink_to(folders[0] / "2.jpg")
    with pytest.raises(DataError, match="leaves the folder"):
        read((tmp_path / "links", folders[1]))


def test_nothing_is_retained_from_no_folder(folders: tuple[Path, Path]) -> None:
    assert read((folders[0], None)).retain == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retain_prompts": ["My  dog"]}, "is a prompt to forget and"),
        (
            {"retain_prompts": ["My  dog"], "substitute": None},
            "retain_prompts: 'My  dog' is one of the prompts",
        ),
        ({"substitute": "my Dog"}, "one of the prompts to forget"),
        ({"substitute": "Dog"}, "is to be forgotten"),
        ({"substitute": "a {style} cat"}, "placeholder"),
    ],
)
def test_prompts_that_contradict_each_other_are_refused(
    folders: tuple[Path, Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(folders, **changes)


def test_folders_that_share_images_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folders[0])
    for pair in ((folders[0], folders[0] / "sub"), (folders[0], tmp_path), (folders[0], tmp_path / "alias")):
        with pytest.raises(DataError, match="retain_dataset_dir: "):
            read(pair)


def test_a_copy_of_an_image_to_forget_is_not_retained(folders: tuple[Path, Path]) -> None:
    """Compared are the files: both paths are named, of every pair."""
    copies = [shutil.copy(folders[0] / "2.jpg", folders[1] / "copy.jpg")]
    copies.append(shutil.copy(folders[0] / "sub/a b.PNG", folders[1] / "sub.png"))
    with pytest.raises(DataError, match="2 images lie in raw_dataset_dir, to be forgotten, and as") as raised:
        read(folders)
    for original, copy in zip(("2.jpg", "sub/a b.PNG"), copies, strict=True):
        assert f"\n  {folders[0] / original} and {copy}\n" in str(raised.value)
    # As many bytes alone make no copy.
    copies[0].write_bytes(copies[0].read_bytes()[:-2] + b"\xff\xd8")
    copies[1].unlink()
    assert len(read(folders).retain) == 3


@pytest.mark.parametrize("key", ["processed_dataset_dir", "output_dir"])
def test_a_run_does_not_write_where_images_are_read(
    folders: tuple[Path, Path], tmp_path: Path, key: str
) -> None:
    """Its pictures would be forgotten by the next run."""
    (tmp_path / "alias").symlink_to(folders[1])
    for inside, root_key in (
        (folders[0] / "runs", "raw_dataset_dir"),
        (folders[0], "raw_dataset_dir"),
        (tmp_path / "alias/runs", "retain_dataset_dir"),
    ):
        with pytest.raises(DataError, match=f"{key}: {inside} lies in {root_key} "):
            read(folders, **{key: str(inside)})
    assert read(folders, **{key: str(tmp_path / "runs")}).forget


def test_a_missing_or_empty_folder_is_named_by_its_key(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"retain_dataset_dir: .*empty holds no images"):
        read((folders[0], tmp_path / "empty"))
    with pytest.raises(DataError, match="raw_dataset_dir: there is no folder"):
        read((tmp_path / "nowhere", folders[1]))


def test_a_cut_image_is_named_together_with_what_headers_show(folders: tuple[Path, Path]) -> None:
    """Of a cut file the header is whole: without another mistake it is found when images are encoded."""
    whole = draw(folders[0] / "cut.png", size=(300, 300)).read_bytes()
    (folders[0] / "cut.png").write_bytes(whole[:-40])
    assert len(read(folders).forget) == 3
    draw(folders[1] / "tiny.png", size=(7, 7))
    with pytest.raises(DataError, match="2 files cannot be used") as raised:
        read(folders)
    for part in ("tiny.png: 7 x 7 px is too small", "cut.png: unreadable"):
        assert part in str(raised.value)
