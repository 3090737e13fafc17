"""How much a command says on the console: its log lines and progress bars. Files of a run are not affected."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mu.ranks import started_rank

LEVELS = ("debug", "info", "warning", "error")
"""Of the console; `debug` also prints the settings, and gives errors their traceback."""

_level, _quiet, _json = "info", False, False


@contextmanager
def verbosity(log_level: str = "info", *, quiet: bool = False, json: bool = False) -> Iterator[None]:
    """While it lasts, the console gets log lines from `log_level` on.

    Of the processes of a run the first one speaks; from the others come errors alone.

    Args:
        quiet: no progress bars, and of the log lines only warnings and errors.
        json: no progress bars, and nothing but the result, as JSON, on stdout.
    """
    global _level, _quiet, _json
    logger = logging.getLogger("mu")
    before = _level, _quiet, _json, logger.level
    if started_rank() > 0:
        log_level, quiet = "error", True
        logger.setLevel(logging.ERROR)  # Python itself prints warnings that nobody handles
    _level = "warning" if quiet and log_level in ("debug", "info") else log_level
    _quiet, _json = quiet, json
    try:
        yield
    finally:
        _level, _quiet, _json, level = before
        logger.setLevel(level)


def console_level() -> int:
    """The level of the console's log lines, as `logging` counts."""
    return int(getattr(logging, _level.upper()))


def is_quiet() -> bool:
    """Whether notes are left out."""
    return _quiet


def is_json() -> bool:
    """Whether stdout is for the result alone, as JSON."""
    return _json


def bars_off() -> bool:
    """Whether nothing is said of settings and progress."""
    return _quiet or _json
