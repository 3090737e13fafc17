"""download_model compvis|diffuser|classifier: models and classifiers into their folders below models/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mu.commands.door import EPILOG, add_options, one_of, run
from mu.commands.sources import MODELS
from mu.console import ArgumentParser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    lines = [f"  {source.name:<14}{source.folder}" for source in MODELS.values()]
    parser = ArgumentParser(
        prog="download_model",
        description="Downloads a model, or the classifiers, into its folder: resumed, checked, and only once.",
        epilog="\n".join(["folders:", *lines, "", EPILOG]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=one_of(list(MODELS)), help=", ".join(MODELS))
    add_options(parser)
    arguments = parser.parse_args(argv)
    return run(MODELS[arguments.model], arguments)


if __name__ == "__main__":
    sys.exit(main())
