"""Write the results table of README.md, between its markers, from the JSON that `make table` made.

cp outputs/saliency_unlearning/benchmark/table.json benchmarks/emoji_canvas_table.json
python scripts/readme_table.py            # writes
python scripts/readme_table.py --check    # exit code 1 when README.md says something else
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import readme_section

from mu.algorithms.saliency_unlearning.results_table import markdown, reading

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "emoji_canvas_table.json"


def table() -> str:
    """The Markdown of the rows in the JSON file."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    usual = {"cra_prompts": "retained", "left_out": []} | content
    return (markdown(content["rows"]) + reading(usual["cra_prompts"], usual["left_out"])).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    return readme_section.run(
        "table",
        table,
        description=__doc__,
        advice=f"what {TABLE} says; run: python scripts/readme_table.py",
        arguments=arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
