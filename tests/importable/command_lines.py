"""Command lines as a command reads them, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from mu.cli import _config, _read_arguments
from mu.config import Config

C = TypeVar("C", bound=Config)


def parse_cli(cls: type[C], argv: Sequence[str]) -> C:
    """The checked config of arguments. Raises ConfigError, and HelpAsked for `--help` or `-h`."""
    return _config(cls, _read_arguments(cls, argv))
