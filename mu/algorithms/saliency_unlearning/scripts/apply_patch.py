"""Put patches on a checkpoint, or take them off again. A patch is what a training run changed, and nothing else."""

from __future__ import annotations

from mu.commands.apply_patch import MODULE, main

__all__ = ["MODULE", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
