"""Several processes at one table: one claim at a time, and errors that name their concept."""

from __future__ import annotations

import importlib
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.workers import WorkerError, at_work, claimed


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
    with pytest.raises(WorkerError, match="cannot be written"), claimed(tmp_path / "file", wait=False):
        pass


HELPERS = """
import torch
from pathlib import Path
from mu.errors import MuError

def begin(name):
    global device
    device = name

def note(path):
    if path.endswith("bad"):
        raise MuError("it has no images")
    Path(path).write_text(f"{device} {torch.get_num_threads()}")
"""


@pytest.mark.slow
def test_workers_share_devices_and_threads_and_name_their_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helpers_of_workers.py").write_text(HELPERS)  # a test module is not found by other processes
    monkeypatch.syspath_prepend(tmp_path)
    helpers = importlib.import_module("helpers_of_workers")
    names = ["a", "b", "c", "bad"]
    paths = [str(tmp_path / name) for name in names]
    with at_work(helpers.note, paths, start=helpers.begin, devices=["7", "8"], workers=2) as wait_for:
        for path in paths[:3]:
            wait_for(path)
        with pytest.raises(WorkerError, match=r"bad: it has no images$"):
            wait_for(paths[3])
    noted = [Path(path).read_text().split() for path in paths[:3]]
    assert {device for device, _ in noted} <= {"7", "8"}
    assert {int(threads) for _, threads in noted} == {max(1, torch.get_num_threads() // 2)}
