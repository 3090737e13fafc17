from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning import masking
from mu.algorithms.saliency_unlearning.masking import (
    MaskError,
    accumulate_saliency,
    random_mask,
    threshold_mask,
    threshold_masks,
)
from mu.ldm import LatentDiffusion
from tests.algorithms.saliency_unlearning.reference_masks import assert_same_mask, by_stable_sort


def kept(mask: dict[str, Tensor]) -> int:
    return sum(int(marked.sum()) for marked in mask.values())


def gaussian(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 11), "b": (1,), "c": (2, 3, 5), "d": (101,)}
    return {name: torch.randn(shape, generator=generator).abs() for name, shape in shapes.items()}


# ---- saliency


def closed_form(model: Any, batches: list[tuple[Tensor, ...]], w: float) -> dict[str, Tensor]:
    """|gradient| of the mean loss of the linear model, written down by hand in fp64."""
    signal, prompt = model.unet.signal.detach().double(), model.unet.prompt.detach().double()
    for_signal, for_prompt, images = torch.zeros_like(signal), torch.zeros_like(prompt), 0
    for latents, timesteps, noise, context, uncond in batches:
        x = model.q_sample(latents.double(), timesteps, noise.double())
        mixed = (1 + w) * context.double().mean(1) - w * uncond.double().mean(1)  # (B, D)
        residual = signal[:, None, None] * x + (mixed @ prompt.T)[:, :, None, None] - noise  # (B, C, H, W)
        for_signal += 2 / x[0].numel() * (residual * x).sum((0, 2, 3))
        for_prompt += 2 / x[0].numel() * torch.einsum("bchw,bd->cd", residual, mixed)
        images += len(latents)
    return {"signal": (for_signal / images).abs(), "prompt": (for_prompt / images).abs()}


@pytest.mark.parametrize("w", [7.5, 1.0, 0.0])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 2)])
def test_saliency_is_the_closed_form(
    linear_model: Any, make_batch: Any, w: float, lengths: tuple[int, int]
) -> None:
    batches = [make_batch(3, lengths, seed=1), make_batch(1, lengths, seed=2), make_batch(2, lengths, seed=3)]
    saliency = accumulate_saliency(linear_model, batches, c_guidance=w)
    expected = closed_form(linear_model, batches, w)
    assert list(saliency) == [name for name, _ in linear_model.unet.named_parameters()] == list(expected)
    for name, values in saliency.items():
        assert values.dtype == torch.float32
        assert values.shape == expected[name].shape
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_signed_gradients_are_summed_before_the_absolute_value(linear_model: Any) -> None:
    """Two images that pull `prompt` in opposite directions cancel; absolute values of batches would not."""
    with torch.no_grad():
        linear_model.unet.signal.zero_()
        linear_model.unet.prompt.zero_()
    noise = torch.ones(1, 4, 3, 3)
    zeros, context = torch.zeros(1, 4, 3, 3), torch.ones(1, 2, 5)
    t = torch.zeros(1, dtype=torch.long)
    batches = [(zeros, t, noise, context, context), (zeros, t, -noise, context, context)]
    assert accumulate_saliency(linear_model, batches[:1], c_guidance=0.0)["prompt"].min() > 0.1
    assert accumulate_saliency(linear_model, batches, c_guidance=0.0)["prompt"].max() == 0.0


def test_promise_24_saliency_of_a_unet_is_the_gradient_of_the_mean_loss_however_it_is_cut(
    tiny_model: LatentDiffusion,
) -> None:
    generator = torch.Generator().manual_seed(5)
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([3, 999, 500, 250, 0])
    context, uncond = torch.randn(2, 5, 7, 32, generator=generator)
    batch = (latents, timesteps, noise, context, uncond)
    w = 2.0

    noisy = tiny_model.q_sample(latents, timesteps, noise)
    guided = (1 + w) * tiny_model.predict_noise(noisy, timesteps, context)
    guided = guided - w * tiny_model.predict_noise(noisy, timesteps, uncond)
    named = dict(tiny_model.unet.named_parameters())
    grads = torch.autograd.grad((guided - noise).square().mean(), list(named.values()))
    expected = {name: grad.abs() for name, grad in zip(named, grads, strict=True)}
    largest = max(values.max().item() for values in expected.values())

    for cuts in ([5], [2, 3], [1, 1, 1, 1, 1]):
        batches = list(zip(*(part.split(cuts) for part in batch), strict=True))
        saliency = accumulate_saliency(tiny_model, batches, c_guidance=w)
        assert list(saliency) == list(named)
        for name, values in saliency.items():
            # Some biases lie under a normalisation that cancels them: their gradient is rounding alone.
            scale = max(expected[name].max().item(), 1e-2 * largest)
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5 * scale)


def test_the_model_is_left_as_it_was_and_dropout_is_off(linear_model: Any, make_batch: Any) -> None:
    linear_model.train()
    linear_model.first_stage_model.eval()
    linear_model.unet.prompt.requires_grad_(False)
    before = {name: value.clone() for name, value in linear_model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    batches = [make_batch(2, (3, 3), seed=s) for s in range(4)]
    saliency = accumulate_saliency(linear_model, batches, c_guidance=7.5)

    expected = closed_form(linear_model, batches, 7.5)["signal"].float()
    torch.testing.assert_close(saliency["signal"], expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in linear_model.state_dict().items())
    assert linear_model.training
    assert linear_model.unet.dropout.training
    assert not linear_model.first_stage_model.training
    assert [p.requires_grad for p in linear_model.unet.parameters()] == [True, False]
    assert all(p.grad is None for p in linear_model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_gradients_from_before_do_not_count(linear_model: Any, make_batch: Any) -> None:
    batches = [make_batch(2, (3, 3))]
    clean = accumulate_saliency(linear_model, batches, c_guidance=1.0)
    for parameter in linear_model.unet.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    again = accumulate_saliency(linear_model, batches, c_guidance=1.0)
    assert all(torch.equal(again[name], clean[name]) for name in clean)


def test_it_works_where_gradients_are_off(linear_model: Any, make_batch: Any) -> None:
    with torch.no_grad():
        saliency = accumulate_saliency(linear_model, [make_batch(2, (3, 3))], c_guidance=1.0)
    assert saliency["signal"].min() > 0


def test_without_guidance_the_unconditional_branch_is_not_computed(
    linear_model: Any, make_batch: Any
) -> None:
    batch = make_batch(2, (3, 3))
    accumulate_saliency(linear_model, [batch], c_guidance=0.0)
    assert len(linear_model.calls) == 1
    assert torch.equal(linear_model.calls[0][0], batch[3])


def test_both_guidance_branches_share_a_call(linear_model: Any, make_batch: Any) -> None:
    batch = make_batch(2, (3, 3))
    accumulate_saliency(linear_model, [batch], c_guidance=7.5)
    assert len(linear_model.calls) == 1
    assert torch.equal(linear_model.calls[0][0], torch.cat([batch[3], batch[4]]))


def test_one_unconditional_context_serves_the_whole_batch(linear_model: Any, make_batch: Any) -> None:
    *batch, uncond = make_batch(3, (3, 3))
    one = accumulate_saliency(linear_model, [(*batch, uncond[:1])], c_guidance=7.5)
    many = accumulate_saliency(linear_model, [(*batch, uncond[:1].repeat(3, 1, 1))], c_guidance=7.5)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_bf16_weights_sum_in_fp32(linear_model: Any, make_batch: Any) -> None:
    """600 equal gradients: a bf16 sum would stop growing at 256 of them."""
    linear_model.unet.to(torch.bfloat16)
    batch = make_batch(1, (3, 3))
    once = accumulate_saliency(linear_model, [batch], c_guidance=1.0)
    often = accumulate_saliency(linear_model, [batch] * 600, c_guidance=1.0)
    for name, values in often.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, once[name], rtol=1e-5, atol=0.0)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in linear_model.unet.parameters())
    linear_model.unet.float()  # and no hook stays behind
    torch.testing.assert_close(
        accumulate_saliency(linear_model, [batch], c_guidance=1.0)["prompt"],
        once["prompt"],
        rtol=0.05,
        atol=0.05,
    )


def test_a_bf16_unet_takes_fp32_latents(make_tiny_model: Callable[..., LatentDiffusion]) -> None:
    generator = torch.Generator().manual_seed(5)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    context, uncond = torch.randn(2, 2, 7, 32, generator=generator)
    batch = (latents, torch.tensor([3, 900]), noise, context, uncond)
    exact = accumulate_saliency(make_tiny_model(), [batch], c_guidance=1.0)
    rough = accumulate_saliency(make_tiny_model(dtype=torch.bfloat16), [batch], c_guidance=1.0)
    a, b = (torch.cat([values.view(-1) for values in s.values()]) for s in (exact, rough))
    assert ((a - b).norm() / a.norm()).item() < 0.1


def test_fp32_gradients_sum_in_place_and_become_the_saliency_without_a_copy(
    linear_model: Any, make_batch: Any
) -> None:
    signal, places = linear_model.unet.signal, []
    hook = signal.register_post_accumulate_grad_hook(lambda p: places.append(p.grad.data_ptr()))
    batches = [make_batch(2, (3, 3), seed=seed) for seed in range(4)]
    saliency = accumulate_saliency(linear_model, batches, c_guidance=7.5)
    hook.remove()
    assert len(places) == 4
    assert set(places) == {saliency["signal"].data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_promise_29_a_tensor_without_a_gradient_is_named_instead_of_ranked_last(
    linear_model: Any, make_batch: Any, dtype: torch.dtype
) -> None:
    linear_model.unet.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    linear_model.unet.to(dtype)
    with pytest.raises(MaskError, match=r"1 of 3 tensors of the UNet have no gradient \(unused\)"):
        accumulate_saliency(linear_model, [make_batch(2, (3, 3))], c_guidance=7.5)
    assert all(p.grad is None for p in linear_model.parameters())


@pytest.mark.parametrize("w", [7.5, 0.0])
def test_of_a_network_that_predicts_v_the_loss_is_on_v(
    make_tiny_model: Callable[..., LatentDiffusion], w: float
) -> None:
    """Against v = sqrt(abar) eps - sqrt(1 - abar) z, written out; one image a timestep, up to the noisiest."""
    model = make_tiny_model(parameterization="v", unconditional=True)
    generator = torch.Generator().manual_seed(5)
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    context, uncond = torch.randn(2, 5, 7, 32, generator=generator)
    timesteps = torch.tensor([50, 500, 800, 950, 999])
    abar = model.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    noisy = (abar.sqrt() * latents + (1 - abar).sqrt() * noise).float()
    guided = (1 + w) * model.unet(noisy, timesteps, context) - w * model.unet(noisy, timesteps, uncond)
    target = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    named = dict(model.unet.named_parameters())
    gradients = torch.autograd.grad((guided - target).square().mean(), list(named.values()))
    saliency = accumulate_saliency(model, [(latents, timesteps, noise, context, uncond)], c_guidance=w)
    found = torch.cat([saliency[name].reshape(-1) for name in named])
    expected = torch.cat([gradient.abs().reshape(-1) for gradient in gradients])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_that_is_not_finite_stops_and_names_the_batch(
    linear_model: Any, make_batch: Any, dtype: torch.dtype
) -> None:
    linear_model.unet.to(dtype)
    linear_model.train()
    good, bad = make_batch(2, (3, 3), seed=1), make_batch(2, (3, 3), seed=2)
    bad[0][1, 2, 0, 0] = math.nan
    with pytest.raises(MaskError, match="batch 1 is nan"):
        accumulate_saliency(linear_model, [good, bad], c_guidance=7.5)
    assert linear_model.unet.dropout.training
    assert all(p.grad is None for p in linear_model.parameters())


def test_no_image_is_an_error(linear_model: Any) -> None:
    with pytest.raises(MaskError, match="forget set is empty"):
        accumulate_saliency(linear_model, [], c_guidance=7.5)


# ---- threshold


def test_ties_go_to_the_earlier_position_in_the_order_of_the_dict() -> None:
    saliency = {"z": torch.tensor([1.0, 2.0, 1.0]), "a": torch.tensor([[1.0, 3.0], [1.0, 1.0]])}
    mask = threshold_mask(saliency, 4 / 7)
    assert mask["z"].tolist() == [True, True, True]
    assert mask["a"].tolist() == [[False, True], [False, False]]


def test_the_most_salient_are_kept_over_all_tensors_together() -> None:
    saliency = {"small": torch.tensor([0.1, 0.2]), "large": torch.tensor([5.0, 7.0, 6.0, 0.05])}
    mask = threshold_mask(saliency, 0.5)
    assert mask["small"].tolist() == [False, False]
    assert mask["large"].tolist() == [True, True, True, False]


def test_the_count_is_int_of_the_product() -> None:
    """0.29 * 100 is 28.999..., so 28 are kept, also where all are equal."""
    assert kept(threshold_mask({"w": torch.ones(100)}, 0.29)) == 28
    assert (
        kept(threshold_mask({"w": torch.rand(100, generator=torch.Generator().manual_seed(0))}, 0.29)) == 28
    )
    assert kept(threshold_mask({"w": torch.ones(3, 3)}, 1.0)) == 9


def test_order_within_a_tensor_is_row_major_whatever_its_strides() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    mask = threshold_mask({"w": values.t().contiguous().t()}, 0.5)
    assert mask["w"].tolist() == [[True, True, True], [False, False, False]]


def test_several_thresholds_are_the_masks_of_each() -> None:
    saliency = gaussian(3)
    thresholds = [0.5, 0.1, 0.9, 0.5]
    for threshold, mask in zip(thresholds, threshold_masks(saliency, thresholds), strict=True):
        assert_same_mask(mask, threshold_mask(saliency, threshold))


def test_half_precision_saliency_is_ranked_exactly() -> None:
    saliency = {name: values.bfloat16() for name, values in gaussian().items()}
    assert_same_mask(threshold_mask(saliency, 0.3), by_stable_sort(saliency, 0.3))


def test_a_pool_is_ranked_alone() -> None:
    saliency = gaussian()
    mask = threshold_masks(saliency, [0.25], pool=["c", "a"])[0]
    assert list(mask) == list(saliency)
    assert not mask["b"].any()
    assert not mask["d"].any()
    inside = {name: saliency[name] for name in ("a", "c")}
    assert_same_mask({name: mask[name] for name in inside}, by_stable_sort(inside, 0.25))
    with pytest.raises(MaskError, match="typo"):
        threshold_masks(saliency, [0.25], pool=["a", "typo"])


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.0001, 2, math.nan, math.inf])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(MaskError, match="threshold"):
        threshold_mask(gaussian(), threshold)


def test_a_threshold_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(MaskError, match="keeps none of 4"):
        threshold_mask({"w": torch.ones(4)}, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (math.nan, "finite"),
        (math.inf, "finite"),
        (-math.inf, "finite"),
        (-1e-40, "negative"),
        (-2.0, "negative"),
    ],
)
def test_saliency_that_cannot_be_ranked_is_refused(bad: float, what: str, dtype: torch.dtype) -> None:
    saliency = {name: values.to(dtype) for name, values in gaussian().items()}
    saliency["d"][17] = bad
    with pytest.raises(MaskError, match=f"saliency of d .*{what}"):
        threshold_mask(saliency, 0.5)


def test_an_all_zero_saliency_is_refused() -> None:
    with pytest.raises(MaskError, match="every saliency is zero"):
        threshold_mask({"a": torch.zeros(5), "b": -torch.zeros(5)}, 0.5)
    assert kept(threshold_mask({"a": torch.tensor([0.0, 2.0**-149, 0.0])}, 0.4)) == 1


def test_integers_are_refused() -> None:
    with pytest.raises(MaskError, match="int64"):
        threshold_mask({"a": torch.arange(5)}, 0.5)


# ---- random control


def test_a_random_mask_has_the_same_count_and_depends_on_the_seed_alone() -> None:
    saliency = gaussian()
    random_state = torch.random.get_rng_state()
    mask = random_mask(saliency, 0.29, seed=4)
    assert kept(mask) == kept(threshold_mask(saliency, 0.29))
    assert_same_mask(random_mask({n: v + 1 for n, v in saliency.items()}, 0.29, seed=4), mask)
    assert any(
        not torch.equal(mask[name], marked) for name, marked in random_mask(saliency, 0.29, seed=5).items()
    )
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_a_random_mask_is_uniform_over_positions() -> None:
    marked = random_mask({"w": torch.empty(200_000)}, 0.3, seed=0)["w"].float()
    parts = marked.view(20, -1).mean(1)  # standard deviation of each 0.0046
    assert (parts - 0.3).abs().max() < 0.02


def test_a_random_mask_stays_in_its_pool() -> None:
    mask = random_mask(gaussian(), 0.5, seed=0, pool=["d"])
    assert kept(mask) == int(mask["d"].sum()) == 50


def test_a_mask_made_here_can_be_saved(tmp_path: Path) -> None:
    mask = threshold_mask(gaussian(), 0.4)
    masking.save_mask(mask, tmp_path / "mask.safetensors", {"concept": "Noto"})
    assert_same_mask(masking.load_mask(tmp_path / "mask.safetensors"), mask)
