"""What the processes of tests do: functions of a module, since they are named to other processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from mu import ranks
from mu.config import ConfigError
from mu.devices import resolve_devices
from mu.errors import MuError


def exchanges(_: object) -> dict[str, Any]:
    """One of each exchange, with values that tell the processes apart."""
    mine = ranks.rank() + 1
    tensors = [torch.full((3, 2), float(mine)), torch.arange(4).float()[::2] * mine, torch.full((2,), mine)]
    ranks.sum_(tensors)
    ranks.barrier()
    return {
        "sums": [tensor.tolist() for tensor in tensors],
        "gathered": ranks.gathered((ranks.rank(), ranks.local_rank(), ranks.world_size())),
        "largest": ranks.largest(mine),
        "from_main": ranks.from_main(mine),
        "on_main": ranks.on_main(os.getpid),
        "pids": ranks.gathered(os.getpid()),
        "shares": ranks.gathered(list(ranks.share(range(5)))),
        "devices": ranks.gathered(resolve_devices("cpu,cpu")),
        "threads": ranks.gathered(torch.get_num_threads()),
    }


def main_fails(_: object) -> None:
    def fail() -> None:
        raise ConfigError(["lr: too large"])

    try:
        ranks.on_main(fail)
    except ConfigError as error:
        # Both have it, and both can still speak.
        raise MuError(f"{ranks.gathered(str(error))}") from None


def one_fails(path: str) -> None:
    with ranks.in_step():
        if ranks.rank() == 1:
            raise MuError("rank 1 cannot read its image")
        Path(path).write_text("done")


def one_fails_alone(_: object) -> None:
    if ranks.rank() == 1:
        raise MuError("only rank 1 knows")
    ranks.barrier()


def one_crashes(_: object) -> None:
    if ranks.rank() == 1:
        raise KeyError("surprise")
    ranks.barrier()


def one_is_killed(_: object) -> None:
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def wait_for_signal(path: str) -> None:
    """Until the process is stopped; `<path>-<rank>` says that it is ready, and holds its number."""
    ranks.barrier()
    Path(f"{path}-{ranks.rank()}").write_text(str(os.getpid()))
    time.sleep(120)
