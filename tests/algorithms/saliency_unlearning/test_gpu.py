"""What a GPU computes is what the CPU computes, and what is promised of a run holds there too.

Further tests of a GPU stand beside those of the CPU: `pytest -m gpu` runs them all.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.masking import (
    accumulate_saliency,
    accumulate_within_memory,
    load_mask,
    random_mask,
    threshold_mask,
)
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer, salun_loss
from mu.arithmetic import CUBLAS_WORKSPACE
from mu.datasets.images import to_uint8
from mu.errors import Terminated
from mu.ldm import LatentDiffusion
from mu.ldm.tensor_file import read_state_dict
from mu.ldm.text_to_image import sample_images
from mu.unlearning.batches import Batch, ForgetBatch, RetainBatch
from mu.unlearning.compute import (
    Compute,
    computing,
)
from tests.algorithms.saliency_unlearning.test_resume import SETTINGS, only_run, results, stopping_after

pytestmark = pytest.mark.gpu
GPU = "cuda:0"
KEYS = {"devices": "0"}
if torch.cuda.is_available():  # before CUDA starts: cuBLAS reads it once, and runs here ask for it
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")

ModelMaker = Callable[..., LatentDiffusion]


def part(images: int, contexts: int, *, side: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    """latents (B, 4, side, side), timesteps (B,), noise, and contexts (B, 7, 32) of the tiny model, on the CPU."""
    stream = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream)

    timesteps = torch.randint(0, 1000, (images,), generator=stream)
    shape = (images, 4, side, side)
    return normal(*shape), timesteps, normal(*shape), *(normal(images, 7, 32) for _ in range(contexts))


def moved(tensors: tuple[Tensor, ...], ldm: LatentDiffusion) -> Any:
    return tuple(tensor.to(ldm.device) for tensor in tensors)


def flat(values: dict[str, Tensor]) -> Tensor:
    """(n,) on the CPU."""
    return torch.cat([value.detach().float().cpu().reshape(-1) for value in values.values()])


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def saliency(ldm: LatentDiffusion, compute: Compute) -> dict[str, Tensor]:
    with computing(ldm, compute):
        return accumulate_saliency(ldm, [moved(part(4, 2), ldm)], c_guidance=7.5, compute=compute)


def gradients(ldm: LatentDiffusion, compute: Compute) -> Tensor:
    """(n,) of the loss of training."""
    ldm.requires_grad_(True)
    with computing(ldm, compute):
        with compute.autocast(ldm.device):
            loss, *_ = salun_loss(ldm, moved(part(4, 2), ldm), moved(part(4, 1, seed=1), ldm), 0.5)
        loss.backward()
        return flat({name: p.grad for name, p in ldm.unet.named_parameters() if p.grad is not None})


# ---- the numbers


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("precision", "bound", "common"), [("fp32", 1e-4, 0.999), ("tf32", 0.05, 0.95), ("bf16-mixed", 0.2, 0.85)]
)
def test_a_mask_is_the_cpus(
    make_tiny_model: ModelMaker, precision: str, bound: float, common: float, channels_last: bool
) -> None:
    """Relative norm of the difference of saliencies, and the share that the two masks have in common."""
    expected = saliency(make_tiny_model(), Compute())
    found = saliency(make_tiny_model().to(GPU), Compute(precision=precision, channels_last=channels_last))
    assert {str(values.device) for values in found.values()} == {GPU}
    assert distance(flat(found), flat(expected)) < bound
    ours, theirs = (flat(threshold_mask(values, 0.5)).bool() for values in (found, expected))
    assert ours.count_nonzero() == theirs.count_nonzero()
    assert (ours & theirs).count_nonzero() > common * theirs.count_nonzero()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_the_cpus(
    make_tiny_model: ModelMaker, channels_last: bool, gradient_checkpointing: bool
) -> None:
    compute = Compute(channels_last=channels_last, gradient_checkpointing=gradient_checkpointing)
    expected = gradients(make_tiny_model(), Compute())
    assert distance(gradients(make_tiny_model().to(GPU), compute), expected) < 1e-4


def test_images_are_the_cpus(make_tiny_model: ModelMaker) -> None:
    pairs = [("A Cats image in Noto style.", 3), ("A Dogs image in Blob style.", 4)]

    def grey_levels(ldm: LatentDiffusion) -> Tensor:
        images = sample_images(ldm, pairs, steps=3, guidance_scale=3.0)
        return to_uint8(torch.stack(list(images))).int()

    expected = grey_levels(make_tiny_model())
    assert expected.float().std() > 5  # pictures, not plain colours
    assert (grey_levels(make_tiny_model().to(GPU)) - expected).abs().max() <= 2


# ---- runs


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16-mixed"])
def test_promise_23_weights_outside_the_mask_keep_their_bits(
    tiny_runs: Any, tmp_path: Path, make_tiny_model: ModelMaker, precision: str
) -> None:
    config = tiny_runs.train_config(
        **KEYS, masking="random", precision=precision, channels_last=True, output_dir=str(tmp_path)
    )
    written = SaliencyUnlearningAlgorithm(config).run()["checkpoint"]
    before, after = (read_state_dict(path)[0] for path in (tiny_runs.checkpoint(), written))
    assert before.keys() == after.keys()
    shapes = dict(make_tiny_model().unet.named_parameters())
    mask = random_mask(shapes, config.random_fraction, seed=config.seed)
    changed = 0
    for name, values in before.items():
        marked = mask.get(
            name.removeprefix("model.diffusion_model."), torch.zeros_like(values, dtype=torch.bool)
        )
        different = values != after[name]
        assert not (different & ~marked).any(), name
        changed += int(different.count_nonzero())
    assert changed > 0.9 * sum(int(marked.count_nonzero()) for marked in mask.values())


def test_promise_24_with_deterministic_the_same_bits_twice(tiny_runs: Any, tmp_path: Path) -> None:
    masks, models = [], []
    for name in ("one", "other"):
        keys = {**KEYS, "deterministic": True, "output_dir": str(tmp_path / name)}
        keys["processed_dataset_dir"] = str(tmp_path / name / "processed")  # sampled and encoded anew
        (path,) = MaskingAlgorithm(tiny_runs.mask_config(**keys)).run()["masks"].values()
        masks.append(load_mask(path))
        config = tiny_runs.train_config(**keys, mask_path=str(path))
        models.append(read_state_dict(SaliencyUnlearningAlgorithm(config).run()["checkpoint"])[0])
    for one, other in (masks, models):
        assert [name for name, values in one.items() if not torch.equal(values, other[name])] == []


def test_promise_19_a_stopped_run_goes_on_to_the_same_bits(tiny_runs: Any, tmp_path: Path) -> None:
    """Of bits on a GPU, with deterministic kernels."""
    keys = {**SETTINGS, **KEYS, "deterministic": True}
    whole = tiny_runs.train_config(**keys, output_dir=str(tmp_path / "whole"))
    expected = results(SaliencyUnlearningAlgorithm(whole).run()["run"])
    config = tiny_runs.train_config(**keys, output_dir=str(tmp_path / "stopped"))
    with stopping_after(2, signal.SIGTERM), pytest.raises(Terminated):
        SaliencyUnlearningAlgorithm(config).run()
    run = only_run(tmp_path / "stopped")
    resumed = tiny_runs.train_config(**keys, output_dir=str(tmp_path / "stopped"), resume=str(run))
    assert results(SaliencyUnlearningAlgorithm(resumed).run()["run"]) == expected


# ---- out of memory

IMAGES, SIDE = 64, 32
"""Whose activations take a gigabyte, which is seen beside what the allocator rounds up."""


class _SmallGpu:
    """Measures what a call takes, and lets the next one have only a share of it."""

    def __init__(self) -> None:
        self.total = torch.cuda.get_device_properties(GPU).total_memory

    def start(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(GPU)

    def leave(self, share: float) -> None:
        peak = torch.cuda.max_memory_reserved(GPU)
        assert peak > 5e8
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share * peak / self.total, GPU)

    def end(self) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
        torch.cuda.empty_cache()


@pytest.fixture
def small_gpu() -> Any:
    gpu = _SmallGpu()
    gpu.start()
    yield gpu
    gpu.end()


def test_promise_22_a_mask_is_the_same_to_rounding_when_memory_runs_out(
    make_tiny_model: ModelMaker, small_gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ldm = make_tiny_model().to(GPU)

    def found() -> Tensor:
        batch = moved(part(IMAGES, 2, side=SIDE), ldm)
        with computing(ldm, Compute()):
            return flat(accumulate_within_memory(ldm, lambda: [batch], c_guidance=7.5, batch_size=IMAGES))

    expected = found()
    assert "out of memory" not in caplog.text
    small_gpu.leave(0.6)
    with caplog.at_level(logging.WARNING):
        assert distance(found(), expected) < 1e-4
    assert f"out of memory with {IMAGES} images at a time" in caplog.text


def test_promise_22_a_step_is_the_same_to_rounding_when_memory_runs_out(
    make_tiny_model: ModelMaker, small_gpu: Any
) -> None:
    lr = 1e-3

    def updates() -> tuple[Tensor, int | None]:
        ldm = make_tiny_model().to(GPU)
        before = flat(dict(ldm.unet.named_parameters()))
        model = SaliencyUnlearnModel(ldm, "full")
        forget, retain = part(IMAGES, 2, side=SIDE), part(IMAGES, 1, side=SIDE, seed=1)
        batch = Batch(ForgetBatch(*forget), RetainBatch(*retain))
        with computing(ldm, Compute()):
            trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=lr)
            trainer.step(batch)
        return flat(dict(ldm.unet.named_parameters())) - before, trainer.micro_batch_size

    expected, size = updates()
    assert size is None
    small_gpu.leave(0.6)
    found, size = updates()
    assert size is not None
    assert size < IMAGES
    # Adam's first step is lr times the gradient's sign: only near zero may rounding turn it.
    assert ((found - expected).abs() > 0.5 * lr).float().mean() < 0.01
