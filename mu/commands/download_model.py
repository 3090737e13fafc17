"""download_model compvis|diffuser|classifier: models and classifiers into their folders below models/."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mu.commands.door import download_parser, one_of, run_download
from mu.commands.sources import MODELS


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = download_parser(
        "download_model",
        "Downloads a model, or the classifiers, into its folder",
        list(MODELS.values()),
        example="compvis",
    )
    parser.add_argument("model", type=one_of(list(MODELS)), help=", ".join(MODELS))
    arguments = parser.parse_args(argv)
    return run_download(MODELS[arguments.model], arguments)


if __name__ == "__main__":
    sys.exit(main())
