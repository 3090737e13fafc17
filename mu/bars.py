"""Progress on stderr: what is happening, how far it is, and the time left.

On a terminal it is a bar, which goes when it is done; elsewhere, as in a log file or a notebook, a line now and then.
With `--quiet` and `--json` nothing is said; of the processes of a run, rank 0 speaks. tqdm is imported with the first.
"""

from __future__ import annotations

import functools
import io
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from mu import ranks
from mu.console import stops_held_back
from mu.verbosity import bars_off

T = TypeVar("T")
_LINE_SECONDS = 30.0
"""Between two lines where no terminal shows a bar."""
_DELAY_SECONDS = 1.0
"""What is done by then is not spoken of."""
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} {unit}, {remaining} left{postfix}"
_UNCOUNTED = "{desc}: {elapsed}"


def bar(what: str, *, total: int | None, unit: str = "", initial: int = 0) -> Any:
    """A tqdm bar; a context manager, of which `update(n)` says that n more are done (also parts of one).

    Args:
        what: is happening, such as "drawing images".
        total: how many there are; None: it cannot be counted.
        unit: what is counted, in the plural.
        initial: how many were done before.
    """
    off = sys.stderr is None or bars_off() or not ranks.is_main() or ranks.started_rank() > 0
    on_terminal = _on_terminal()
    return (_bars() if on_terminal else _lines())(
        desc=what,
        total=total,
        unit=unit,
        initial=initial,
        disable=off,
        leave=False,
        file=sys.stderr if on_terminal else io.StringIO(),
        dynamic_ncols=on_terminal,
        bar_format=_FORMAT if total is not None else _UNCOUNTED,
        delay=_DELAY_SECONDS if on_terminal else _LINE_SECONDS,
        mininterval=0.2 if on_terminal else _LINE_SECONDS,
        maxinterval=10.0 if on_terminal else _LINE_SECONDS,
        smoothing=0.1,
    )


def counted(items: Sequence[T], what: str, *, unit: str) -> Iterator[T]:
    """The items one by one, with a `bar`."""
    with bar(what, total=len(items), unit=unit) as shown:
        for item in items:
            yield item
            shown.update()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """While the block lasts, how long it has taken so far: for work that cannot be counted."""
    with bar(what, total=None) as shown:
        done, on_terminal = threading.Event(), _on_terminal()

        def tick() -> None:
            while not done.wait(_DELAY_SECONDS if on_terminal else _LINE_SECONDS):
                shown.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        if not shown.disable:
            ticking.start()
        try:
            yield
        finally:
            done.set()
            if ticking.is_alive():
                ticking.join()


@contextmanager
def loading() -> Iterator[None]:
    """While PyTorch and what stands on it is imported; who asks to stop meanwhile is heard when that is done."""
    with waiting("loading PyTorch"), stops_held_back():
        yield


def _on_terminal() -> bool:
    """Whether stderr is one. It is None in a program without a console, such as pythonw, and where it was closed."""
    return sys.stderr is not None and sys.stderr.isatty()


@functools.cache
def _bars() -> Any:
    """A tqdm that a log line does not bring out before its delay is over, and that clears itself after any."""
    from tqdm import tqdm

    class Bar(tqdm):
        was_shown = False
        last_print_t: float

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if msg is None and self.delay > 0 and time.time() < self.start_t + self.delay:
                return False
            self.was_shown = True
            return bool(super().display(msg, pos))

        def close(self) -> None:
            if self.was_shown and not self.disable:  # tqdm itself counts only what `update` has shown
                self.last_print_t = max(self.last_print_t, self.start_t + self.delay)
            super().close()

    return Bar


@functools.cache
def _lines() -> Any:
    """A tqdm that prints lines."""
    from tqdm import tqdm

    class Lines(tqdm):
        def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002
            if msg is not None:  # to clear a bar
                return
            at = self.format_dict
            elapsed = tqdm.format_interval(at["elapsed"])
            if self.total is None:
                print(f"{self.desc}: {elapsed} so far", file=sys.stderr, flush=True)
                return
            rate = at["rate"] or (self.n - self.initial) / max(at["elapsed"], 1e-9)
            left = f", about {tqdm.format_interval((self.total - self.n) / rate)} left" if rate else ""
            text = f"{self.desc.rstrip(': ')}: {self.n:.0f} of {self.total} {self.unit} in {elapsed}{left}"
            print(text, file=sys.stderr, flush=True)

    return Lines
