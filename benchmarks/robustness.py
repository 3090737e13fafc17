"""The scoreboard of robustness: what attacks bring back of each concept, by the method that made a model forget it.

python -m benchmarks.robustness --config_path benchmarks/emoji_canvas_robustness.yaml    # goes on where it stopped
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.robustness_config import RobustnessConfig
from mu.cli import run_door


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    summary = str(__doc__).partition("\n")[0]
    return run_door(RobustnessConfig, _run, module="benchmarks.robustness", summary=summary, argv=argv)


def _run(config: RobustnessConfig) -> object:
    from benchmarks import robustness_table

    return robustness_table.run(config)


if __name__ == "__main__":
    raise SystemExit(main())
