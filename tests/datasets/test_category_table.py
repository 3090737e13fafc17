from __future__ import annotations

from pathlib import Path

import pytest

from mu.datasets.category_table import PromptRow, categories_of, read_category_table
from mu.datasets.index import DataError


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
        PromptRow(0, 'a "cat", and a dog', ("hate", "violence")),
        PromptRow(1, "x", ("hate",)),
    )
    assert categories_of(rows) == ("hate", "violence")


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_an_unnamed_column_is_the_index(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, f"{name},prompt,categories\n12,x,hate\n7.0,y,hate\n")
    assert [row.number for row in read_category_table(path)] == [12, 7]


def test_wrong_rows_are_listed_by_line(tmp_path: Path) -> None:
    text = ",prompt,categories\n1,,hate\n2,x,\n-3,y,hate\n5,z,hate\n5,z,hate\n"
    with pytest.raises(DataError, match="4 rows") as raised:
        read_category_table(table(tmp_path, text))
    for part in (
        "line 2: the prompt is empty",
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
        ("prompt,categories\n", "has no rows"),
        ("", "no column 'prompt'; its columns are: none"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_category_table(table(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"prompt,categories\n\xff\xfe,hate\n")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_category_table(tmp_path / "t.csv")
