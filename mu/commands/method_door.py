"""The command of a method, made from its config class and its algorithm."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mu.bars import loading
from mu.cli import Planned, run_door
from mu.commands.answers import trained
from mu.console import Answer
from mu.unlearning.config import RunKeys

C = TypeVar("C", bound=RunKeys)


def run_method(
    config_class: type[C],
    algorithm: str,
    *,
    module: str,
    summary: str,
    examples: Sequence[tuple[str, str]] = (),
    argv: Sequence[str] | None = None,
    answer: Callable[[C, Any, str | None], Answer] = trained,
    reports: bool = False,
    shares_work: bool = True,
) -> int:
    """The whole command, with `--dry_run`; returns its exit code.

    Args:
        algorithm: the `mu.unlearning.method.Method`, as "module:class". It is imported when the settings are known to
            be right, so that mistakes and help come without the wait.
        module, summary, examples, argv, answer, shares_work: see `mu.cli.run_door`.
        reports: a run ends with report.html where the config asks for it.
    """

    def made(config: C) -> Any:
        place, _, name = algorithm.partition(":")
        with loading():
            return getattr(importlib.import_module(place), name)(config)

    def run(config: C) -> object:
        method = made(config)
        if not reports:
            return method.run()
        with loading():
            from mu.evaluation.report import with_report

        return with_report(method.run(), config)  # type: ignore[arg-type]

    def plan(config: C) -> Planned:
        planned: Planned = made(config).plan()
        return planned

    return run_door(
        config_class,
        run,
        module=module,
        summary=summary,
        examples=examples,
        argv=argv,
        shares_work=shares_work,
        plan=plan,
        answer=answer,
    )
