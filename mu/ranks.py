"""The processes of one run, one for each device: which of them this is, and what they exchange.

A run of one process is alone: there is one rank, 0, and every exchange gives back what went in. Of several, each is
started by `mu.launch`, torchrun or srun, and between `joined` and its end they are a group, which Lightning Fabric
makes. All of them then have to come to each exchange, in the same order: what one alone may meet, an error too, is told
to the others (`on_main`, `in_step`). torch and Fabric are imported only where there are several.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mu.errors import MuError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import Tensor

T = TypeVar("T")
_BUCKET_BYTES = 64 << 20
"""Tensors that are summed together: few exchanges, bounded extra memory."""
_TIMEOUT = timedelta(hours=24)
"""For one exchange: while one process measures, the others wait. Who started them sees to it if one has died."""
_SLURM_SPECIAL_STEPS = 0xFFFFFFF0
"""From this number on, a step is no `srun`: the batch script, an interactive prompt."""


class RankError(MuError, RuntimeError):
    """The processes of a run cannot work together, or one of them has failed."""


class _Place(NamedTuple):
    """Where this process stands among those of its run, in all and on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


_ALONE = _Place(0, 1, 0, 1)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Environment variables of torchrun, in the order of `_Place`."""
_place = _ALONE
_fabric: Fabric | None = None
"""While this process is `joined` with others."""
_made_group = False


# Which process this is


def rank() -> int:
    """Which process this is, 0 to world_size - 1."""
    return _place.rank


def world_size() -> int:
    """How many processes the run has."""
    return _place.world_size


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return _place.local_rank


def is_main() -> bool:
    """Whether this is the process that writes files and speaks: rank 0."""
    return _place.rank == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that are this process' part: every world_size-th."""
    return items[_place.rank :: _place.world_size]


def within_share(first: int, size: int) -> slice:
    """Where in all items those from the `first` on of this process' share are, at most `size` of them."""
    start = _place.rank + first * _place.world_size
    return slice(start, start + size * _place.world_size, _place.world_size)


def largest_share(count: int) -> int:
    """How many of so many items are in the largest of the processes' shares."""
    return -(-count // _place.world_size)


# What the processes exchange


def sum_(tensors: Iterable[Tensor]) -> None:
    """All-reduce: add up tensors over all processes, in place; afterwards all have the same bits.

    Args:
        tensors: dense, on one device; of the same shapes and dtypes, in the same order, in every process.
    """
    if _fabric is None:
        return
    import torch

    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            bucket[0].copy_(_summed(_fabric, bucket[0]))
            continue
        flat = _summed(_fabric, torch.cat([tensor.reshape(-1) for tensor in bucket]))  # (n,)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _summed(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The sum, in the tensor itself where that is on the group's device."""
    summed = fabric.all_reduce(tensor, reduce_op="sum")
    return summed  # type: ignore[return-value]  # a tensor for a tensor


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and (filled + tensor.nbytes > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


def gathered(value: T) -> list[T]:
    """All-gather: the values of all processes, by rank. They have to be small, and of kinds that pickle."""
    if _fabric is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _place.world_size
    dist.all_gather_object(values, value)  # Fabric gathers tensors of one shape alone
    return values


def together(mine: Sequence[T]) -> list[T]:
    """What all processes made of their `share` of some items, in the order of the items; pickled, as by `gathered`."""
    parts = gathered(mine)
    return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


def from_main(value: T) -> T:
    """Broadcast: the main process' value. It has to be small, and of a kind that pickles."""
    return value if _fabric is None else _fabric.broadcast(value)


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, for all; the others wait. An error of it is raised in all of them.

    Raises:
        MuError: `work` raised it.
    """
    if _fabric is None:
        return work()
    outcome: tuple[T | None, MuError | None] = (None, None)
    if is_main():
        try:
            outcome = work(), None
        except MuError as error:
            outcome = None, sendable(error)
    value, failed = from_main(outcome)
    if failed is not None:
        raise _of_all(failed)
    return value  # type: ignore[return-value]


@contextmanager
def in_step() -> Iterator[None]:
    """A part of the work that each process does for itself: at its end all wait, and an error of one is raised in all.

    Raises:
        MuError: the first one of them, by rank.
    """
    if _fabric is None:
        yield
        return
    failed: MuError | None = None
    try:
        yield
    except MuError as error:
        failed = sendable(error)
    for theirs in gathered(failed):
        if theirs is not None:
            raise _of_all(theirs)


def _of_all(error: MuError) -> MuError:
    error.in_all_processes = True
    return error


def sendable(error: MuError) -> MuError:
    """An error that survives the way between processes: itself, or its text in a RankError."""
    try:
        pickle.loads(pickle.dumps(error))
    except (TypeError, AttributeError, pickle.PicklingError):
        return RankError(str(error))
    return error


# What was started together, by the environment alone: also what comes before `joined` can tell


def started_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank that torchrun, srun or `mu.launch` gave to this process; 0 for one that stands alone."""
    return _started(environ).rank


def started_local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Which of the processes that were started together on this machine this is."""
    return _started(environ).local_rank


def started_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun, srun or `mu.launch` started together with this one, itself included."""
    return _started(environ).world_size


def _started(environ: Mapping[str, str] = os.environ) -> _Place:
    if "TORCHELASTIC_RUN_ID" in environ:
        return _Place(*(int(environ[name]) for name in _TORCHRUN))
    # Outside of a step of srun, SLURM tells of tasks too: of those that the script of sbatch may yet start. Fabric's
    # own SLURMEnvironment takes them for started, and refuses steps that were not told --ntasks-per-node.
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if step is None or int(step) >= _SLURM_SPECIAL_STEPS or "SLURM_PTY_PORT" in environ:
        return _ALONE
    if (tasks := int(environ.get("SLURM_STEP_NUM_TASKS", 1))) == 1:
        return _ALONE
    each = environ["SLURM_STEP_TASKS_PER_NODE"]  # such as 4, or 4(x2) for two nodes
    if "," in each:  # as in 2,1: every process is taken for one of a node of its own
        return _Place(int(environ["SLURM_PROCID"]), tasks, 0, 1)
    return _Place(
        int(environ["SLURM_PROCID"]), tasks, int(environ["SLURM_LOCALID"]), int(each.partition("(")[0])
    )


def is_grouped() -> bool:
    """Whether this process is one of several that run together, in `joined` or before it."""
    return _fabric is not None or started_world_size() > 1 or _callers_group() is not None


def _callers_group() -> _Place | None:
    """The group of torch.distributed that is there already, if it is one of several processes."""
    if "torch.distributed" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return _Place(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


# The group


@contextmanager
def joined(devices: Sequence[str]) -> Iterator[None]:
    """Be one of the processes that were started together, until the block ends. One that stands alone stays so.

    Within another `joined` the group is the one there is; so it is where the caller has set up torch.distributed, and
    in a second block: the group stays when the first one ends, until `leave`. Where it met, it could not meet again;
    and after an error, which the others may not know of, to part from them in order would be to wait for them.

    Args:
        devices: of the processes of one machine, in their order; or a single one that each of them finds for itself.

    Raises:
        RankError: there are not as many devices as processes on this machine, machines have different numbers of
            processes, or two processes share a GPU.
    """
    global _place, _fabric, _made_group
    theirs = _callers_group()
    place = _started() if started_world_size() > 1 else theirs or _ALONE
    if _fabric is not None or place == _ALONE:
        yield
        return
    with _described(place):
        _fabric, _place = _group_of(place, devices), place
        _made_group = _made_group or theirs is None
        try:
            yield
        finally:
            _fabric, _place = None, _ALONE


def leave() -> None:
    """Part from the group, if `joined` has made one; at the end of a process, when all have done their work."""
    global _made_group
    if _made_group:
        import torch.distributed as dist

        _made_group = False
        dist.destroy_process_group()


def _group_of(place: _Place, devices: Sequence[str]) -> Fabric:
    """Fabric sets this process' device and number of threads, and makes the group if there is none."""
    import torch
    import torch.distributed as dist
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    if len(devices) not in (1, place.local_world_size):
        raise RankError(
            f"devices: {','.join(devices)} names {len(devices)} devices for {place.local_world_size} processes on this "
            "machine; name one for each process, or a single one where each process sees only its own"
        )
    if place.world_size % place.local_world_size:
        raise RankError(
            f"{place.world_size} processes, {place.local_world_size} of them on this machine: start as many on each"
        )
    is_cuda = "cpu" not in devices and torch.cuda.is_available()
    each = [
        torch.device("cuda", int(name.removeprefix("cuda:"))) if is_cuda else torch.device("cpu")
        for name in devices
    ]
    # What Fabric announces is not for the console. Where pytorch_lightning has been imported, it speaks for both.
    for name in ("lightning_fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator="cuda" if is_cuda else "cpu",
        num_nodes=place.world_size // place.local_world_size,
        strategy=DDPStrategy(
            parallel_devices=each * (place.local_world_size // len(each)),
            cluster_environment=TorchElasticEnvironment(),  # reads what `_described` has set
            # Objects go over the CPU: who waits for another process keeps no GPU busy.
            process_group_backend="cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            timeout=_TIMEOUT,
        ),
    )
    try:
        fabric.launch()
        fabric.all_reduce(torch.zeros(1, device=fabric.device))  # NCCL connects, and looks at the GPUs
    except dist.DistBackendError as error:
        if "Duplicate GPU" in str(error):  # NCCL's words
            raise RankError(
                "devices: two processes have the same GPU; name one for each, as in devices: 0,1"
            ) from error
        raise
    return fabric


@contextmanager
def _described(place: _Place) -> Iterator[None]:
    """While it lasts, the environment says this process' place as torchrun does: that is where Fabric reads it."""
    said = dict(zip(_TORCHRUN, map(str, place), strict=True))
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_JOB_ID" in os.environ:
        from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

        # Where the processes meet follows from the step's nodes and from the job and step, unless it is set.
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
        number = int(os.environ["SLURM_JOB_ID"]) + 1000 * int(os.environ.get("SLURM_STEP_ID", "0"))
        said["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(nodes)
        said["MASTER_PORT"] = str(15_000 + number % 10_000)
        said |= {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    before = {name: os.environ.get(name) for name in said}
    os.environ |= said
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
