"""Tables of prompts: both families of column names, numbering, and every wrong cell in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from mu.datasets.index import DataError
from mu.datasets.prompt_table import Case, read_prompt_table


def table(tmp_path: Path, text: str, **options: bool) -> tuple[Case, ...]:
    path = tmp_path / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    found = read_prompt_table(path, **options)
    assert found.notes == ()
    return found.cases


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
        '\ufeff,prompt,categories,sd_seed,sd_guidance_scale\n3,a,hate,1500.0,7\n9.0,b,"hate, violence",,0\n',
    )
    assert found == (Case("3", "a", 1500, 7.0), Case("9", "b", None, 0.0))


def test_rows_without_a_number_are_counted_from_0(tmp_path: Path) -> None:
    assert table(tmp_path, "prompt\na\n\nb\n") == (Case("0", "a"), Case("1", "b"))


def test_a_case_may_have_several_seeds(tmp_path: Path) -> None:
    found = table(tmp_path, "case_number,prompt,evaluation_seed\n1,a,3\n1,a,4\n")
    assert [case.seed for case in found] == [3, 4]
    with pytest.raises(DataError, match="more than once with one seed: case_number 1"):
        table(tmp_path, "case_number,prompt,evaluation_seed\n1,a,3\n1,a,3\n")
    with pytest.raises(DataError, match="line 4: case_number 1 is that of another prompt on line 2"):
        table(tmp_path, "case_number,prompt,evaluation_seed\n1,a,3\n2,a,3\n1,b,4\n")


def test_all_wrong_cells_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        table(
            tmp_path,
            "case_number,prompt,evaluation_seed,evaluation_guidance\n"
            "../up,a,1,1\n2,a\n3,a,-1,1\n4,a,4294967296,1\n5,a,1.5,1\n6,a,1,nan\n7,a,1,x\n8,a,b,1,1\n9,fine,1,1\n",
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == f"8 lines of {tmp_path / 'prompts.csv'} cannot be used:"
    for found, (number, words) in zip(
        lines[1:],
        (
            (3, "2 cells for 4 columns (without evaluation_seed, evaluation_guidance): 2,a"),
            (9, "5 cells for 4 columns: 8,a,b,1,1"),
            (2, "case_number '../up' cannot"),
            (4, "the seed '-1'"),
            (5, "the seed '4294967296'"),
            (6, "the seed '1.5'"),
            (7, "the guidance 'nan'"),
            (8, "the guidance 'x'"),
        ),
        strict=False,
    ):
        assert found.startswith(f"  line {number}: {words}")
    assert "double quotes" in lines[9]


def test_a_line_of_blanks_is_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("  \ncase_number,prompt\n0,a\n \t \n1,b\n")
    assert read_prompt_table(path).cases == (Case("0", "a"), Case("1", "b"))
    path.write_text('prompt\na\n  \n""\nb\n')
    found = read_prompt_table(path)
    assert found.cases == (Case("0", "a"), Case("2", "b"))
    assert found.notes == (f"rows of {path} without a prompt: 1 passed over, the first is line 4",)


def test_rows_without_a_prompt_and_guidances_out_of_range_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(
        "case_number,prompt,evaluation_guidance,evaluation_seed\n0,a,7,x\n1,,x,x\n2,b,105,1\n,,,\n4,c,-1,1\n"
    )
    bare = read_prompt_table(path, use_row_settings=False)
    assert bare.cases == (Case("0", "a"), Case("2", "b"), Case("4", "c"))
    assert bare.notes == (f"rows of {path} without a prompt: 2 passed over, the first is line 3",)
    path.write_text(path.read_text().replace("7,x", "7,1"))
    found = read_prompt_table(path)
    assert found.cases == (Case("0", "a", 1, 7.0),)
    assert found.notes[0] == bare.notes[0]
    assert found.notes[1] == (
        f"rows of {path} that have a guidance outside 0 to 100: 2 passed over, the first is line 4: 105; "
        "use_row_settings: false samples them with guidance_scale"
    )
    path.write_text("prompt,evaluation_guidance\na,255\n")
    with pytest.raises(
        DataError, match=r"no row that can be sampled: rows .* 1 passed over.* line 2: 255; use_row_settings"
    ):
        read_prompt_table(path)


def test_cells_that_are_not_used_are_not_looked_at(tmp_path: Path) -> None:
    text = "case_number,prompt,evaluation_seed,evaluation_guidance\n1,a,x,255\n1,a,-1,no\n2,b,3,4\n"
    assert table(tmp_path, text, use_row_settings=False) == (Case("1", "a"), Case("2", "b"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no column 'prompt'; its columns are: none."),
        ("promt,seed\na,1\n", "its columns are: promt, seed. Did you mean 'promt'?"),
        ("a photo of a cat\n", "one prompt a line without columns is a .txt file"),
        ("prompt\n", "has columns, but no row"),
        ('prompt\n"a\nb\n', "is not a CSV file (line 2: "),
    ],
)
def test_what_is_no_table_is_told(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path, text)
    assert expected in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompt_table(tmp_path / "absent.csv")
