"""Sampling in pieces that memory holds, and decoding one image at a time."""

from __future__ import annotations

import logging

import pytest
import torch

from mu.datasets.images import to_uint8
from mu.ldm import LatentDiffusion
from mu.ldm.text_to_image import TextToImage, sampling_precision
from mu.memory import OutOfMemoryError
from tests.memory_limit import hungry


def sampler_of(model: LatentDiffusion, **keys: str) -> TextToImage:
    return TextToImage(model, steps=2, shape=(4, 8, 8), **keys)  # type: ignore[arg-type]


def sampled(sampler: TextToImage, count: int, guidance_scale: float = 3.0) -> torch.Tensor:
    """(N, H, W, 3) grey levels."""
    prompts = [f"cat {i}" for i in range(count)]
    images = sampler.images(prompts, guidance_scale=guidance_scale, seeds=range(count))
    return to_uint8(torch.stack(list(images))).int()


def test_promise_22_the_batch_is_halved_when_memory_runs_out_while_sampling(
    tiny_model: LatentDiffusion, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(sampler_of(tiny_model), 7)
    assert expected.float().std() > 5
    monkeypatch.setattr(tiny_model.unet, "forward", hungry(tiny_model.unet.forward, holds=6))  # both branches
    sampler = sampler_of(tiny_model)
    with caplog.at_level(logging.WARNING):
        found = sampled(sampler, 7)
        assert torch.equal(sampled(sampler, 7), found)  # cut alike, and not tried in vain again
    assert (found - expected).abs().max() <= 1  # rounding
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("out of memory with 7 images at a time; going on with 3")
    assert "may differ by rounding" in said


@pytest.mark.parametrize("part", ["sampling", "decoding"])
def test_promise_22_memory_that_does_not_hold_one_image_is_an_error_that_names_keys(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    module, name = (tiny_model.unet, "forward") if part == "sampling" else (tiny_model, "decode")
    monkeypatch.setattr(module, name, hungry(getattr(module, name), holds=0))
    doing = "with one image at a time" if part == "sampling" else "while decoding an image"
    with pytest.raises(OutOfMemoryError, match=rf"{doing} \(.*allocate.*sample_precision bf16"):
        sampled(sampler_of(tiny_model), 2)


def test_each_image_is_decoded_by_itself(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding takes most of the memory; and pixels then follow from their latent alone, whatever the batch."""
    expected = sampled(sampler_of(tiny_model), 3)
    monkeypatch.setattr(tiny_model, "decode", hungry(tiny_model.decode, holds=1))
    assert torch.equal(sampled(sampler_of(tiny_model), 3), expected)


@pytest.mark.parametrize("given", ["fp32", "bf16"])
def test_a_precision_that_is_named_is_taken(given: str) -> None:
    assert sampling_precision(given, "cpu") == given


def test_auto_is_fp32_on_the_cpu(tiny_model: LatentDiffusion) -> None:
    assert sampling_precision("auto", tiny_model.device) == "fp32"
    exact, auto, half = (
        sampled(sampler_of(tiny_model, precision=precision), 2) for precision in ("fp32", "auto", "bf16")
    )
    assert torch.equal(auto, exact)
    assert not torch.equal(half, exact)
