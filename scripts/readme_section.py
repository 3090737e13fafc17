"""A part of README.md, or another page, between two markers, made by a script: written, or checked for what it says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def with_section(page: str, name: str, content: str) -> str:
    """The page with `content` between its markers. Raises ValueError when they are not there, once and in order."""
    begin_mark, end_mark = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = page.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end or begin_mark in after or end_mark in after:
        raise ValueError(f"the page must have {begin_mark} and {end_mark}, once each")
    return f"{before}{begin_mark}\n{content}\n{end_mark}{after}"


def run(
    name: str,
    make: Callable[[], str],
    *,
    description: str | None,
    advice: str,
    arguments: Sequence[str] | None,
    path: Path = README,
) -> int:
    """The command of such a script; returns its exit code. `advice` follows the message that the page is wrong."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing, tell whether the page is right")
    check = parser.parse_args(arguments).check
    old = path.read_text(encoding="utf-8")
    new = with_section(old, name, make())
    if check and new != old:
        print(f"{path.name} is not {advice}", file=sys.stderr)
        return 1
    if not check:
        path.write_text(new, encoding="utf-8")
    return 0
