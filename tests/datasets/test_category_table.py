from __future__ import annotations

from pathlib import Path

import pytest

from mu.datasets.index import DataError
from mu.datasets.prompt_table import PromptRow, categories_of, read_category_table


def table(folder: Path, text: str) -> Path:
    path = folder / "t.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_quotes_and_line_breaks_are_read(tmp_path: Path) -> None:
    path = table(
        tmp_path, '\ufeffprompt,categories\n"a ""cat"", and\na dog","hate, violence ,hate"\nx,"hate,"\n'
    )
    rows = read_category_table(path)
    assert rows == (
        PromptRow(None, 'a "cat", and a dog', ("hate", "violence"), line=2),
        PromptRow(None, "x", ("hate",), line=4),
    )
    assert categories_of(rows) == ("hate", "violence")


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_an_unnamed_column_is_the_index(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, f"{name},prompt,categories\n12,x,hate\n7.0,y,hate\n")
    assert [row.number for row in read_category_table(path)] == ["12", "7"]


@pytest.mark.parametrize("name", ["case_number", "image_id"])
def test_a_column_of_numbers_goes_before_the_index(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, f",prompt,categories,{name}\n0,x,hate,0012\n0,y,hate,7.0\n")
    assert [row.number for row in read_category_table(path)] == ["12", "7"]


def test_wrong_rows_are_listed_by_line(tmp_path: Path) -> None:
    text = ",prompt,categories\n1,x,hate,\n2,x,\n-3,y,hate\n5,z,hate\n5,z,hate\n,,\n1,x\n"
    with pytest.raises(DataError, match="5 lines") as raised:
        read_category_table(table(tmp_path, text))
    for part in (
        "line 2: 4 cells for 3 columns: 1,x,hate,\n",
        "line 8: 2 cells for 3 columns (without categories): 1,x\n",
        "line 3: the row has no category",
        "line 4: the index '-3'",
        "index 5",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts,categories\nx,hate\n", r"no column 'prompt'.* Did you mean 'prompts'"),
        ("prompt,category\nx,hate\n", "no column 'categories'; its columns are: prompt, category"),
        ("prompt,categories\n", "columns, but no rows"),
        ("prompt,categories\n,hate\n", "has no row with a prompt"),
        ("prompt,categories,prompt\nx,hate,y\n", "has several columns called 'prompt'"),
        ("", "no column 'prompt'; its columns are: none"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_category_table(table(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    without_mark = "prompt,categories\n".encode("utf-16-le")  # each byte alone is one of UTF-8
    for content, told in (
        (b"prompt,categories\n\xff\xfe,hate\n", "0xff on line 2"),
        (without_mark, "0x00 on line 1"),
    ):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(DataError, match=rf"is not UTF-8 \(byte {told}\); save it as UTF-8"):
            read_category_table(tmp_path / "t.csv")
