"""Write the tables of README.md and docs/, between their markers, from the JSON beside this file.

cp outputs/benchmark/table.json benchmarks/emoji_canvas_table.json    # other methods': _esd, _uce, _masks.json
python -m benchmarks.render            # writes all of them
python -m benchmarks.render --check    # exit code 1 when a page says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import readme_text, speed_text
from benchmarks.table_text import differences_markdown, markdown, means_markdown, reading

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks"


def results() -> str:
    """The results table, whole; of several methods their means first."""
    content = {"cra_prompts": "retained", "left_out": [], **_read("emoji_canvas_table.json")}
    return (markdown(_rows()) + reading(content["cra_prompts"], content["left_out"])).rstrip()


def controls() -> str:
    """The means of each method, and SalUn minus each of the others."""
    rows = _read("emoji_canvas_controls.json")["rows"]
    return f"{means_markdown(rows)}\n{differences_markdown(rows)}".rstrip()


def speed() -> str:
    """All measurements of the stopwatch."""
    return "\n\n".join(speed_text.table(report) for report in _speed_reports())


def scoreboard() -> str:
    """The methods of the results table side by side, with the controls that it has not."""
    return readme_text.scoreboard(_rows(), _read("emoji_canvas_controls.json")["rows"])


def speed_rows() -> str:
    """A row for each measurement of the stopwatch."""
    return readme_text.speed_rows(_speed_reports())


def objective() -> str:
    """ESD's loss as it stands in the code."""
    return readme_text.method_source(ROOT / "mu/algorithms/esd/objective.py", "ESD", "terms")


SECTIONS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("README.md", "scoreboard", scoreboard),
    ("README.md", "speed", speed_rows),
    ("README.md", "objective", objective),
    ("docs/results.md", "table", results),
    ("docs/results.md", "controls", controls),
    ("docs/results.md", "speed", speed),
)
"""Page, the name in its markers, and what makes the text between them."""


def with_section(page: str, name: str, content: str) -> str:
    """The page with `content` between its markers. Raises ValueError when they are not there, once and in order."""
    begin_mark, end_mark = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = page.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end or begin_mark in after or end_mark in after:
        raise ValueError(f"the page must have {begin_mark} and {end_mark}, once each")
    return f"{before}{begin_mark}\n{content}\n{end_mark}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, tell whether the pages are right"
    )
    check = parser.parse_args(arguments).check
    wrong = 0
    for page, name, make in SECTIONS:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = with_section(old, name, make())
        if not check:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            wrong = 1
            print(
                f"{page}: {name} is not what {MEASURED} says; run: python -m benchmarks.render",
                file=sys.stderr,
            )
    return wrong


def _rows() -> list[dict[str, Any]]:
    """Of the results table, and of tables of other methods that lie beside it."""
    names = [f"emoji_canvas_{name}.json" for name in ("table", "esd", "uce", "masks")]
    return [row for name in names if (MEASURED / name).is_file() for row in _read(name)["rows"]]


def _speed_reports() -> list[dict[str, Any]]:
    return [_read(file.name) for file in sorted(MEASURED.glob("speed_*.json"))]


def _read(name: str) -> Any:
    return json.loads((MEASURED / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
