"""The processes of one run, one for each device: which of them this is, and what they tell each other.

A run of one process is alone: there is one rank, 0, and every exchange gives back what went in. `mu.launch`, torchrun
and SLURM start several; between `joined` and its end they are a group. All of them then have to come to each exchange,
in the same order: what one alone may meet, an error too, is told to the others (`on_main`, `in_step`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mu.errors import MuError

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class _Place:
    """Where this process stands in its group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


_ALONE = _Place(0, 1, 0, 1)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Environment variables of torchrun, in the order of `_Place`."""
_place = _ALONE
_made = False
"""Whether the group of torch.distributed is of `joined`."""


def rank() -> int:
    """Which process this is, 0 to world_size - 1."""
    return _place.rank


def world_size() -> int:
    """How many processes the run has."""
    return _place.world_size


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return _place.local_rank


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return _place.local_world_size


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


def sum_(tensors: Iterable[Tensor]) -> None:
    """Add up tensors over all processes, in place; afterwards all have the same bits.

    Args:
        tensors: dense, on one device; of the same shapes and dtypes, in the same order, in every process.
    """
    if _place.world_size == 1:
        return
    import torch
    import torch.distributed as dist

    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])  # (n,)
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank. They have to be small, and of kinds that pickle."""
    if _place.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _place.world_size
    dist.all_gather_object(values, value)
    return values


def together(mine: Sequence[T]) -> list[T]:
    """What all processes made of their `share` of some items, in the order of the items; pickled, as by `gathered`."""
    parts = gathered(mine)
    return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


def from_main(value: T) -> T:
    """The main process' value. It has to be small, and of a kind that pickles."""
    if _place.world_size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, for all; the others wait. An error of it is raised in all of them.

    Raises:
        MuError: `work` raised it.
    """
    if _place.world_size == 1:
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
    if _place.world_size == 1:
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
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except (TypeError, AttributeError, pickle.PicklingError):
        return RankError(str(error))
    return error


def started_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank that torchrun, SLURM or `mu.launch` gave to this process; 0 for one that stands alone.

    Reads the environment alone, so that also what comes before `joined` can tell.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return int(environ["RANK"])
    return int(environ.get("SLURM_PROCID", 0)) if _slurm_tasks(environ) > 1 else 0


def started_local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Which of the processes that were started together on this machine this is."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return int(environ["LOCAL_RANK"])
    return int(environ.get("SLURM_LOCALID", 0)) if _slurm_tasks(environ) > 1 else 0


def started_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun, SLURM or `mu.launch` started together with this one, itself included.

    Reads the environment alone.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return int(environ["WORLD_SIZE"])
    return _slurm_tasks(environ)


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """The tasks of this `srun`; 1 outside of one, as in the script of sbatch or at an interactive prompt."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if step is None or int(step) >= _SLURM_SPECIAL_STEPS or "SLURM_PTY_PORT" in environ:
        return 1
    return int(environ.get("SLURM_STEP_NUM_TASKS", 1))


@contextmanager
def joined(devices: Sequence[str]) -> Iterator[None]:
    """Be one of the processes that were started together, until the block ends. One that stands alone stays so.

    Within another `joined` the group is the one there is; so it is where the caller has set up torch.distributed, and
    in a second block: the group stays when the first one ends, until `leave`. Where it met, it could not meet again;
    and after an error, which the others may not know of, to part from them in order would be to wait for them.

    Args:
        devices: of the processes of one machine, in their order; or a single one that each of them finds for itself.

    Raises:
        RankError: there are not as many devices as processes on this machine, or two processes share a GPU.
    """
    global _place
    theirs = _callers_group()
    if _place is not _ALONE or (theirs is None and started_world_size() == 1):
        yield
        return
    place = theirs or (_place_in_torchrun() if "TORCHELASTIC_RUN_ID" in os.environ else _place_in_slurm())
    _start_group(place, devices, init=theirs is None)
    _place = place
    try:
        yield
    finally:
        _place = _ALONE


def leave() -> None:
    """Part from the group, if `joined` has made one; at the end of a process, when all have done their work."""
    global _made
    if _made:
        import torch.distributed as dist

        _made = False
        dist.destroy_process_group()


def is_grouped() -> bool:
    """Whether this process is one of several that run together, in `joined` or before it."""
    return _place is not _ALONE or started_world_size() > 1 or _callers_group() is not None


def _callers_group() -> _Place | None:
    """The group that the caller has set up, if there is one of several processes."""
    if "torch.distributed" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return _Place(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def _start_group(place: _Place, devices: Sequence[str], *, init: bool) -> None:
    global _made
    import torch
    import torch.distributed as dist

    if len(devices) not in (1, place.local_world_size):
        raise RankError(
            f"devices: {','.join(devices)} names {len(devices)} devices for {place.local_world_size} processes on this "
            "machine; name one for each process, or a single one where each process sees only its own"
        )
    os.environ |= {
        name: str(value) for name, value in zip(_TORCHRUN, astuple(place), strict=True)
    }  # for Lightning
    device = devices[place.local_rank if len(devices) > 1 else 0]
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(device.removeprefix("cuda:")))
    elif (
        "OMP_NUM_THREADS" not in os.environ
    ):  # each would take all cores, and they would be in each other's way
        torch.set_num_threads(max(1, _cores() // place.local_world_size))
    if init:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, rank=place.rank, world_size=place.world_size, timeout=_TIMEOUT
        )  # finds the others through MASTER_ADDR and MASTER_PORT
        _made = True
    elif "cpu" not in str(dist.get_backend_config()):
        raise RankError(
            "the group that is there exchanges tensors of GPUs alone; set it up with "
            'init_process_group("cpu:gloo,cuda:nccl")'
        )
    if cuda:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        uuids: list[Any] = [None] * place.world_size
        dist.all_gather_object(uuids, uuid)
        if uuids.count(uuid) > 1:
            raise RankError("devices: two processes have the same GPU; name one for each, as in devices: 0,1")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place_in_torchrun() -> _Place:
    return _Place(*(int(os.environ[name]) for name in _TORCHRUN))


def _place_in_slurm() -> _Place:
    """As `srun` tells it. Where the processes meet follows from the step's nodes and the job, unless it is set."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    os.environ.setdefault("MASTER_PORT", str(15_000 + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])))
    # Tasks on each node, such as 4, or 4(x2) for two nodes; the first number is this node's where they are equal.
    here = os.environ["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0].partition(",")[0]
    return _Place(started_rank(), started_world_size(), started_local_rank(), int(here))


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
