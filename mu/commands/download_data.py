"""download_data sample|full quick_canvas|unlearn_canvas|i2p: a data set into its folder below data/."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mu.commands.door import download_parser, one_of, run_download
from mu.commands.sources import DATA, DATA_ALIASES, SIZES


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = download_parser(
        "download_data",
        "Downloads a data set into its folder",
        list(DATA.values()),
        example="sample quick_canvas",
        note="unlearn_canvas is another name of quick_canvas.\n",
    )
    names = list(dict.fromkeys(name for _, name in DATA))
    allowed = f"{', '.join(names)}, or unlearn_canvas"
    parser.add_argument("size", type=one_of(SIZES), help="sample (a few images of each concept) or full")
    parser.add_argument("dataset", type=one_of(names, DATA_ALIASES), help=allowed)
    arguments = parser.parse_args(argv)
    return run_download(DATA[arguments.size, arguments.dataset], arguments)


if __name__ == "__main__":
    sys.exit(main())
