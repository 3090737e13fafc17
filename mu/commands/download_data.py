"""download_data sample|full quick_canvas|unlearn_canvas|i2p: a data set into its folder below data/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mu.commands.door import EPILOG, add_options, one_of, run
from mu.commands.sources import DATA, DATA_ALIASES, SIZES
from mu.console import ArgumentParser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = ArgumentParser(
        prog="download_data",
        description="Downloads a data set into its folder: resumed, checked, and only once.",
        epilog=_folders() + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = list(dict.fromkeys(name for _, name in DATA))
    parser.add_argument("size", type=one_of(SIZES), help="sample (a few images of each concept) or full")
    parser.add_argument(
        "dataset", type=one_of(names, DATA_ALIASES), help=f"{', '.join(names)}, or unlearn_canvas"
    )
    add_options(parser)
    arguments = parser.parse_args(argv)
    return run(DATA[arguments.size, arguments.dataset], arguments)


def _folders() -> str:
    lines = [f"  {source.name:<22}{source.folder}" for source in DATA.values()]
    return "\n".join(["folders:", *lines, "unlearn_canvas is another name of quick_canvas.", "", ""])


if __name__ == "__main__":
    sys.exit(main())
