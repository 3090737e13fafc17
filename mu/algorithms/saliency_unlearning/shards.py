"""The UNet's weights split over the processes of a run: fully sharded data parallelism (Zhao et al. 2023), by torch.

Of every tensor, a process has some consecutive rows: the rank-th piece of ceil(rows / processes) rows; the last pieces
may be shorter, or empty. So have gradients, and what the optimizer keeps. For its pass, a block of the UNet gets its
whole weights from all processes, and gives them up again: all of them have to go through the UNet equally often.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mu import ranks
from mu.ldm import LatentDiffusion
from mu.ldm.unet import UNet

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@contextmanager
def sharded(ldm: LatentDiffusion) -> Iterator[None]:
    """Until the block ends, this process has only its rows of the UNet's weights.

    Meanwhile `ldm.unet` is another module with the same names, of which each parameter is a DTensor; gradients come
    summed over the processes. At the end the weights are whole again where they were; after an error, which some of
    the processes may not know of, the model is left without.

    Args:
        ldm: the same in every process; its UNet's weights contiguous, all of one dtype.
    """
    plain = ldm.unet
    place = next(plain.parameters()).device
    twin = _split(plain, ldm.device)
    ldm.model["diffusion_model"] = twin
    # Autocast would keep a bf16 copy of every block's whole weights until its own block ends.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        ldm.model["diffusion_model"] = plain
    for whole, part in zip(plain.parameters(), twin.parameters(), strict=True):
        whole.data = whole_of(local(part.detach()), part).to(place)


def _split(plain: UNet, device: torch.device) -> UNet:
    """A copy of the UNet that has this process' rows of its weights; `plain` is left without any."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    twin = copy.deepcopy(plain, {id(parameter): parameter for parameter in plain.parameters()})
    for block, original in zip(_blocks(twin), _blocks(plain), strict=True):
        fully_shard(block, mesh=mesh)
        for parameter in original.parameters():
            parameter.data = parameter.data.new_empty(0)
    fully_shard(twin, mesh=mesh)
    for module in twin.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)
    return twin


def _sum_gradients(module: FSDPModule) -> None:
    """Gradients are to be the sum of the processes', not their mean. Releases of torch differ in how to say so."""
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide
    if hasattr(module, "set_gradient_divide_factor"):
        module.set_gradient_divide_factor(1.0)
    else:
        module.set_reduce_scatter_divide_factor(1.0)


def _blocks(unet: UNet) -> Iterable[nn.Module]:
    return [unet.time_embed, *unet.input_blocks, unet.middle_block, *unet.output_blocks, unet.out]


def is_sharded(unet: nn.Module) -> bool:
    """Whether of this network's weights, a process has only its rows."""
    return any(map(is_shard, unet.parameters()))


def is_shard(tensor: Tensor) -> bool:
    """Whether of this tensor, a process has only its rows."""
    return hasattr(tensor, "full_tensor")  # a DTensor, without importing what makes them


def local(tensor: Tensor) -> Tensor:
    """This process' rows of a sharded tensor, sharing their memory; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def own_rows(whole: Tensor) -> Tensor:
    """A view of the rows that this process has of a tensor once it is sharded."""
    most = -(-len(whole) // ranks.world_size())
    return whole[ranks.rank() * most : (ranks.rank() + 1) * most]


def rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, the rows that this process has of `like`: all of them where that is not sharded."""
    return own_rows(whole) if is_shard(like) else whole


def whole_of(rows: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, in every process, of rows cut as those of `like`; they themselves where that is not sharded."""
    if not is_shard(like):
        return rows
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, like.stride()
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, shape=shape, stride=stride
    ).full_tensor()


def joined_on_main(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of all processes put together, in the order of the ranks, on the CPU; in the main process alone.

    What was picked row by row from sharded tensors is then in the order of the whole ones.

    Args:
        parts: name -> (n,), of the same names and dtypes, in the same order, in every process.

    Returns:
        name -> (sum of n,); nothing in the other processes.
    """
    import torch.distributed as dist

    counts = ranks.gathered([len(part) for part in parts.values()])  # by rank, then by vector
    joined = {}
    for place, (name, part) in enumerate(parts.items()):
        if not ranks.is_main():
            if len(part):
                dist.send(part.detach().cpu().contiguous(), 0)
            continue
        pieces = [part.detach().cpu()]
        for source in range(1, ranks.world_size()):
            pieces.append(torch.empty(counts[source][place], dtype=part.dtype))
            if len(pieces[-1]):
                dist.recv(pieces[-1], source)
        joined[name] = torch.cat(pieces)
    return joined


def places_in_joined(counts: Sequence[int]) -> list[slice]:
    """Where in the vectors of `joined_on_main` this process' parts are.

    Args:
        counts: their lengths in this process.
    """
    places = []
    for here in zip(*ranks.gathered(list(counts)), strict=True):  # of a vector, by rank
        start = sum(here[: ranks.rank()])
        places.append(slice(start, start + here[ranks.rank()]))
    return places


def whole_mask(mask: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole mask, on the CPU, from every process' rows of it; in the main process alone.

    Args:
        mask: name -> bool tensor, this process' rows.
        like: name -> a tensor of the whole shape.
    """
    bits = joined_on_main({name: marked.reshape(-1).view(torch.uint8) for name, marked in mask.items()})
    return {name: flat.view(torch.bool).view(like[name].shape) for name, flat in bits.items()}


def joined_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer on sharded parameters, as one of the whole ones has it; in the main process alone.

    Args:
        state: `state_dict()` of an optimizer whose tensors are vectors of each parameter's entries, or single numbers.
    """
    vectors = {
        f"{index}/{key}": value
        for index, values in state["state"].items()
        for key, value in values.items()
        if value.dim()
    }
    joined = joined_on_main(vectors)
    whole = {
        index: {key: joined.get(f"{index}/{key}", value) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": whole}


def cut_state(state: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """This process' part of what `joined_state` gave.

    Args:
        counts: how many entries of each parameter this process has, by the parameter's index.
    """
    places = places_in_joined(counts)
    part = {
        index: {key: value[places[index]] if value.dim() else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": part}
