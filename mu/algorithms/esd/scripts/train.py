"""Make the model forget a concept by turning its own guidance against it, without images (ESD)."""

from __future__ import annotations

from collections.abc import Sequence

from mu.algorithms.esd.configs import ESDConfig
from mu.cli import Planned, run_door
from mu.ranks import started_rank


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        ESDConfig,
        _run,
        module=ESDConfig.MODULE,
        summary=str(__doc__),
        argv=argv,
        shares_work=True,
        plan=_plan,
    )


def _run(config: ESDConfig) -> object:
    from mu.algorithms.esd.algorithm import ESDAlgorithm
    from mu.evaluation.report import report_training

    result = ESDAlgorithm(config).run()
    if config.report and started_rank() == 0:
        return {**result, "report": report_training(result["run"], show_unsafe=config.show_unsafe_pictures)}
    return result


def _plan(config: ESDConfig) -> Planned:
    from mu.algorithms.esd.algorithm import ESDAlgorithm

    return ESDAlgorithm(config).plan()


if __name__ == "__main__":
    raise SystemExit(main())
