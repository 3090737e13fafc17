"""Write the tables of docs/controls.md, between its markers, from the JSON of a table with several methods.

cp outputs/saliency_unlearning/benchmark/controls.json benchmarks/emoji_canvas_controls.json
python scripts/controls_table.py            # writes
python scripts/controls_table.py --check    # exit code 1 when the page says something else
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import readme_section

from mu.algorithms.saliency_unlearning.controls import controls_markdown

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "emoji_canvas_controls.json"
PAGE = ROOT / "docs" / "controls.md"


def tables() -> str:
    """The Markdown of the rows in the JSON file, or that there is none yet."""
    if not TABLE.exists():
        return "Not measured yet."
    return controls_markdown(json.loads(TABLE.read_text(encoding="utf-8"))["rows"]).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    return readme_section.run(
        "controls",
        tables,
        description=__doc__,
        advice=f"what {TABLE} says; run: python scripts/controls_table.py",
        arguments=arguments,
        path=PAGE,
    )


if __name__ == "__main__":
    raise SystemExit(main())
