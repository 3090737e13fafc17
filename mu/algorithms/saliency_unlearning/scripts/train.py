"""SalUn, stage 2: make the model forget a concept by training only the weights in its mask."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.saliency_unlearning.configs.unlearning import MASK_MODULE
from mu.commands.method_door import run_method

MODULE = "mu.algorithms.saliency_unlearning.scripts.train"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_method(
        TrainConfig,
        "mu.algorithms.saliency_unlearning.algorithm:SaliencyUnlearningAlgorithm",
        module=MODULE,
        summary=str(__doc__),
        examples=[
            (MASK_MODULE, "--config_path emoji_canvas/mask_style.yaml"),
            (MODULE, "--config_path emoji_canvas/train_style.yaml"),
        ],
        argv=argv,
        reports=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
