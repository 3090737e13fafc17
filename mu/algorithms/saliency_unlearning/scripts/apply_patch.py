"""Apply patches to a checkpoint, or remove them: apply_patch INPUT OUTPUT --patches PATCH [--key value ...]."""

from __future__ import annotations

from mu.commands.apply_patch import MODULE, main

__all__ = ["MODULE", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
