"""SalUn, stage 1: find the weights of the UNet that matter most for a concept, and write them as a mask."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.saliency_unlearning.configs import MaskConfig
from mu.bars import loading
from mu.cli import Planned, run_door
from mu.commands.answers import masked

MODULE = "mu.algorithms.saliency_unlearning.scripts.generate_mask"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        MaskConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[(MODULE, "--config_path emoji_canvas/mask_style.yaml")],
        argv=argv,
        answer=masked,
        shares_work=True,
        plan=_plan,
    )


def _run(config: MaskConfig) -> object:
    with loading():
        from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm

    return MaskingAlgorithm(config).run()


def _plan(config: MaskConfig) -> Planned:
    with loading():
        from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm

    return MaskingAlgorithm(config).plan()


if __name__ == "__main__":
    raise SystemExit(main())
