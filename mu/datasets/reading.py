"""Files read ahead in threads, while the caller works with those before them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
_MOST_THREADS = 8


def read_ahead(
    items: Iterable[S], read: Callable[[S], T], *, threads: int | None = None
) -> Generator[T, None, None]:
    """`read(item)` of each item, in the order of the items; an error comes when its item's turn has come.

    At most twice as many results as there are threads wait for the caller, so memory does not grow with the items.
    `read` should decode and no more: torch's own threads would multiply in each of these.

    Args:
        threads: that read at once; None: as many as cores, at most 8.
    """
    count = threads or min(_MOST_THREADS, _cores())
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="reading") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
