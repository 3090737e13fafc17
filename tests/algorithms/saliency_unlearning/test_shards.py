"""Two processes with the rows of the weights each, beside one with all: the same masks, steps and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_work
import shard_work
import torch
from safetensors.torch import load_file
from shard_work import STEPS, Task, Tasks

from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import load_mask
from mu.algorithms.saliency_unlearning.masking import threshold_masks
from mu.config import ConfigError
from mu.launch import on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tiny_runs: Any) -> Task:
    return Task(model_config=str(tiny_runs.model_config), checkpoint=str(tiny_runs.checkpoint()))


@pytest.fixture(scope="module")
def configs(tiny_runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """configs(name, **keys): of both stages, below a folder of that name."""
    root = tmp_path_factory.mktemp("shards")

    def make(name: str, **keys: Any) -> tuple[Any, Any]:
        mask_keys = {"batch_size": 3, "threshold": (0.5,), "output_dir": f"{root}/{name}/masks", **keys}
        train_keys = {
            "threshold": 0.5,
            "retain_target": "frozen",
            "retain_batch_size": 1,
            "validate_every_steps": 2,
            "validation_draws": 2,
            "sample_every_steps": 4,
            "sample_prompts": ("A Cats image in Noto style.",),
            "sample_seeds": (188,),
            "mask_path": f"{root}/{name}/masks",
            "output_dir": f"{root}/{name}/runs",
            **keys,
        }
        return tiny_runs.mask_config(**mask_keys), tiny_runs.train_config(**train_keys)

    return make


@pytest.fixture(scope="module")
def alone(task: Task) -> dict[str, Any]:
    return shard_work.trained(task)


@pytest.fixture(scope="module")
def lower(task: Task) -> Task:
    return replace(task, precision="bf16", train_method="xattn", steps=1)


@pytest.fixture(scope="module")
def split(
    task: Task, lower: Task, alone: dict[str, Any], configs: Callable[..., tuple[Any, Any]]
) -> dict[str, Any]:
    tasks = Tasks(
        fresh=task,
        resuming=replace(task, resumed=alone["saved"]),
        lower=lower,
        configs=configs("split", devices="cpu,cpu", sharding="full", gradient_checkpointing=True),
    )
    found: dict[str, Any] = on_ranks(shard_work.everything, tasks, "cpu,cpu")
    return found


def off_by(moved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The difference of two updates of all weights, as a share of the second."""
    assert moved.keys() == expected.keys()
    difference = sum(float((moved[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(values.square().sum()) for values in expected.values())) ** 0.5


def test_steps_on_shards_are_those_of_one_process(alone: dict[str, Any], split: dict[str, Any]) -> None:
    found = split["trained"]
    assert found["counts"] == alone["counts"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert off_by(found["moved"], alone["moved"]) < 1e-4
    assert found["alike"]
    assert found["plain"]


def test_a_process_holds_half_of_weights_gradients_and_state(
    alone: dict[str, Any], split: dict[str, Any]
) -> None:
    for held in split["trained"]["by_rank"]:
        assert held == pytest.approx(alone["bytes"] / 2, rel=0.03)


def test_a_checkpoint_goes_on_with_another_number_of_processes(
    task: Task, alone: dict[str, Any], split: dict[str, Any]
) -> None:
    saved = split["trained"]["saved"]
    assert saved["weights"].keys() == alone["saved"]["weights"].keys()
    for name, values in alone["saved"]["weights"].items():
        assert saved["weights"][name].shape == values.shape
    assert off_by(split["resumed"]["moved"], alone["moved"]) < 1e-4
    assert split["resumed"]["losses"] == pytest.approx(alone["losses"][-1:], rel=1e-5)
    found = shard_work.trained(replace(task, resumed=saved))
    assert len(found["losses"]) == STEPS - shard_work.SAVED
    assert off_by(found["moved"], alone["moved"]) < 1e-4


def test_rounded_weights_on_shards_come_back_full(lower: Task, split: dict[str, Any]) -> None:
    """Of one kind of layer alone: there are blocks of which nothing moves."""
    expected = shard_work.trained(lower)
    assert split["bf16"]["losses"] == pytest.approx(expected["losses"], rel=0.02)
    assert off_by(split["bf16"]["moved"], expected["moved"]) < 0.05
    assert off_by(split["bf16 saliency"], shard_work.saliency(lower)) < 0.05


def test_the_mask_of_shards_is_that_of_whole_saliencies(split: dict[str, Any]) -> None:
    for case, saliency in shard_work.saliencies().items():
        found = split["masks"][case]
        expected = threshold_masks(saliency, found["thresholds"])
        expected += threshold_masks(saliency, found["thresholds"][1:], pool=found["pool"])
        assert len(expected) == len(found["masks"])
        for mask, whole in zip(found["masks"], expected, strict=True):
            assert list(mask) == list(whole)
            for name, marked in whole.items():
                assert torch.equal(mask[name], marked), (case, name)


def test_saliencies_that_cannot_be_ranked_are_refused_by_all_processes(split: dict[str, Any]) -> None:
    nan, negative, zero = split["refused"]
    assert nan == ["the saliency of layer.weight is not finite everywhere: no mask can be made from it"] * 2
    assert negative == ["the saliency of layer.weight has negative values; it must be absolute"] * 2
    assert len(zero) == 2
    assert all("every saliency is zero" in said for said in zero)


def test_both_stages_with_sharding_make_what_one_process_makes(
    split: dict[str, Any], configs: Callable[..., tuple[Any, Any]], tiny_runs: Any
) -> None:
    alone = rank_work.both_stages(configs("alone"))
    found = split["stages"]
    assert found["same"], "the processes were given different results"
    results = found, alone
    masks = [load_mask(result["masked"]["masks"][0.5]) for result in results]
    marked = [torch.cat([tensor.flatten() for tensor in mask.values()]) for mask in masks]
    assert list(masks[0]) == list(masks[1])
    assert marked[0].sum() == marked[1].sum() == found["masked"]["kept"][0.5]
    assert (marked[0] != marked[1]).sum() <= 1e-3 * len(marked[0])

    before = load_file(tiny_runs.checkpoint())
    after = [load_file(result["trained"]["checkpoint"]) for result in results]
    moved = [{name: weights[name] - before[name] for name in before} for weights in after]
    assert off_by(moved[0], moved[1]) < 1e-2  # a mask that differs in two weights alone makes 2e-3
    runs = [Path(result["trained"]["run"]) for result in results]
    for name in ("metrics.csv", "validation.csv"):
        tables = [[line.split(",") for line in (run / name).read_text().splitlines()] for run in runs]
        assert len(tables[0]) == len(tables[1]) > 1
        for row, expected in zip(tables[0][1:], tables[1][1:], strict=True):
            assert [float(cell) for cell in row] == pytest.approx(
                [float(cell) for cell in expected], rel=1e-3
            )
    assert (runs[0] / "pictures" / "step_000004.png").exists()


def test_what_cannot_be_split_is_said_before_anything_is_loaded() -> None:
    for keys, named in (
        ({"devices": "0"}, "devices 0 is one"),
        ({"devices": "0,1", "channels_last": True}, "channels_last"),
        ({"devices": "0,1", "compile": True}, "compile"),
    ):
        for kind in (MaskConfig, TrainConfig):
            with pytest.raises(ConfigError, match=named):
                kind(sharding="full", **keys)
    with pytest.raises(ConfigError, match="optimizer adam"):
        TrainConfig(sharding="full", devices="0,1", optimizer="adam8bit")
    assert TrainConfig(sharding="full", devices="0,1").sharding == "full"
