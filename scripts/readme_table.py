"""Write the results table of README.md, between its markers, from the JSON that `make table` made.

cp outputs/saliency_unlearning/benchmark/table.json benchmarks/emoji_canvas_table.json
python scripts/readme_table.py            # writes
python scripts/readme_table.py --check    # exit code 1 when README.md says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mu.algorithms.saliency_unlearning.results_table import markdown

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TABLE = ROOT / "benchmarks" / "emoji_canvas_table.json"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def with_table(page: str, table: Path = TABLE) -> str:
    """The page with the table of a JSON file. Raises ValueError when the markers are not there, once and in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{README.name} must have {BEGIN} and {END}, once each")
    content = json.loads(table.read_text(encoding="utf-8"))
    return f"{before}{BEGIN}\n{markdown(content['rows'])}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing, tell whether the page is right")
    check = parser.parse_args(arguments).check
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if check and new != old:
        print(f"{README.name} is not what {TABLE} says; run: python scripts/readme_table.py", file=sys.stderr)
        return 1
    if not check:
        README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
