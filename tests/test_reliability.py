"""docs/reliability.md names a test for each promise that it lists, and every test named after a promise is in it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
NUMBERED = re.compile(r"^\| (\d+) \| .+? \| (.+) \|$", flags=re.M)
FILE = re.compile(r"\[[\w.]+\]\(\.\./(tests/[\w/.]+)\): ((?:`\w+`(?:, )?)+)")


def named_tests() -> set[tuple[int, str, str]]:
    """(promise, file, test) of the table."""
    found = set()
    for number, cell in NUMBERED.findall(PAGE.read_text(encoding="utf-8")):
        for file, names in FILE.findall(cell):
            found |= {(int(number), file, name) for name in re.findall(r"`(\w+)`", names)}
    return found


def written_tests() -> set[tuple[int, str, str]]:
    """(promise, file, test) of the tests named after a promise."""
    return {
        (int(number), path.relative_to(ROOT).as_posix(), f"test_promise_{number}_{rest}")
        for path in (ROOT / "tests").rglob("test_*.py")
        for number, rest in re.findall(
            r"^def test_promise_(\d+)_(\w+)\(", path.read_text(encoding="utf-8"), flags=re.M
        )
    }


def test_the_table_names_tests_that_exist_and_all_that_are_named_after_a_promise() -> None:
    assert named_tests() == written_tests()


def test_every_promise_of_the_table_has_a_test() -> None:
    numbers = [int(number) for number, _ in NUMBERED.findall(PAGE.read_text(encoding="utf-8"))]
    assert numbers == sorted(set(numbers))
    assert numbers == list(range(1, 32))
    assert set(numbers) == {number for number, _, _ in named_tests()}
