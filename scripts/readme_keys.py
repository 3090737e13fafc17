"""Write the tables of config keys in README.md from the config classes, between the markers of that page.

python scripts/readme_keys.py            # writes
python scripts/readme_keys.py --check    # exit code 1 when README.md says something else
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mu.algorithms.saliency_unlearning.configs import (
    BenchmarkConfig,
    ConceptKeys,
    EvaluateConfig,
    MaskConfig,
    ModelKeys,
    SampleConfig,
    TrainConfig,
)
from mu.config import Config, keys_of
from mu.config_values import Key

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- keys:begin -->", "<!-- keys:end -->"


def tables() -> str:
    """All tables, each folded under a line that names the commands it is for."""
    shared = keys_of(ConceptKeys)
    sections = [
        ("<code>generate_mask</code> and <code>train</code>: the model, the concept, the images", shared),
        ("<code>generate_mask</code>", _own(MaskConfig, shared)),
        ("<code>train</code>", _own(TrainConfig, shared)),
        ("<code>sample</code>, beside the model's keys", _own(SampleConfig, keys_of(ModelKeys))),
        ("<code>evaluate</code>", keys_of(EvaluateConfig)),
        ("<code>benchmark_unlearning</code> (<code>make table</code>)", keys_of(BenchmarkConfig)),
    ]
    return "\n\n".join(
        f"<details>\n<summary>{title}</summary>\n\n{_table(keys)}\n\n</details>" for title, keys in sections
    )


def _own(cls: type[Config], shared: Sequence[Key]) -> list[Key]:
    """The keys of a class that are not, just as they are, among `shared`."""
    return [key for key in keys_of(cls) if key not in shared]


def _table(keys: Iterable[Key]) -> str:
    lines = ["| key | meaning | value | default |", "|---|---|---|---|"]
    for key in keys:
        if key.rule.choices is not None:
            value = ", ".join(f"`{choice}`" for choice in key.rule.choices)
        else:
            value = _escaped(key.type_words + (f", {key.rule.limits}" if key.rule.limits else ""))
        default = f"`{key.default_text}`" if key.default_text else "empty"
        lines.append(f"| `{key.name}` | {_escaped(key.rule.help)} | {value} | {default} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, inside a table."""
    for sign, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;")):
        text = text.replace(sign, shown)
    return text


def with_tables(page: str) -> str:
    """The page with its tables made anew. Raises ValueError when the markers are not there, once and in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{README.name} must have {BEGIN} and {END}, once each")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing, tell whether the page is right")
    check = parser.parse_args(arguments).check
    old = README.read_text(encoding="utf-8")
    new = with_tables(old)
    if check and new != old:
        print(f"{README.name} is not what the config classes say; run: make readme-keys", file=sys.stderr)
        return 1
    if not check:
        README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
