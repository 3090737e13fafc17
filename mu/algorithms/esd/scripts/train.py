"""Make the model forget a concept by turning its own guidance against it, without images (ESD)."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.esd.configs import ESDConfig
from mu.bars import loading
from mu.cli import Planned, run_door
from mu.commands.answers import trained


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        ESDConfig,
        _run,
        module=ESDConfig.MODULE,
        summary=str(__doc__),
        examples=[(ESDConfig.MODULE, "--config_path emoji_canvas/esd_style.yaml")],
        argv=argv,
        answer=trained,
        shares_work=True,
        plan=_plan,
    )


def _run(config: ESDConfig) -> object:
    with loading():
        from mu.algorithms.esd.algorithm import ESDAlgorithm
        from mu.evaluation.report import with_report

    return with_report(ESDAlgorithm(config).run(), config)


def _plan(config: ESDConfig) -> Planned:
    with loading():
        from mu.algorithms.esd.algorithm import ESDAlgorithm

    return ESDAlgorithm(config).plan()


if __name__ == "__main__":
    raise SystemExit(main())
