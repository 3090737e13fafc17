from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mu.config_names import nearest
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_apart,
    check_folder_names,
    check_substitutes,
    choose_substitute,
    concept_label,
    concept_words,
    fill_substitute,
    natural_key,
    next_kept,
    write_index_files,
)
from mu.errors import MuError

STYLES = ("Noto", "Fluent", "Fluent_Flat")
ROW = Row(
    Path("/a/Noto/Cats/1.png"), "Noto/Cats/1.png", "A Cats image in Noto style.", "Noto", "Cats", "Noto"
)


def choose(value: str | None, default: str | None = "Fluent") -> tuple[str | None, str | None]:
    return choose_substitute(value, template="style", target="Noto", allowed=STYLES, default=default)


def test_a_key_does_not_depend_on_where_the_data_lies() -> None:
    assert ROW.key == "Noto/Cats/1.png|A Cats image in Noto style."
    assert replace(ROW, image=Path("/elsewhere/1.png")).key == ROW.key


def test_numbers_in_names_are_sorted_as_numbers() -> None:
    names = ["10.jpg", "2.jpg", "1.jpg", "a.jpg", "1b.jpg", "Van_Gogh", ""]
    assert sorted(names, key=natural_key) == ["", "1.jpg", "1b.jpg", "2.jpg", "10.jpg", "Van_Gogh", "a.jpg"]


@pytest.mark.parametrize(
    ("name", "near"), [("noto", "Noto"), ("fluent flat", "Fluent_Flat"), ("Fluent-Flta", "Fluent_Flat")]
)
def test_the_nearest_name_is_suggested(name: str, near: str) -> None:
    assert nearest(name, STYLES) == f" Did you mean {near!r}?"


def test_nothing_near_suggests_nothing() -> None:
    assert nearest("Waterfalls", STYLES) == ""


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/b", "a\\b", "/abs", "", ".hidden", "a\nb", "a\0b", "a.", "x" * 101]
)
def test_names_that_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="styles"):
        check_folder_names("styles", ["Noto", name])


def test_names_given_twice_are_refused() -> None:
    with pytest.raises(DataError, match="more than once: Noto, noto"):
        check_folder_names("styles", ["Noto", "Blob", "noto"])


def test_a_substitute_is_the_default_a_name_or_a_prompt() -> None:
    assert choose(None) == ("Fluent", None)
    assert choose("fluent flat") == ("Fluent_Flat", None)
    assert choose("a photo of {object}") == (None, "a photo of {object}")
    assert choose("a plain drawing") == (None, "a plain drawing")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Noto", "is the style to forget"),
        ("noto ", "is the style to forget"),
        ("Fluentt", "Did you mean 'Fluent'"),
        ("{style} {object}", "stands for 'Noto'"),
        ("a photo of {objekt}", "may only contain"),
        ("a photo of {object.__class__}", "may only contain"),
        ("a photo of {object!r}", "may only contain"),
        ("a photo of {", "is not a prompt"),
        ("a photo\nof it", "line break"),
        ("", "no style of this data set"),
    ],
)
def test_a_substitute_that_cannot_be_is_refused(value: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose(value)


def test_the_only_concept_has_no_default_substitute() -> None:
    with pytest.raises(DataError, match="the only style here"):
        choose(None, default="Noto")


def test_of_several_concepts_none_stands_in_for_another() -> None:
    wanted = {"template": "style", "target": ("Noto", "Fluent"), "allowed": STYLES}
    assert next_kept("Noto", STYLES, ("Noto", "Fluent")) == "Fluent_Flat"
    assert next_kept("Fluent_Flat", STYLES, ("Fluent_Flat", "Noto")) == "Fluent"
    assert next_kept("Noto", STYLES, STYLES) is None
    assert choose_substitute("Fluent Flat", **wanted, default=None) == ("Fluent_Flat", None)
    with pytest.raises(DataError, match="'fluent' is one of the styles to forget"):
        choose_substitute("fluent", **wanted, default=None)
    with pytest.raises(DataError, match="'Noto', 'Fluent' are all styles here"):
        choose_substitute(None, **wanted, default="Noto")


def test_a_label_names_one_concept_or_several() -> None:
    assert concept_label("Noto") == concept_label(("Noto",)) == "Noto"
    assert concept_label(("Noto", "Blob")) == "Noto+Blob"
    long = [f"{'x' * 30}{number}" for number in range(9)]
    assert concept_label(long).startswith(f"{long[0]}+8_more-")
    assert len(concept_label(long)) < 60
    assert concept_label(long) != concept_label(long[::-1]) != concept_label(long[:-1])


def test_an_image_or_a_prompt_is_forgotten_or_retained_but_not_both() -> None:
    kept = replace(ROW, image=Path("/a/Blob/Cats/1.png"), prompt="A Cats image in Blob style.")
    check_apart(ForgetRetain((ROW,), (kept,)))
    with pytest.raises(DataError, match=r"/a/Noto/Cats/1\.png: this image"):
        check_apart(ForgetRetain((ROW,), (replace(kept, image=ROW.image),)))
    with pytest.raises(DataError, match="give them different prompts"):
        check_apart(ForgetRetain((ROW,), (replace(kept, prompt="a cats  image in noto style."),)))


def test_a_filled_substitute_says_names_in_words() -> None:
    assert (
        fill_substitute("{object} as {style}", style="Fluent_Flat", object="Sea_Lions")
        == "Sea Lions as Fluent Flat"
    )


def test_a_substitute_that_is_a_prompt_to_forget_is_refused() -> None:
    dogs = replace(
        ROW, prompt="A Dogs image in Noto style.", substitute_prompt="a  cats image in Noto style."
    )
    with pytest.raises(DataError, match="one of the prompts to forget"):
        check_substitutes([replace(ROW, substitute_prompt="a photo"), dogs])


def test_index_files_hold_one_entry_a_line_in_order(tmp_path: Path) -> None:
    rows = [
        replace(ROW, image=Path(f"/a/{n}.png"), prompt=f"prompt {n}", substitute_prompt=f"s {n}")
        for n in (2, 1)
    ]
    write_index_files(rows, tmp_path / "forget")
    assert (tmp_path / "forget/images.txt").read_text() == "/a/2.png\n/a/1.png\n"
    assert (tmp_path / "forget/prompts.txt").read_text() == "prompt 2\nprompt 1\n"
    assert (tmp_path / "forget/substitutes.txt").read_text() == "s 2\ns 1\n"
    assert len(list((tmp_path / "forget").iterdir())) == 3


def test_an_entry_with_a_line_break_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line break"):
        write_index_files([replace(ROW, image=Path("/a/x\ny.png"))], tmp_path)


def test_the_error_is_of_the_package_and_a_value_error() -> None:
    assert issubclass(DataError, MuError)
    assert issubclass(DataError, ValueError)


def test_indexing_folders_needs_no_torch() -> None:
    modules = ("data_sets", "prompt_table")
    imports = ", ".join(f"mu.datasets.{name}" for name in modules)
    script = f"import sys, {imports}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("kind", "names", "words"),
    [
        ("style", "High_Contrast", "the style High Contrast"),
        ("object", ("Cats", "Dogs", "Fruits"), "the objects Cats, Dogs and Fruits"),
        ("prompt", ("a my_token dog",), "the prompt 'a my_token dog'"),
        ("i2p", ("hate", "self-harm"), "the categories hate and self-harm"),
    ],
)
def test_concepts_in_a_sentence(kind: str, names: str | tuple[str, ...], words: str) -> None:
    assert concept_words(kind, names) == words
