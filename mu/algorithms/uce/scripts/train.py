"""Make the model forget a concept by editing its cross-attention keys and values, in seconds and without training."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.uce.configs import MODULE, UCEConfig
from mu.cli import Planned, run_door


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(UCEConfig, _run, module=MODULE, summary=str(__doc__), argv=argv, plan=_plan)


def _run(config: UCEConfig) -> object:
    from mu.algorithms.uce.algorithm import UCEAlgorithm

    return UCEAlgorithm(config).run()


def _plan(config: UCEConfig) -> Planned:
    from mu.algorithms.uce.algorithm import UCEAlgorithm

    return UCEAlgorithm(config).plan()


if __name__ == "__main__":
    raise SystemExit(main())
