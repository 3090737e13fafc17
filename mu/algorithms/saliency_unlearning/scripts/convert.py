"""Write a checkpoint in the format of another tool. No bit of a weight changes, unless --dtype asks for it."""

from __future__ import annotations

from mu.commands.convert import MODULE, main

__all__ = ["MODULE", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
