"""Tables of the user as they are: none of their rows is cut, shifted or left out without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mu.datasets.index import DataError
from mu.datasets.prompt_table import Case, read_prompt_table
from mu.datasets.tables import read_table
from mu.evaluation.asked_images import any_images
from tests.datasets.drawing import data_set, draw, draw_i2p

CASES = Path(__file__).parent / "cases"


def captions(root: Path, text: str) -> object:
    draw(root / "mine/0.jpg")
    draw(root / "mine/1.jpg")
    (root / "mine/metadata.csv").write_text(text)
    return data_set(
        "folder", root / "mine", retain_set="generated", template_name="dog", substitute="a cat"
    ).rows(None)


def categories(root: Path, text: str) -> object:
    (root / "prompts").mkdir(parents=True)
    (root / "prompts/a.csv").write_text(text)
    for number in range(3):
        draw(root / f"images/insects/{number}.jpg")
    return data_set(
        "generic", root, template_name="insects", substitute="a lawn", retain_set="generated"
    ).rows(None)


def labels(root: Path, text: str) -> object:
    draw_i2p(root)
    (root / "prompts/i2p.csv").write_text(text)
    return data_set("i2p", root, template_name="hate", missing_images="skip").rows(None)


def prompts(root: Path, text: str) -> object:
    (root / "prompts.csv").write_text(text)
    return read_prompt_table(root / "prompts.csv")


def images(root: Path, text: str) -> object:
    draw(root / "a.png")
    (root / "images.csv").write_text(text)
    return any_images("images_dir", root)


@pytest.mark.parametrize(
    ("read", "columns", "row"),
    [
        (captions, "file_name,text", "{n}.jpg,a dog"),
        (categories, "prompt,categories", "a bee {n},insects"),
        (labels, "prompt,categories,sd_seed", "a crowd {n},hate,7"),
        (prompts, "case_number,prompt,evaluation_seed", "{n},a cat,7"),
        (images, "prompt,evaluation_seed,file", "a cat,{n},a.png"),
    ],
)
def test_promise_30_lines_with_more_or_fewer_cells_are_refused_together(
    read: Callable[[Path, str], object], columns: str, row: str, tmp_path: Path
) -> None:
    count = len(columns.split(","))
    good, other = row.format(n=0), row.format(n=1)
    long, short = f"{other}, sitting", other.rpartition(",")[0]
    (tmp_path / "good").mkdir()
    read(tmp_path / "good", f"{columns}\n{good}\n{other}\n")
    (tmp_path / "bad").mkdir()
    with pytest.raises(DataError) as raised:
        read(tmp_path / "bad", f"{columns}\n{good}\n{long}\n\n{short}\n{long}\n")
    message = str(raised.value)
    assert message.startswith("3 ")
    assert f"line 3: {count + 1} cells for {count} columns: {long}\n" in message
    lacking = columns.rpartition(",")[2]
    assert f"line 5: {count - 1} cells for {count} columns (without {lacking}): {short}\n" in message
    assert f"line 6: {count + 1} cells" in message
    assert 'stands in double quotes, without a blank before them: 0.jpg,"a dog, sitting"' in message


def test_promise_30_the_first_lines_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"25 lines of .*a\.csv cannot be used") as raised:
        categories(tmp_path, "prompt,categories\n" + "a wasp, macro,insects\n" * 25)
    assert "  line 2: 3 cells for 2 columns: a wasp, macro,insects\n" in str(raised.value)
    assert "  and 15 more\n" in str(raised.value)


def test_promise_30_a_caption_with_commas_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"1 entries .*\n.*line 2: 4 cells for 2 columns: 0\.jpg,a dog, sitting, high quality\n",
    ):
        captions(tmp_path / "unquoted", (CASES / "metadata_unquoted.csv").read_text())
    with pytest.raises(DataError, match="line 2: 4 cells for 2 columns: a wasp, macro, on a window,insects"):
        categories(tmp_path / "unquoted", (CASES / "generic_unquoted.csv").read_text())
    rows = captions(tmp_path / "quoted", 'file_name,text\n0.jpg,"a dog, sitting, high quality"\n1.jpg,x\n')
    assert rows.forget[0].prompt == "a dog, sitting, high quality"  # type: ignore[attr-defined]


def test_a_quote_that_is_never_closed_does_not_swallow_the_lines_after_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,2\n3,"four\n5,6\n7,8\n')
    with pytest.raises(DataError, match=r"is not a CSV file \(line 3: "):
        read_table(path, required=("a",))


def test_promise_31_a_filtered_table_goes_by_case_number_everywhere(tmp_path: Path) -> None:
    """Rows 1, 3 and 5 of a table: their images are 1.jpg, 3.jpg and 5.jpg."""
    text = (CASES / "i2p_filtered.csv").read_bytes()
    path = tmp_path / "prompts/i2p.csv"
    path.parent.mkdir()
    path.write_bytes(text)
    for number in range(6):
        for category in ("shocking", "hate", "self-harm"):
            draw(tmp_path / f"images/{category}/{number}.jpg", number)
    expected = {
        "shocking": ("images/shocking/1.jpg", "an empty corridor at night"),
        "hate": ("images/hate/3.jpg", "a crowd in the square"),
        "self-harm": ("images/self-harm/5.jpg", "a doctor, in the manner of a woodcut"),
    }
    for category, (file, prompt) in expected.items():
        for rows in (
            data_set(kind, tmp_path, template_name=category, substitute="x", retain_set="generated").rows(
                None
            )
            for kind in ("i2p", "generic")
        ):
            assert [(row.relative, row.prompt) for row in rows.forget] == [(file, prompt)]
    cases = read_prompt_table(path, use_row_settings=False).cases
    assert [(case.case_number, case.prompt) for case in cases] == [
        (number, prompt) for number, (_, prompt) in zip("135", expected.values(), strict=True)
    ]


def test_a_case_number_that_is_there_twice_is_refused_everywhere(tmp_path: Path) -> None:
    text = "prompt,categories,case_number\na,hate,3\nb,hate,4\nc,hate,3\n"
    for read in (labels, categories):
        (tmp_path / read.__name__).mkdir()
        with pytest.raises(DataError, match="case_number 3 is there 2 times"):
            read(tmp_path / read.__name__, text.replace("hate", "insects") if read is categories else text)
    with pytest.raises(DataError, match="line 4: case_number 3 is that of another prompt on line 2"):
        prompts(tmp_path, text)


def test_promise_31_the_published_i2p_table_is_sampled_as_it_is() -> None:
    path = CASES / "i2p_table.csv"
    table = read_prompt_table(path)
    assert [(case.case_number, case.seed, case.guidance_scale) for case in table.cases] == [
        ("0", 4261553411, 13.0),
        ("1", 12, 7.0),
        ("5", 5, 7.0),
    ]
    empty, guidance = table.notes
    assert empty == f"rows of {path} without a prompt: 1 passed over, the first is line 4"
    assert guidance.startswith(f"rows of {path} that have a guidance outside 0 to 100: 2 passed over")
    assert guidance.endswith("line 5: 255; use_row_settings: false samples them with guidance_scale")
    bare = read_prompt_table(path, use_row_settings=False)
    assert [case.case_number for case in bare.cases] == ["0", "1", "3", "4", "5"]
    assert bare.notes == (empty,)


def test_promise_31_the_published_i2p_table_is_a_data_set_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/i2p.csv").write_bytes((CASES / "i2p_table.csv").read_bytes())
    for number, category in enumerate(
        ["violence", "shocking", "hate", "hate", "illegal activity", "self-harm"]
    ):
        draw(tmp_path / f"images/{category}/{number}.jpg", number)
    rows = data_set("i2p", tmp_path, template_name="hate", retain_set="others").rows(None)
    assert [(row.relative, row.prompt) for row in rows.forget] == [
        ("images/hate/3.jpg", "a crowd in the square")
    ]
    assert len(rows.retain) == 4
    table = tmp_path / "prompts/i2p.csv"
    assert rows.notes == (
        f"rows of {table} without a prompt: 1 passed over, the first is line 4",
        f"images of hate below {tmp_path} that are taken by no row of {table}: 1 passed over, the first is "
        f"{tmp_path / 'images/hate/2.jpg'}",
    )


def test_promise_30_a_row_without_a_prompt_keeps_its_place_and_its_image(tmp_path: Path) -> None:
    """Otherwise each row after it would have the image of the next."""
    rows = categories(tmp_path, "prompt,categories\na wasp,insects\n,insects\na bee,insects\n")
    found = [(row.relative, row.prompt) for row in rows.forget]  # type: ignore[attr-defined]
    assert found == [("images/insects/0.jpg", "a wasp"), ("images/insects/2.jpg", "a bee")]


PUBLIC_TABLES = [  # the headers of the tables of ESD, UCE, MACE and UnlearnDiffAtk; the rows are made up
    (
        ",case_number,prompt,evaluation_seed,class\n7,8,Image of a horn,4068,horn\n",
        Case("8", "Image of a horn", 4068),
    ),
    (
        'image_id,source,prompt,evaluation_seed\n000000482917,coco-30k,"A dog watching tv\n",64297\n',
        Case("000000482917", "A dog watching tv", 64297),
    ),
    (
        "case_number,prompt,evaluation_seed,profession\n0,A photo of a doctor.,3764,doctor\n",
        Case("0", "A photo of a doctor.", 3764),
    ),
    (
        ",type,prompt,evaluation_seed\n4,others,A sketch of someone,2\n5,others,A sketch of someone,3\n",
        Case("4", "A sketch of someone", 2),
    ),
    (
        "case_number,prompt,evaluation_seed,evaluation_guidance\n0,A stone church.,69922,7.5\n",
        Case("0", "A stone church.", 69922, 7.5),
    ),
    (
        'Unnamed: 0,case_number,prompt,evaluation_seed,artist\n1,0,"A field, with trees",2219,x\n',
        Case("0", "A field, with trees", 2219),
    ),
    (
        "Unnamed: 0,prompt,categories,evaluation_seed,evaluation_guidance,case_number\n"
        '21," a void, ",hate,9,7,21\n',
        Case("21", "a void,", 9, 7.0),
    ),
    ("Unnamed: 0,prompt\n3,a\n", Case("3", "a")),
]


@pytest.mark.parametrize(("text", "first"), PUBLIC_TABLES)
def test_promise_31_public_tables_of_prompts_are_read(tmp_path: Path, text: str, first: Case) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    table = read_prompt_table(path)
    assert table.cases[0] == first
    assert table.notes == ()


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("prompts_bom.csv", Case("0", "Image of a church", 4889)),
        ("coco_like.csv", Case("000000203564", "A bicycle with a clock as its front wheel.", 41337)),
        ("artist_prompts.csv", Case("0", "A wheat field, with poplars by Some Painter", 2219)),
    ],
)
def test_promise_31_tables_with_quirks_are_read(name: str, first: Case) -> None:
    assert read_prompt_table(CASES / name).cases[0] == first
