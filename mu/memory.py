"""What happens when memory runs out: less is done at once, or an error names what saves memory.

torch is not imported: where no other module has, no error is torch's.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from mu.errors import MuError, first_line

S = TypeVar("S")
T = TypeVar("T")
_log = logging.getLogger(__name__)
_ALLOCATION_ERRORS = ("DefaultCPUAllocator", "ALLOC_FAILED", "CUDA error: out of memory", "std::bad_alloc")
"""Words in a RuntimeError of torch that mean a failed allocation: CPU, cuDNN and cuBLAS, the driver, C++."""
ADVICE = (
    "a smaller batch_size or image_size, precision bf16 (of a mask or training run: bf16-mixed), devices cpu, or "
    "closing other programs that use it"
)
SAMPLING_ADVICE = (
    "precision bf16 (in a mask or training run: sample_precision bf16), a smaller image_size, devices cpu, or closing "
    "other programs that use this memory"
)
ENCODING_ADVICE = "a smaller image_size, devices cpu, or closing other programs that use this memory"
SCORING_ADVICE = "a smaller batch_size, devices cpu, or closing other programs that use this memory"


class OutOfMemoryError(MuError, RuntimeError):
    """Memory does not suffice, not even for one image at a time."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocation, on a GPU or on the CPU."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, MuError):
        return False
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _ALLOCATION_ERRORS)


@contextmanager
def telling(doing: str, *, advice: str = ADVICE) -> Iterator[None]:
    """Turns the error of an allocation inside into one that names what saves memory.

    Args:
        doing: what needs the memory, such as "while decoding an image".

    Raises:
        OutOfMemoryError: memory did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory {doing} ({first_line(error)}). What saves memory: {advice}"
        ) from error


def let_go() -> None:
    """Give back memory that nobody uses any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved(count: int, *, reason: str, advice: str, what: str = "image", note: str = "") -> int:
    """How many to send through a network at once, after so many were too many; memory that is unused is freed.

    Args:
        reason: what the allocation said.
        advice: the keys that save memory.
        what: the singular of what is counted.
        note: the end of the warning, beginning with a space or a comma.

    Raises:
        OutOfMemoryError: one was too many; names the keys.
    """
    let_go()
    if count <= 1:
        raise OutOfMemoryError(
            f"out of memory with one {what} at a time ({reason}). What saves memory: {advice}"
        )
    smaller = count // 2
    _log.warning("out of memory with %d %ss at a time; going on with %d%s", count, what, smaller, note)
    return smaller


class AtOnce:
    """How many of something go through a network at once: halved when memory runs out, and so from then on.

    Args:
        what: the singular of what is counted, for messages.
        advice: the keys that save memory, where one at a time is too many.
        note: the end of the warning that fewer are done at once, beginning with a space or a comma.
    """

    def __init__(self, what: str, *, advice: str, note: str = "") -> None:
        self.what = what
        self.advice = advice
        self.note = note
        self.most: int | None = None
        """The size that memory held, once a larger one was too much."""

    def pieces(self, items: Sequence[S], work: Callable[[Sequence[S]], T]) -> Iterator[T]:
        """What `work` gives for all items at once, or in pieces, in order, if that is too much.

        `work` is begun again with fewer items, so it must not change anything before it returns.

        Raises:
            OutOfMemoryError: one is too many.
        """
        done = 0
        while done < len(items):
            size = min(self.most or len(items), len(items) - done)
            try:
                result = work(items[done : done + size])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            else:
                done += size
                yield result
                continue
            # Only here is the error, which holds the tensors of the pass that failed, gone.
            self.most = halved(size, reason=reason, advice=self.advice, what=self.what, note=self.note)
