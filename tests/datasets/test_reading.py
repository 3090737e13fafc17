"""Files read ahead in threads: in order, a bounded number of them, errors in their turn."""

from __future__ import annotations

import random
import threading
import time

import pytest

from mu.datasets.images import read_ahead


def test_results_come_in_order_and_not_too_many_wait() -> None:
    begun: list[int] = []
    threads: set[str] = set()

    def read(number: int) -> int:
        begun.append(number)
        threads.add(threading.current_thread().name)
        time.sleep(random.Random(number).random() / 100)
        return number**2

    results = read_ahead(range(40), read, threads=3)
    for number in range(40):
        assert next(results) == number**2
        time.sleep(0.02)  # a caller slower than the threads: those that wait are no more
        assert len(begun) <= number + 1 + 2 * 3
    with pytest.raises(StopIteration):
        next(results)
    assert sorted(begun) == list(range(40))
    assert len(threads) == 3


def test_an_error_comes_when_its_turn_has_come() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = read_ahead(range(10), read, threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_a_caller_who_stops_leaves_no_thread() -> None:
    results = read_ahead(range(100), lambda number: number, threads=2)
    assert next(results) == 0
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_nothing_to_read_is_nothing() -> None:
    assert list(read_ahead([], str)) == []
