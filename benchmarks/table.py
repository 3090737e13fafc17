"""The results table: forget every style and every object in turn by each method; goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.table_config import TableConfig
from mu.cli import run_door


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(TableConfig, _run, module="benchmarks.table", summary=str(__doc__), argv=argv)


def _run(config: TableConfig) -> object:
    from benchmarks import results_table

    return results_table.run(config)


if __name__ == "__main__":
    raise SystemExit(main())
