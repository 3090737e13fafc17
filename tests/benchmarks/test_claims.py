"""Several commands at one table: a concept has one claim at a time."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import ClaimError, claimed


def test_a_folder_has_one_claim_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path / "a", wait=False) as first, claimed(tmp_path / "a", wait=False) as second:
        assert (first, second) == (True, False)
        with claimed(tmp_path / "b", wait=False) as other:
            assert other
    with claimed(tmp_path / "a", wait=True) as again:
        assert again


def test_a_claim_goes_with_its_process(tmp_path: Path) -> None:
    """Also when that is killed: no claim stays behind."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, begun))
    other.start()
    assert begun.wait(30)
    with claimed(tmp_path, wait=False) as mine:
        assert not mine
    other.kill()
    other.join()
    with claimed(tmp_path, wait=False) as mine:
        assert mine


def _hold(folder: Path, begun: Any) -> None:
    with claimed(folder, wait=True):
        begun.set()
        multiprocessing.Event().wait(60)


def test_a_place_that_cannot_be_claimed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClaimError, match="cannot be written"), claimed(tmp_path / "file", wait=False):
        pass
