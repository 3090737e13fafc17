"""A checkpoint of a run as a file: what goes in comes out, and damage is found wherever it is."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mu.ldm.tensor_file import CheckpointError, write_state_dict
from mu.unlearning.run_state import RunState, read_head, read_run_state, verify_run_state, write_run_state

TENSORS = {
    "weights/out.2.weight": torch.tensor([1.5, -0.0]),
    "exp_avg/out.2.weight": torch.ones(2, dtype=torch.float64),
    "tables/metrics.csv": torch.arange(5, dtype=torch.uint8),
    "tables/empty.csv": torch.zeros(0, dtype=torch.uint8),
}
SCHEDULE = {"last_epoch": 3, "_last_lr": [0.1 + 0.2]}


def written(folder: Path) -> Path:
    path = folder / "step-00000003.safetensors"
    settings, identity = {"lr": 1e-5, "styles": ["a"]}, {"model": "ü"}
    write_run_state(
        RunState(path=path, step=3, settings=settings, identity=identity, schedule=SCHEDULE, tensors=TENSORS)
    )
    return path


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path)
    verify_run_state(path)
    state = read_run_state(path)
    assert same(state.tensors, TENSORS)
    assert state.part("weights").keys() == {"out.2.weight"}
    assert state.part("exp_avg").keys() == {"out.2.weight"}
    for head in (state, read_head(path)):
        assert (head.step, head.settings, head.identity) == (3, {"lr": 1e-5, "styles": ["a"]}, {"model": "ü"})
        assert head.schedule == SCHEDULE


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(0)
    spoiled = []
    for _ in range(150):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        spoiled.append(bytes(content))
    spoiled += [whole[: rng.randrange(len(whole))] for _ in range(50)]
    for content in spoiled:
        path.write_bytes(content)
        try:
            state = read_run_state(path)
        except CheckpointError:
            continue
        assert same(state.tensors, TENSORS)  # a blank of the header, or the name of the format
        assert state.settings == {"lr": 1e-5, "styles": ["a"]}


def test_other_files_are_not_taken_for_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_dict({"a": torch.ones(1)}, path)
    for read in (read_head, read_run_state, verify_run_state):
        with pytest.raises(CheckpointError, match="no checkpoint of a run"):
            read(path)
        with pytest.raises(CheckpointError):
            read(tmp_path / "missing.safetensors")
