"""Make the model forget a concept by editing its cross-attention keys and values, in seconds and without training."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.uce.configs import MODULE, UCEConfig
from mu.bars import loading
from mu.cli import Planned, run_door
from mu.commands.answers import trained


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        UCEConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[(MODULE, "--config_path emoji_canvas/uce_style.yaml")],
        argv=argv,
        answer=trained,
        plan=_plan,
    )


def _run(config: UCEConfig) -> object:
    with loading():
        from mu.algorithms.uce.algorithm import UCEAlgorithm

    return UCEAlgorithm(config).run()


def _plan(config: UCEConfig) -> Planned:
    with loading():
        from mu.algorithms.uce.algorithm import UCEAlgorithm

    return UCEAlgorithm(config).plan()


if __name__ == "__main__":
    raise SystemExit(main())
