"""Measure what a checkpoint forgot and what it kept: sample every prompt, classify, count."""

from __future__ import annotations

from collections.abc import Sequence

from mu.bars import loading
from mu.cli import run_door
from mu.commands.answers import evaluated
from mu.console import UCE_EXAMPLE
from mu.evaluation.config import EvaluateConfig

MODULE = "mu.algorithms.saliency_unlearning.scripts.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        EvaluateConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[
            UCE_EXAMPLE,
            (MODULE, "--config_path emoji_canvas/evaluate_style.yaml --ckpt_path outputs/uce --seeds 188"),
        ],
        argv=argv,
        answer=evaluated,
        shares_work=True,
    )


def _run(config: EvaluateConfig) -> object:
    with loading():
        from mu.evaluation import evaluation

    return evaluation.run(config)


if __name__ == "__main__":
    raise SystemExit(main())
