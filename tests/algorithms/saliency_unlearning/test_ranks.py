"""Mask and training by several processes: to rounding what one process makes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from safetensors.torch import load_file

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.mask_file import load_mask
from mu.errors import Terminated
from mu.launch import on_ranks
from mu.unlearning.moving import TrainingError

pytestmark = pytest.mark.usefixtures("one_thread", "forked_ranks")


def table(run: Path) -> list[list[float]]:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]


def update(tiny_runs: Any, checkpoint: Path) -> torch.Tensor:
    """(n,) by how much all weights of the UNet have moved."""
    before, after = load_file(tiny_runs.checkpoint()), load_file(checkpoint)
    return torch.cat([(after[name] - before[name]).flatten() for name in before if "diffusion_model" in name])


def assert_same_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.count_nonzero() > 1000
    # A mask that differs in two of these weights alone makes about 2e-3.
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_promise_24_two_processes_make_the_mask_and_the_weights_of_one(
    tiny_runs: Any, tmp_path: Path
) -> None:
    """Batches of 3 and of 1: a process with more images than the other, and one that has none of its own."""
    mask_keys = {"batch_size": 3, "threshold": (0.5,), "draws_per_image": 2}
    train_keys = {"threshold": 0.5, "retain_target": "frozen", "retain_batch_size": 1}

    def configs(name: str) -> tuple[Any, Any]:
        folder = str(tmp_path / name)
        return (
            tiny_runs.mask_config(**mask_keys, output_dir=f"{folder}/masks"),
            tiny_runs.train_config(**train_keys, output_dir=f"{folder}/runs", mask_path=f"{folder}/masks"),
        )

    alone = rank_work.both_stages(configs("alone"))
    together = on_ranks(rank_work.both_stages, configs("together"), "cpu,cpu")
    assert together["same"], "the processes were given different results"

    masks = [load_mask(result["masked"]["masks"][0.5]) for result in (alone, together)]
    marked = [torch.cat([tensor.flatten() for tensor in mask.values()]) for mask in masks]
    assert alone["masked"]["kept"] == together["masked"]["kept"]
    assert marked[0].sum() == marked[1].sum()
    assert (marked[0] != marked[1]).sum() <= 1e-3 * len(marked[0])

    assert_same_to_rounding(
        update(tiny_runs, together["trained"]["checkpoint"]),
        update(tiny_runs, alone["trained"]["checkpoint"]),
    )
    rows, expected = table(together["trained"]["run"]), table(alone["trained"]["run"])
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert together["trained"]["loss"] == pytest.approx(alone["trained"]["loss"], rel=1e-3)

    runs = list((tmp_path / "together" / "runs").iterdir())
    assert runs == [together["trained"]["run"]], "one run folder for all processes"
    assert "weights changed" in (runs[0] / "log.txt").read_text()
    assert "weights changed" not in (runs[0] / "log-1.txt").read_text()


def test_a_signal_that_reaches_one_process_stops_all_after_the_same_step(
    tiny_runs: Any, tmp_path: Path
) -> None:
    """And both go on from there: two processes to the bits of a run of two that was not stopped, one to rounding."""
    keys = {"masking": "none", "train_method": "xattn", "devices": "cpu,cpu", "lr_schedule": "linear"}
    config = tiny_runs.train_config(**keys, output_dir=str(tmp_path / "stopped"))
    never = tiny_runs.train_config(**keys, output_dir=str(tmp_path / "whole"))
    with pytest.raises(Terminated):
        on_ranks(rank_work.whole_and_stopped_in_one, (never, config), "cpu,cpu")
    (run,), (whole,) = ((tmp_path / name).iterdir() for name in ("stopped", "whole"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002.safetensors"]

    elsewhere = str(tmp_path / "one")
    one = SaliencyUnlearningAlgorithm(config, devices="cpu", output_dir=elsewhere, resume=str(run)).run()
    two = SaliencyUnlearningAlgorithm(config, resume=str(run)).run()
    assert two["run"] == run
    assert not (run / "checkpoints").exists()
    assert torch.equal(update(tiny_runs, two["checkpoint"]), update(tiny_runs, whole / "model.safetensors"))
    assert table(run) == table(whole)
    assert_same_to_rounding(
        update(tiny_runs, one["checkpoint"]), update(tiny_runs, whole / "model.safetensors")
    )


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tiny_runs: Any, tmp_path: Path) -> None:
    config = tiny_runs.train_config(masking="none", devices="cpu,cpu", output_dir=str(tmp_path))
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan .*Noto"):
        on_ranks(rank_work.poisoned_in_one, config, "cpu,cpu")
    (run,) = tmp_path.iterdir()
    assert not list(run.glob("*.safetensors"))


def test_a_mask_of_no_images_in_one_process_is_that_of_the_other(tiny_runs: Any, tmp_path: Path) -> None:
    """Three processes, batches of one image: two of them have nothing to do."""
    keys = {"batch_size": 1, "threshold": (0.3,), "output_dir": str(tmp_path)}
    paths = [
        MaskingAlgorithm(tiny_runs.mask_config(**keys, devices=devices)).run()["masks"][0.3]
        for devices in ("cpu", "cpu,cpu,cpu")
    ]
    assert load_mask(paths[0]).keys() == load_mask(paths[1]).keys()
    assert all(torch.equal(load_mask(paths[0])[name], marked) for name, marked in load_mask(paths[1]).items())
