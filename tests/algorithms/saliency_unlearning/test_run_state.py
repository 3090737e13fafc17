"""A checkpoint of a run as a file: what goes in comes out, and damage is found wherever it is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.ldm.tensor_file import CheckpointError, write_state_dict
from mu.unlearning.run_state import (
    read_head,
    read_run_state,
    verify_run_state,
    write_run_state,
)

CONTENT: dict[str, Any] = {
    "optimizer": {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.tensor([1.5, -0.0])},
            1: {"codes": torch.arange(5, dtype=torch.uint8), "half": torch.ones(2, dtype=torch.bfloat16)},
        },
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "amsgrad": False}],
    },
    "schedules": [],
    "nothing": None,
    "text": "ü",
    "table": torch.zeros(0, dtype=torch.uint8),
}


def written(folder: Path, content: dict[str, Any] = CONTENT) -> Path:
    path = folder / "step-00000003.safetensors"
    write_run_state(path, content, step=3, settings={"lr": 1e-5, "styles": ["a"]}, identity={"model": "x"})
    return path


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_nested_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path)
    verify_run_state(path)
    state = read_run_state(path)
    assert same(state.content, CONTENT)
    head = read_head(path)
    assert (head.step, head.settings, head.identity) == (3, {"lr": 1e-5, "styles": ["a"]}, {"model": "x"})


def test_an_adam_goes_on_from_its_file(tmp_path: Path) -> None:
    def stepped(weight: torch.nn.Parameter, adam: torch.optim.Adam, steps: int) -> None:
        for _ in range(steps):
            weight.grad = weight.detach() ** 2
            adam.step()

    straight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = torch.optim.Adam([straight], lr=0.1)
    stepped(straight, adam, 3)
    path = written(tmp_path, {"weight": straight, "optimizer": adam.state_dict()})
    stepped(straight, adam, 2)

    content = read_run_state(path).content
    resumed = torch.nn.Parameter(content["weight"].clone())
    again = torch.optim.Adam([resumed], lr=0.5)
    again.load_state_dict(content["optimizer"])
    stepped(resumed, again, 2)
    assert torch.equal(resumed, straight)


@pytest.mark.parametrize("value", [{1, 2}, object(), {("a",): 1}, torch.nn.Linear(1, 1)])
def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="/optimizer/odd"):
        written(tmp_path, {"optimizer": {"odd": value}})
    assert list(tmp_path.iterdir()) == []


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
        assert same(state.content, CONTENT)  # a blank of the header, or the name of the format
        assert state.settings == {"lr": 1e-5, "styles": ["a"]}


def test_other_files_are_not_taken_for_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_dict({"a": torch.ones(1)}, path)
    for read in (read_head, read_run_state, verify_run_state):
        with pytest.raises(CheckpointError, match="no checkpoint of a run"):
            read(path)
        with pytest.raises(CheckpointError):
            read(tmp_path / "missing.safetensors")
