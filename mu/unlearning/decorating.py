"""What a run does beside its work: where it cannot be done, a warning says so, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from mu.errors import MuError
from mu.memory import let_go
from mu.unlearning.compute import is_out_of_memory

_log = logging.getLogger(__name__)


@contextmanager
def decorating(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Do what a run only decorates itself with: where it cannot be done, a warning says so, and the run goes on.

    What is caught: an error of this package, of the operating system (a full disk), memory that does not suffice, and a
    picture that is none. Anything else is a defect, and is raised.

    Args:
        what: is made, for the warning.
        errors: more that making it may meet.
    """
    always = (MuError, OSError, MemoryError, Image.DecompressionBombError)
    passed_over: tuple[type[Exception], ...] = (*always, *errors)
    try:
        yield
    except passed_over as error:
        reason = first_line(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = f"out of memory: {first_line(error)}"
    else:
        return
    let_go()  # only here is the error gone, which holds the tensors of what failed
    _log.warning("%s could not be made (%s); the run goes on without", what, reason)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
