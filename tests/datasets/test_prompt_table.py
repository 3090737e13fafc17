"""Tables of prompts: both families of column names, numbering, and every wrong cell in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from mu.datasets.index import DataError
from mu.datasets.prompt_table import Case, read_prompt_table


def table(tmp_path: Path, text: str) -> tuple[Case, ...]:
    path = tmp_path / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    return read_prompt_table(path)


def test_the_columns_of_a_benchmark(tmp_path: Path) -> None:
    found = table(
        tmp_path,
        "case_number,prompt,evaluation_seed,evaluation_guidance,artist\n"
        '7,"a cat, sitting",4294967295,7.5,x\n12,"two\nlines",0,,\n',
    )
    assert found == (Case("7", "a cat, sitting", 4294967295, 7.5), Case("12", "two lines", 0, None))


def test_the_columns_of_i2p(tmp_path: Path) -> None:
    found = table(
        tmp_path,
        '\ufeff,prompt,categories,sd_seed,sd_guidance_scale\n3,a,hate,1500.0,7\n9,b,"hate, violence",,0\n',
    )
    assert found == (Case("3", "a", 1500, 7.0), Case("9", "b", None, 0.0))


def test_rows_without_a_number_are_counted_from_0(tmp_path: Path) -> None:
    assert table(tmp_path, "prompt\na\n\nb\n") == (Case("0", "a"), Case("1", "b"))


def test_a_case_may_have_several_seeds(tmp_path: Path) -> None:
    found = table(tmp_path, "case_number,prompt,evaluation_seed\n1,a,3\n1,a,4\n")
    assert [case.seed for case in found] == [3, 4]
    with pytest.raises(DataError, match="more than once with one seed: case_number 1"):
        table(tmp_path, "case_number,prompt,evaluation_seed\n1,a,3\n1,b,3\n")


def test_all_wrong_cells_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        table(
            tmp_path,
            "case_number,prompt,evaluation_seed,evaluation_guidance\n"
            "../up,a,1,1\n2,,1,1\n3,a,-1,1\n4,a,4294967296,1\n5,a,1.5,1\n6,a,1,nan\n7,a,1,x\n8,a,1\n9,fine,1,1\n",
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == f"8 mistakes in {tmp_path / 'prompts.csv'}:"
    for number, words in enumerate(
        (
            "case_number '../up' cannot",
            "the prompt is empty",
            "the seed '-1'",
            "the seed '4294967296'",
            "the seed '1.5'",
            "the guidance 'nan'",
            "the guidance 'x'",
            "3 cells for 4 columns",
        ),
        start=1,
    ):
        assert lines[number].startswith(f"  row {number}: {words}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no column `prompt` but nothing"),
        ("promt,seed\na,1\n", "but promt, seed. Did you mean 'promt'?"),
        ("a photo of a cat\n", "one prompt a line without columns is a .txt file"),
        ("prompt\n", "has columns, but no row"),
        ('prompt\n"a\n', "is not a CSV file"),
    ],
)
def test_what_is_no_table_is_told(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path, text)
    assert expected in str(caught.value)
    with pytest.raises(DataError, match="cannot be read as text"):
        read_prompt_table(tmp_path / "absent.csv")
