"""Measure what a checkpoint forgot and what it kept: sample every prompt, classify, count."""

from __future__ import annotations

from collections.abc import Sequence

from mu.cli import run_door
from mu.evaluation.config import EvaluateConfig

MODULE = "mu.algorithms.saliency_unlearning.scripts.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        EvaluateConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        argv=argv,
        shares_work=True,
    )


def _run(config: EvaluateConfig) -> object:
    from mu.evaluation import evaluation

    return evaluation.run(config)


if __name__ == "__main__":
    raise SystemExit(main())
