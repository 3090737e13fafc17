"""Draw images of prompts from a checkpoint."""

from __future__ import annotations

from mu.commands.sample import MODULE, main

__all__ = ["MODULE", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
