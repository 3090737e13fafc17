"""Out of memory: less is done at once, or the keys that save memory are named."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import pytest
import torch

from mu.memory import AtOnce, OutOfMemoryError, is_out_of_memory, telling
from tests.memory_limit import memory_left

GB = 10**9


def squares(numbers: Sequence[int]) -> torch.Tensor:
    """Asks for 1 GB of address space a number, more than malloc ever keeps of what earlier tests gave back."""
    torch.empty(len(numbers), GB, dtype=torch.uint8)
    return torch.tensor(list(numbers)).square()


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux alone")
def test_promise_22_half_as_many_at_once_where_the_system_gives_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    at_once = AtOnce("number", advice="smaller numbers", note="; which is slower")
    with memory_left(15 * GB), caplog.at_level(logging.WARNING):
        pieces = list(at_once.pieces(range(21), squares))
        again = list(at_once.pieces(range(21), squares))
    assert torch.cat(pieces).tolist() == [number**2 for number in range(21)]  # all of them, in order
    assert [len(piece) for piece in pieces] == [10, 10, 1]
    assert [len(piece) for piece in again] == [10, 10, 1]
    # Said once: what did not fit is not tried again.
    expected = "out of memory with 21 numbers at a time; going on with 10; which is slower"
    assert [record.getMessage() for record in caplog.records] == [expected]


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux alone")
def test_promise_22_where_one_is_too_many_the_advice_is_told() -> None:
    at_once = AtOnce("number", advice="smaller numbers")
    with memory_left(GB // 2), pytest.raises(OutOfMemoryError) as caught:
        list(at_once.pieces(range(4), squares))
    assert str(caught.value).startswith("out of memory with one number at a time (")
    assert str(caught.value).endswith("What saves memory: smaller numbers")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="size"):
        list(AtOnce("image", advice="none").pieces(range(4), lambda _: torch.ones(2) @ torch.ones(3)))
    with pytest.raises(RuntimeError, match="size"), telling("here"):
        torch.ones(2) @ torch.ones(3)


def test_errors_of_allocations_are_told_with_advice() -> None:
    with telling_of(r"out of memory here \(MemoryError\). What saves memory: a smaller"), telling("here"):
        bytearray(2**60)
    told = r"here \(.*allocate 1152921504606846976 bytes.*memory: less\b"
    with telling_of(told), telling("here", advice="less"):
        torch.empty(2**60, dtype=torch.uint8)


def telling_of(message: str) -> pytest.RaisesExc[OutOfMemoryError]:
    return pytest.raises(OutOfMemoryError, match=message)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shapes differ"), False),
        (OutOfMemoryError("told already"), False),
    ],
)
def test_which_errors_are_of_an_allocation(error: BaseException, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory
