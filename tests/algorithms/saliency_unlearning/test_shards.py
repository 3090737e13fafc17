"""Two processes with the rows of the weights each, beside one with all: the same masks, steps and checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import shard_work
import torch
from shard_work import STEPS, Task

from mu.algorithms.saliency_unlearning.masking import threshold_masks
from mu.launch import on_ranks


@pytest.fixture(scope="module")
def task(tiny_runs) -> Task:
    return Task(model_config=str(tiny_runs.model_config), checkpoint=str(tiny_runs.checkpoint()))


@pytest.fixture(scope="module")
def alone(task) -> dict[str, Any]:
    return shard_work.trained(task)


@pytest.fixture(scope="module")
def split(task, alone) -> dict[str, Any]:
    resuming = Task(model_config=task.model_config, checkpoint=task.checkpoint, resumed=alone["saved"])
    return on_ranks(shard_work.everything, resuming, "cpu,cpu")


def off_by(moved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The difference of two updates of all weights, as a share of the second."""
    assert moved.keys() == expected.keys()
    difference = sum(float((moved[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(values.square().sum()) for values in expected.values())) ** 0.5


def test_steps_on_shards_are_those_of_one_process(alone, split):
    found = split["trained"]
    assert found["counts"] == alone["counts"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert off_by(found["moved"], alone["moved"]) < 1e-4
    assert found["alike"]
    assert found["plain"]


def test_a_process_holds_half_of_weights_gradients_and_state(alone, split):
    for held in split["trained"]["by_rank"]:
        assert held == pytest.approx(alone["bytes"] / 2, rel=0.03)


def test_a_checkpoint_goes_on_with_another_number_of_processes(task, alone, split):
    saved = split["trained"]["saved"]
    assert saved["weights"].keys() == alone["saved"]["weights"].keys()
    for name, values in alone["saved"]["weights"].items():
        assert saved["weights"][name].shape == values.shape
    assert off_by(split["resumed"]["moved"], alone["moved"]) < 1e-4
    assert split["resumed"]["losses"] == pytest.approx(alone["losses"][-1:], rel=1e-5)
    resumed = Task(model_config=task.model_config, checkpoint=task.checkpoint, resumed=saved)
    found = shard_work.trained(resumed)
    assert len(found["losses"]) == STEPS - shard_work.SAVED
    assert off_by(found["moved"], alone["moved"]) < 1e-4


def test_rounded_weights_on_shards_come_back_full(task, split):
    lower = Task(model_config=task.model_config, checkpoint=task.checkpoint, precision="bf16")
    expected = shard_work.trained(lower)
    assert split["bf16"]["losses"] == pytest.approx(expected["losses"], rel=0.02)
    print(off_by(split["bf16"]["moved"], expected["moved"]))
    assert off_by(split["bf16"]["moved"], expected["moved"]) < 0.1


def test_the_mask_of_shards_is_that_of_whole_saliencies(split):
    for case, saliency in shard_work.saliencies().items():
        found = split["masks"][case]
        expected = threshold_masks(saliency, found["thresholds"])
        expected += threshold_masks(saliency, found["thresholds"][1:], pool=found["pool"])
        assert len(expected) == len(found["masks"])
        for mask, whole in zip(found["masks"], expected, strict=True):
            assert list(mask) == list(whole)
            for name, marked in whole.items():
                assert torch.equal(mask[name], marked), (case, name)


def test_saliencies_that_cannot_be_ranked_are_refused_by_all_processes(split):
    nan, negative, zero = split["refused"]
    assert nan == ["the saliency of layer.weight is not finite everywhere: no mask can be made from it"] * 2
    assert negative == ["the saliency of layer.weight has negative values; it must be absolute"] * 2
    assert len(zero) == 2
    assert all("every saliency is zero" in said for said in zero)
