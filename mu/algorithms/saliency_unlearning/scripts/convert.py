"""Convert a checkpoint to another format: convert INPUT OUTPUT [--key value ...]. No bit changes, but by --dtype."""

from __future__ import annotations

from mu.commands.convert import MODULE, main

__all__ = ["MODULE", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
