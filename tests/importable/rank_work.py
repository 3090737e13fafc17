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


def both_stages(configs: tuple[Any, Any]) -> dict[str, Any]:
    """A mask and a training run, and what each process has of their results."""
    from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm

    mask_config, train_config = configs
    masked = MaskingAlgorithm(mask_config).run()
    trained = SaliencyUnlearningAlgorithm(train_config, mask_path=str(masked["masks"][0.5])).run()
    return {
        "masked": masked,
        "trained": trained,
        "same": len(set(ranks.gathered(str((masked, trained))))) == 1,
    }


def whole_and_stopped_in_one(configs: tuple[Any, Any]) -> None:
    """Two training runs; of the second, process 1 alone is asked to stop, during its second step."""
    from mu.algorithms.saliency_unlearning import trainer
    from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm

    SaliencyUnlearningAlgorithm(configs[0]).run()
    whole, steps = trainer.salun_loss, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if ranks.rank() == 1 and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    trainer.salun_loss = stop
    SaliencyUnlearningAlgorithm(configs[1]).run()


def poisoned_in_one(config: Any) -> None:
    """A training run in which the loss is NaN in process 1 alone, at its second step."""
    from mu.algorithms.saliency_unlearning import trainer
    from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm

    whole, steps = trainer.salun_loss, []

    def poison(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        nan = float("nan") if ranks.rank() == 1 and len(steps) == 2 else 1.0
        return tuple(nan * term for term in whole(*args, **kwargs))

    trainer.salun_loss = poison
    SaliencyUnlearningAlgorithm(config).run()


def one_hangs(path: str) -> None:
    """Process 0 waits where no connection is; process 1 fails."""
    if ranks.rank() == 1:
        raise KeyError("surprise")
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)


def in_the_callers_group(place: tuple[int, str]) -> list[int]:
    """In a process that has set up torch.distributed by itself."""
    import torch.distributed as dist

    from mu.launch import on_ranks

    rank, rendezvous = place
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        return on_ranks(ranks.gathered, rank, "cpu,cpu")
    finally:
        assert dist.is_initialized(), "the caller's group is his to end"
        dist.destroy_process_group()
