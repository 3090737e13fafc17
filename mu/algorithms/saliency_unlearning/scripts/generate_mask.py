"""SalUn, stage 1: find the weights of the UNet that matter most for a concept, and write them as a mask."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.saliency_unlearning.configs import MaskConfig
from mu.commands.answers import masked
from mu.commands.method_door import run_method

MODULE = "mu.algorithms.saliency_unlearning.scripts.generate_mask"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_method(
        MaskConfig,
        "mu.algorithms.saliency_unlearning.algorithm:MaskingAlgorithm",
        module=MODULE,
        summary=str(__doc__),
        examples=[(MODULE, "--config_path emoji_canvas/mask_style.yaml")],
        argv=argv,
        answer=masked,
    )


if __name__ == "__main__":
    raise SystemExit(main())
