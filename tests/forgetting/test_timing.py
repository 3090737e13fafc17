"""How long one of each kind of work is said to take."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mu.forgetting.timing import _seconds


@pytest.mark.parametrize(
    ("takes", "expected"),
    [
        ([0.5, 0.1, 0.2], 0.1),  # the first one prepares
        ([2.7, 0.1, 0.2], 0.1),  # another program had the processor
        ([2.5, 2.0, 1.0], 2.0),  # long enough
        ([30.0, 1.0, 1.0], 30.0),  # a large model: once
    ],
)
def test_the_fastest_counts(takes: list[float], expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, left = [0.0], iter(takes)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(left)

    model: Any = SimpleNamespace(device=torch.device("cpu"))
    assert _seconds(work, model) == pytest.approx(expected)
