"""Make the model forget a concept by editing its cross-attention keys and values, in seconds and without training."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.uce.configs import MODULE, UCEConfig
from mu.commands.method_door import run_method


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_method(
        UCEConfig,
        "mu.algorithms.uce.algorithm:UCEAlgorithm",
        module=MODULE,
        summary=str(__doc__),
        examples=[(MODULE, "--config_path emoji_canvas/uce_style.yaml")],
        argv=argv,
        shares_work=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
