"""The largest of a billion floats, exactly: radix selection on their bits, in chunks, beside the values a few MB.

The bits of non-negative floats, read as integers ("keys"), are in the order of the floats. Each pass over the values
counts one digit of the keys, the leading ones first, and so narrows down where the k-th largest lies, for several k at
once: 16 bits a pass with numpy and threads on the CPU; 11 on a GPU, whose shared memory holds so many counters, and
without waiting for it in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.mask_file import MaskError

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Entries that are looked at together: about what a cache holds, or enough to keep a GPU busy."""
_FEW = 1 << 12
"""Below this many digits of a chunk, counting them one by one is quicker than adding up a whole histogram."""
_WIDTHS = {
    ("cpu", torch.int32): (16, 16),
    ("cpu", torch.int64): (16, 16, 16, 16),
    ("other", torch.int32): (11, 11, 10),
    ("other", torch.int64): (12, 11, 11, 10, 10, 10),
}
"""Bits a pass, the leading ones first. The first digit must hold the sign and all of the exponent."""

_Counts = dict[int, Tensor]
"""The leading bits that some keys share -> (2^width,) how often each value of their next digit occurs."""
_Pieces = list[Tensor]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Edge:
    """Where the largest values end: those with a larger key are in, and those equal to it before position `cut`."""

    key: int
    cut: int


def find_edges(values: Mapping[str, Tensor], counts: Sequence[int]) -> list[Edge]:
    """For each of `counts`, the edge of that many largest values; of equal ones, the earlier are taken first.

    Args:
        values: name -> non-negative float tensor. Positions count through the tensors in this order, row-major.
        counts: each from 1 to the number of values.

    Raises:
        MaskError: a value is NaN, infinite or negative (named), or all are zero.
    """
    dtype = _key_dtype(values)
    on_cpu = _on_cpu(values.values())
    count_digits = _count_with_numpy if on_cpu else _count_with_torch
    prefixes = [0] * len(counts)  # the leading bits of each edge, as far as they are known
    ranks_left = list(counts)  # how many are to be taken among the keys with that prefix, largest first
    tied = [0] * len(counts)
    shift = dtype.itemsize * 8
    for number, width in enumerate(_WIDTHS["cpu" if on_cpu else "other", dtype]):
        shift -= width
        digits = count_digits(values, dtype, shift, width=width, prefixes=sorted(set(prefixes)))
        if number == 0:
            _refuse_unfit(values, digits[0], dtype, shift=shift)
        for i, rank in enumerate(ranks_left):
            count = digits[prefixes[i]]  # (2^width,)
            reached = count.flip(0).cumsum(0)  # (2^width,) how many keys have this digit or a larger one
            place = int(torch.searchsorted(reached, rank))
            digit = len(count) - 1 - place
            ranks_left[i] = rank - (int(reached[place - 1]) if place else 0)
            tied[i] = int(count[digit])
            prefixes[i] = prefixes[i] << width | digit
    edges = []
    for key, rank, all_tied in zip(prefixes, ranks_left, tied, strict=True):
        cut = sum(tensor.numel() for tensor in values.values())
        if rank < all_tied:
            cut = _find_cut(values, dtype, key, ties=rank) if rank else 0
        edges.append(Edge(key, cut))
    return edges


def mark(values: Mapping[str, Tensor], edges: Sequence[Edge], masks: Sequence[Mapping[str, Tensor]]) -> None:
    """Write into each of `masks` which values its edge takes in.

    Args:
        values: as `find_edges` saw them.
        masks: for each edge, name -> contiguous bool tensor of the value's shape and device; all of it is overwritten.
    """
    dtype = _key_dtype(values)

    def mark_stripe(worker: int, workers: int) -> None:
        outputs = [_chunks([mask[name] for name in values]) for mask in masks]
        for (start, pieces), *marked in islice(
            zip(_chunks(values.values()), *outputs, strict=True), worker, None, workers
        ):
            for edge, (_, parts) in zip(edges, marked, strict=True):
                _mark_chunk(_keys(pieces, dtype, fold=edge.key == 0), edge, start, out=parts)

    _in_stripes(mark_stripe, values)


def _mark_chunk(keys: Tensor, edge: Edge, start: int, *, out: _Pieces) -> None:
    joined = out[0] if len(out) == 1 else torch.empty(len(keys), dtype=torch.bool, device=keys.device)
    ties = min(max(edge.cut - start, 0), len(keys))  # how many of these entries lie before the cut
    if _on_cpu([keys]):  # numpy compares about three times as fast
        array, marked = keys.numpy(), joined.numpy()
        np.greater_equal(array[:ties], edge.key, out=marked[:ties])
        np.greater(array[ties:], edge.key, out=marked[ties:])
    else:
        torch.ge(keys[:ties], edge.key, out=joined[:ties])
        torch.gt(keys[ties:], edge.key, out=joined[ties:])
    if len(out) > 1:
        for piece, part in zip(out, joined.split([len(piece) for piece in out]), strict=True):
            piece.copy_(part)


def _find_cut(values: Mapping[str, Tensor], dtype: torch.dtype, key: int, *, ties: int) -> int:
    """The position after the `ties`-th entry that is equal to `key`."""
    if not _on_cpu(values.values()):
        return _find_cut_with_torch(values, dtype, key, ties=ties)
    for start, pieces in _chunks(values.values()):
        equal = _keys(pieces, dtype, fold=key == 0).numpy() == key
        count = int(np.count_nonzero(equal))
        if count >= ties:
            return start + int(np.flatnonzero(equal)[ties - 1]) + 1
        ties -= count
    raise AssertionError("fewer entries are equal to the key than were counted")


def _find_cut_with_torch(values: Mapping[str, Tensor], dtype: torch.dtype, key: int, *, ties: int) -> int:
    """As `_find_cut`, waiting for the device twice in all: it counts every chunk, and looks into one."""

    def equal(pieces: _Pieces) -> Tensor:
        return _keys(pieces, dtype, fold=key == 0) == key

    device = next(iter(values.values())).device
    counts = [equal(pieces).sum().to(device) for _, pieces in _chunks(values.values())]
    reached = torch.stack(counts).cumsum(0).cpu()  # (number of chunks,)
    index = int(torch.searchsorted(reached, ties))
    start, pieces = next(islice(_chunks(values.values()), index, None))
    before = int(reached[index - 1]) if index else 0
    return start + int(equal(pieces).nonzero()[ties - before - 1]) + 1


def _count_with_numpy(
    values: Mapping[str, Tensor], dtype: torch.dtype, shift: int, *, width: int, prefixes: Sequence[int]
) -> _Counts:
    size = 1 << width
    first = shift + width == dtype.itemsize * 8

    def count_stripe(worker: int, workers: int) -> dict[int, np.ndarray[Any, Any]]:
        counts = {prefix: np.zeros(size, dtype=np.int64) for prefix in prefixes}
        for _, pieces in islice(_chunks(values.values()), worker, None, workers):
            for prefix, count in counts.items():
                keys = _keys(pieces, dtype, fold=not first and prefix == 0).numpy()
                if not first:
                    keys = keys[np.flatnonzero(keys >> (shift + width) == prefix)]
                digits = keys >> shift
                digits &= size - 1
                if len(digits) < _FEW:
                    np.add.at(count, digits, 1)
                else:
                    count += np.bincount(digits, minlength=size)
        return counts

    stripes = _in_stripes(count_stripe, values)
    return {
        prefix: torch.from_numpy(np.sum([stripe[prefix] for stripe in stripes], axis=0))
        for prefix in prefixes
    }


def _count_with_torch(
    values: Mapping[str, Tensor], dtype: torch.dtype, shift: int, *, width: int, prefixes: Sequence[int]
) -> _Counts:
    size = 1 << width
    first = shift + width == dtype.itemsize * 8
    device = next(iter(values.values())).device
    counts = {prefix: torch.zeros(size, dtype=torch.int64, device=device) for prefix in prefixes}
    for _, pieces in _chunks(values.values()):
        for prefix, count in counts.items():
            digits = _keys(pieces, dtype, fold=not first and prefix == 0) >> shift
            if first:
                digits &= size - 1
            else:
                # 0 <= digit < size then holds just where the leading bits are the prefix.
                digits -= prefix << width
            count += _histogram(digits, size).to(device)
    return {prefix: count.cpu() for prefix, count in counts.items()}


def _histogram(digits: Tensor, size: int) -> Tensor:
    """(size,) how often 0, ..., size - 1 occur among `digits`; others do not count."""
    # Where deterministic kernels are asked for, torch refuses histc, of integers too, whose counts are always the same.
    if digits.is_cuda and not torch.are_deterministic_algorithms_enabled():
        # bincount would stop for the host twice a call. histc leaves out what lies outside its range, but its last
        # bin takes in the upper bound too: so there is one bin more, which is dropped.
        return torch.histc(digits, bins=size + 1, min=0, max=size + 1)[:size]
    return torch.bincount(digits[(digits >= 0) & (digits < size)], minlength=size)


def _in_stripes(work: Callable[[int, int], _T], values: Mapping[str, Tensor]) -> list[_T]:
    """`work(worker, workers)` in as many threads as torch uses; each takes every `workers`-th chunk."""
    size = sum(tensor.numel() for tensor in values.values())
    workers = 1
    if _on_cpu(values.values()):
        workers = min(torch.get_num_threads(), -(-size // _CHUNK["cpu"]))
    if workers <= 1:
        return [work(0, 1)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(workers), [workers] * workers))


def _on_cpu(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _chunks(tensors: Iterable[Tensor]) -> Iterator[tuple[int, _Pieces]]:
    """The position of its first entry and the flat pieces of each chunk: a part of a tensor, or several small ones."""
    start, held = 0, 0
    pieces: _Pieces = []
    for tensor in tensors:
        size = _CHUNK.get(tensor.device.type, _CHUNK["cpu"])
        for piece in tensor.detach().reshape(-1).split(size):
            if pieces and (held + len(piece) > size or piece.device != pieces[0].device):
                yield start, pieces
                start, held, pieces = start + held, 0, []
            pieces.append(piece)
            held += len(piece)
    if pieces:
        yield start, pieces


def _key_dtype(values: Mapping[str, Tensor]) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in values.values())
    return torch.int64 if wide else torch.int32


def _keys(pieces: _Pieces, dtype: torch.dtype, *, fold: bool) -> Tensor:
    """(n,) integers in the order of the floats. -0.0 becomes the smallest integer, or 0 as 0.0 does with `fold`.

    Folding takes time, and makes a difference only where zeros are counted or marked.
    """
    float_dtype = torch.float64 if dtype == torch.int64 else torch.float32
    floats = [piece.to(float_dtype) for piece in pieces]
    keys = (floats[0] if len(floats) == 1 else torch.cat(floats)).view(dtype)
    return keys & torch.iinfo(dtype).max if fold else keys


def _refuse_unfit(values: Mapping[str, Tensor], count: Tensor, dtype: torch.dtype, *, shift: int) -> None:
    """Refuse what cannot be ranked, told from `count` of the leading bits: sign, exponent, some of the mantissa.

    Counts of -0.0, whose sign bit is set, are moved to those of 0.0.
    """
    negative = len(count) // 2
    infinite = (0x7FF << 52 if dtype == torch.int64 else 0xFF << 23) >> shift
    if count[infinite:].any():
        for name, tensor in values.items():
            for _, pieces in _chunks([tensor]):
                if not all(piece.isfinite().all() for piece in pieces):
                    raise MaskError(
                        f"the saliency of {name} is not finite everywhere: no mask can be made from it"
                    )
                if any((piece < 0).any() for piece in pieces):
                    raise MaskError(f"the saliency of {name} has negative values; it must be absolute")
    count[0] += count[negative]
    count[negative] = 0
    if not count[1:].any() and not any(bool(tensor.any()) for tensor in values.values()):
        raise MaskError("every saliency is zero: the forget loss has no gradient, nothing can be ranked")
