"""What a pass takes, found without computing it, against what autograd really keeps and what is counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mu.algorithms.saliency_unlearning.passes import (
    _Operations,
    decoding_pass,
    encoding_pass,
    forward_pass,
    gradient_pass,
)
from mu.ldm import LatentDiffusion

LATENT = (4, 8, 8)


def all_names(model: LatentDiffusion) -> frozenset[str]:
    return frozenset(name for name, _ in model.unet.named_parameters())


def really_kept(model: LatentDiffusion, images: int) -> int:
    """Bytes that autograd keeps of a pass of real tensors, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.unet.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = torch.zeros(images, *LATENT), torch.zeros(images, dtype=torch.int64), torch.zeros(images, 77, 32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        prediction = model.unet(*inputs)
    inputs_too = weights | {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert prediction.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in inputs_too)


@pytest.mark.parametrize("images", [1, 3])
def test_what_is_kept_is_what_autograd_keeps(tiny_model: LatentDiffusion, images: int) -> None:
    counted = gradient_pass(tiny_model.params.unet, images, LATENT, moving=all_names(tiny_model))
    assert counted.kept == pytest.approx(really_kept(tiny_model, images), rel=0.03)
    assert counted.peak > counted.kept


def test_it_grows_with_images_and_falls_with_recomputation_and_fewer_moving_weights(
    tiny_model: LatentDiffusion,
) -> None:
    params, names = tiny_model.params.unet, all_names(tiny_model)
    one = gradient_pass(params, 1, LATENT, moving=names)
    four = gradient_pass(params, 4, LATENT, moving=names)
    assert 3.5 < four.kept / one.kept <= 4.01
    assert four.flops == pytest.approx(4 * one.flops, rel=0.02)
    again = gradient_pass(params, 4, LATENT, moving=names, gradient_checkpointing=True)
    assert again.kept < four.kept / 3
    assert 1.2 < again.flops / four.flops < 1.4
    attention = frozenset(name for name in names if "attn2" in name)
    few = gradient_pass(params, 4, LATENT, moving=attention)
    assert few.kept < 0.9 * four.kept
    assert few.flops < four.flops
    mixed = gradient_pass(params, 4, LATENT, moving=names, precision="bf16-mixed")
    half = gradient_pass(params, 4, LATENT, moving=names, precision="bf16")
    assert half.kept < mixed.kept < 0.9 * four.kept
    assert half.kept == pytest.approx(four.kept / 2, rel=0.1)


def test_a_pass_is_counted_once_however_it_is_asked_for(tiny_model: LatentDiffusion) -> None:
    forward_pass.cache_clear()
    passes = [
        forward_pass(tiny_model.params.unet, 1, LATENT),
        forward_pass(tiny_model.params.unet, 1, LATENT, precision="fp32"),
        forward_pass(tiny_model.params.unet, images=1, latent_shape=LATENT, device="cpu", precision="fp32"),
    ]
    found = forward_pass.cache_info()
    assert (found.misses, found.hits) == (1, 2)
    assert passes[0] is passes[1] is passes[2]
    forward_pass(tiny_model.params.unet, 1, LATENT, precision="bf16-mixed")
    assert forward_pass.cache_info().misses == 2


def test_without_gradient_a_pass_keeps_nothing_but_its_output(tiny_model: LatentDiffusion) -> None:
    predicted = forward_pass(tiny_model.params.unet, 2, LATENT)
    assert predicted.kept == 4 * 2 * 4 * 8 * 8
    decoded = decoding_pass(tiny_model.params.first_stage, 2, LATENT)
    assert decoded.kept == 4 * 2 * 3 * 16 * 16
    assert decoded.peak >= 4 * 2 * 32 * 16 * 16  # its widest features at the full size
    assert encoding_pass(tiny_model.params.first_stage, 16).kept == 2 * 4 * 4 * 8 * 8 + 4 * 4 * 8 * 8


def test_allocations_and_flops_of_a_layer_are_those_by_hand() -> None:
    with FakeTensorMode():
        layer, batch = nn.Linear(16, 8, bias=False), torch.zeros(4, 16)
        with _Operations() as seen:
            first = layer(batch)  # (4, 8)
            assert (seen.live, seen.flops) == (4 * 4 * 8, 2 * 4 * 16 * 8)
            view = first.t()
            second = torch.zeros(100)
            assert seen.live == 4 * 4 * 8 + 400
            del first
            assert seen.live == 4 * 4 * 8 + 400, "a view holds it"
            del view, second
        assert seen.live <= 4 * 4 * 8
        assert seen.peak == 4 * 4 * 8 + 400
