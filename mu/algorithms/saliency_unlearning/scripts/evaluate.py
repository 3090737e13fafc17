"""Measure what a checkpoint forgot and what it kept: sample every prompt, classify, count."""

from __future__ import annotations

from mu.commands.evaluate import MODULE, main

__all__ = ["MODULE", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
