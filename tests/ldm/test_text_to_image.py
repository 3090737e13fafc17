"""Sampling in pieces that memory holds, and decoding one image at a time."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from mu.datasets.images import to_uint8
from mu.ldm import LatentDiffusion
from mu.ldm.text_to_image import TextToImage, sampling_precision
from mu.memory import OutOfMemoryError
from tests.memory_limit import memory_left

MB = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux alone")


def sampled(
    model: LatentDiffusion, count: int, *, size: int = 32, sampler: TextToImage | None = None
) -> torch.Tensor:
    """(N, H, W, 3) grey levels."""
    sampler = sampler or TextToImage(model, steps=1, shape=(4, size, size))
    images = sampler.images([f"cat {i}" for i in range(count)], guidance_scale=1.0, seeds=range(count))
    return to_uint8(torch.stack(list(images))).int()


@linux
def test_promise_22_the_batch_is_halved_when_memory_runs_out_while_sampling(
    tiny_model: LatentDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    expected = sampled(tiny_model, 192)
    sampler = TextToImage(tiny_model, steps=1, shape=(4, 32, 32))
    with memory_left(150 * MB), caplog.at_level(logging.WARNING):
        found = sampled(tiny_model, 192, sampler=sampler)
    assert (found - expected).abs().max() <= 1  # rounding
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings[0].startswith("out of memory with 192 images at a time; going on with 96")
    assert "may differ by rounding" in warnings[0]
    # What did not fit once is not tried again.
    count = len(warnings)
    with memory_left(150 * MB), caplog.at_level(logging.WARNING):
        sampled(tiny_model, 192, sampler=sampler)
    assert len(caplog.records) == count


@linux
def test_promise_22_memory_that_does_not_suffice_for_one_image_names_the_keys(
    tiny_model: LatentDiffusion,
) -> None:
    with (
        memory_left(20 * MB),
        pytest.raises(OutOfMemoryError, match=r"one image at a time .*sample_precision bf16"),
    ):
        sampled(tiny_model, 2, size=256)


def test_each_image_is_decoded_by_itself(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding takes most of the memory; and pixels then follow from their latent alone."""
    whole, sizes = tiny_model.decode, []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        return whole(latents)

    monkeypatch.setattr(tiny_model, "decode", decode)
    sampled(tiny_model, 3, size=8)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("given", ["fp32", "bf16"])
def test_a_precision_that_is_named_is_taken(given: str) -> None:
    assert sampling_precision(given, "cpu") == given


def test_auto_is_fp32_on_the_cpu(tiny_model: LatentDiffusion) -> None:
    assert sampling_precision("auto", tiny_model.device) == "fp32"
    exact, auto, half = (
        sampled(tiny_model, 2, sampler=TextToImage(tiny_model, steps=1, shape=(4, 8, 8), precision=precision))
        for precision in ("fp32", "auto", "bf16")
    )
    assert torch.equal(auto, exact)
    assert not torch.equal(half, exact)
