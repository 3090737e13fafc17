"""Too little memory, made for real: what asks for more than there is gets the allocator's own error."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def memory_left(count: int) -> Iterator[None]:
    """While it lasts, this process can take so many more bytes of address space. Linux alone."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def hungry(work: Callable[..., Any], *, holds: int) -> Callable[..., Any]:
    """`work` with a memory that holds so many of its first argument's entries: for more it asks for 2^60 bytes."""

    def wrapped(first: Any, *args: Any, **keys: Any) -> Any:
        if len(first) > holds:
            torch.empty(2**60, dtype=torch.uint8)
        return work(first, *args, **keys)

    return wrapped
