"""The results table: forget every style and every object in turn; goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.saliency_unlearning.configs import BenchmarkConfig
from mu.cli import run_door

MODULE = "mu.algorithms.saliency_unlearning.scripts.benchmark_unlearning"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(BenchmarkConfig, _run, module=MODULE, summary=str(__doc__), argv=argv)


def _run(config: BenchmarkConfig) -> object:
    from mu.algorithms.saliency_unlearning import benchmark

    return benchmark.run(config)


if __name__ == "__main__":
    raise SystemExit(main())
