"""Make the model forget a concept by turning its own guidance against it, without images (ESD)."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.esd.configs import ESDConfig
from mu.commands.method_door import run_method


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_method(
        ESDConfig,
        "mu.algorithms.esd.algorithm:ESDAlgorithm",
        module=ESDConfig.MODULE,
        summary=str(__doc__),
        examples=[(ESDConfig.MODULE, "--config_path emoji_canvas/esd_style.yaml")],
        argv=argv,
        reports=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
