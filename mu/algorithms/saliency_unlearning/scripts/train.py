"""SalUn, stage 2: make the model forget a concept by training only the weights in its mask."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.saliency_unlearning.configs.unlearning import MASK_MODULE
from mu.bars import loading
from mu.cli import Planned, run_door
from mu.commands.answers import trained

MODULE = "mu.algorithms.saliency_unlearning.scripts.train"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        TrainConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[
            (MASK_MODULE, "--config_path emoji_canvas/mask_style.yaml"),
            (MODULE, "--config_path emoji_canvas/train_style.yaml"),
        ],
        argv=argv,
        answer=trained,
        shares_work=True,
        plan=_plan,
    )


def _run(config: TrainConfig) -> object:
    with loading():
        from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
        from mu.evaluation.report import with_report

    return with_report(SaliencyUnlearningAlgorithm(config).run(), config)


def _plan(config: TrainConfig) -> Planned:
    with loading():
        from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm

    return SaliencyUnlearningAlgorithm(config).plan()


if __name__ == "__main__":
    raise SystemExit(main())
