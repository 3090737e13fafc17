"""UNet, autoencoder and DDIM give what diffusers gives with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mu.ldm import LatentDiffusion, sample_posterior
from mu.ldm.sampler import ddim_timesteps, sample_ddim
from tests.ldm.diffusers_names import diffusers_unet, diffusers_vae

diffusers = pytest.importorskip("diffusers")
ModelMaker = Callable[..., LatentDiffusion]
TOLERANCE = 1e-4


def relative_error(ours: Tensor, theirs: Tensor, *, least_std: float = 1e-2) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > least_std  # comparing zeros would show nothing
    return float((ours - theirs).abs().max() / theirs.abs().max())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNETS: dict[str, dict[str, Any]] = {
    "as in SD v1": {"num_heads": 4, "attention_resolutions": [1, 2]},
    "as in SD v2": {"num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True},
    "head width, convolutions": {"num_heads": -1, "num_head_channels": 32},
    "three levels, attention at one": {
        "channel_mult": [1, 2, 2],
        "attention_resolutions": [2],
        "num_res_blocks": 2,
        "num_heads": 2,
    },
    "two transformer blocks": {"transformer_depth": 2, "num_heads": 8, "use_linear_in_transformer": True},
    "other channels": {"in_channels": 5, "context_dim": 48, "channel_mult": [1, 3]},
}


@pytest.mark.parametrize("context_length", [77, 5])
@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS.keys())
@torch.no_grad()
def test_unet(make_tiny_model: ModelMaker, options: dict[str, Any], context_length: int) -> None:
    unet = make_tiny_model(unet=options, unconditional=True).unet
    theirs = diffusers_unet(unet.params, dict(unet.state_dict()))
    x = noise(3, unet.params.in_channels, 8, 12)
    context = noise(3, context_length, unet.params.context_dim or 0, seed=1)
    timesteps = torch.tensor([0, 437, 999])
    expected = theirs(x, timesteps, encoder_hidden_states=context).sample
    assert relative_error(unet(x, timesteps, context), expected) <= TOLERANCE
    # each input must matter, or the comparison is of less than it seems
    for other in (
        unet(x, timesteps.flip(0), context),
        unet(x, timesteps, context.flip(0)),
        unet(x, timesteps, context.flip(1) * 2),
    ):
        assert relative_error(other, expected) > 100 * TOLERANCE


VAES: dict[str, dict[str, Any]] = {
    "two levels": {},
    "four levels": {"ch_mult": [1, 2, 2, 4], "num_res_blocks": 2, "resolution": 32},
    "attention inside": {"attn_resolutions": [8], "num_res_blocks": 2},
}


@pytest.mark.parametrize("options", VAES.values(), ids=VAES.keys())
@torch.no_grad()
def test_autoencoder(make_tiny_model: ModelMaker, options: dict[str, Any]) -> None:
    model = make_tiny_model(autoencoder=options, unconditional=True, scale_factor=0.18215)
    params = model.first_stage_model.params
    theirs = diffusers_vae(params, dict(model.first_stage_model.state_dict()))
    images = noise(2, 3, 32, 48).clamp(-1, 1)
    mean, logvar = model.encode(images)
    posterior = theirs.encode(images).latent_dist
    assert mean.shape == (2, 4, 32 // params.factor, 48 // params.factor)
    assert relative_error(mean, posterior.mean) <= TOLERANCE
    assert relative_error(logvar, posterior.logvar) <= TOLERANCE

    unit = noise(*mean.shape, seed=1)
    latents = sample_posterior(mean, logvar, unit, model.scale_factor)
    assert relative_error(latents, 0.18215 * (posterior.mean + posterior.std * unit)) <= TOLERANCE
    assert relative_error(model.decode(latents), theirs.decode(latents / 0.18215).sample) <= TOLERANCE


def shrink(module: torch.nn.Module) -> None:
    """Make features so small that the epsilons of the norms (1e-5 and 1e-6) matter."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.02)
        else:
            parameter.mul_(0.1)


@torch.no_grad()
def test_the_epsilons_of_the_norms(make_tiny_model: ModelMaker) -> None:
    model = make_tiny_model(unconditional=True)
    shrink(model)
    unet = diffusers_unet(model.unet.params, dict(model.unet.state_dict()))
    vae = diffusers_vae(model.first_stage_model.params, dict(model.first_stage_model.state_dict()))
    x, context, timesteps = noise(2, 4, 8, 8), noise(2, 7, 32, seed=1), torch.tensor([5, 900])
    predicted = model.unet(x, timesteps, context)
    expected = unet(x, timesteps, encoder_hidden_states=context).sample
    assert relative_error(predicted, expected, least_std=1e-5) <= TOLERANCE
    images = noise(2, 3, 16, 16)
    mean = vae.encode(images).latent_dist.mean
    assert relative_error(model.encode(images)[0], mean, least_std=1e-5) <= TOLERANCE
    decoded = vae.decode(x / model.scale_factor).sample
    assert relative_error(model.decode(x), decoded, least_std=1e-5) <= TOLERANCE


@torch.no_grad()
def test_logvar_is_clamped_as_in_diffusers(make_tiny_model: ModelMaker) -> None:
    model = make_tiny_model(unconditional=True)
    model.first_stage_model.quant_conv.weight.mul_(200.0)
    theirs = diffusers_vae(model.first_stage_model.params, dict(model.first_stage_model.state_dict()))
    images = noise(2, 3, 16, 16).clamp(-1, 1)
    logvar = model.encode(images)[1]
    assert (logvar.min().item(), logvar.max().item()) == (-30.0, 20.0)
    assert relative_error(logvar, theirs.encode(images).latent_dist.logvar) <= TOLERANCE


def ddim_of_diffusers(
    model: LatentDiffusion,
    context: Tensor,
    uncond_context: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    eta: float,
    latents: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """diffusers' scheduler driving diffusers' UNet, guided as its Stable Diffusion pipeline does it."""
    unet = diffusers_unet(model.unet.params, dict(model.unet.state_dict()))
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=model.params.timesteps,
        beta_start=model.params.linear_start,
        beta_end=model.params.linear_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[model.params.parameterization],
    )
    assert relative_error(model.alphas_cumprod, scheduler.alphas_cumprod) <= 1e-5
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == ddim_timesteps(model.num_timesteps, steps)
    for t in scheduler.timesteps:
        uncond, cond = unet(
            torch.cat([latents, latents]), t, encoder_hidden_states=torch.cat([uncond_context, context])
        ).sample.chunk(2)
        guided = uncond + guidance_scale * (cond - uncond)
        drawn = torch.randn(latents.shape, generator=generator) if eta else None
        latents = scheduler.step(guided, t, latents, eta=eta, variance_noise=drawn).prev_sample
    return latents


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize(
    ("steps", "guidance_scale", "eta"),
    [(20, 7.5, 0.0), (25, 1.0, 0.0), (10, 3.0, 1.0), (4, 9.0, 0.5), (1, 2.0, 0.0)],
)
@torch.no_grad()
def test_ddim(
    make_tiny_model: ModelMaker, parameterization: str, steps: int, guidance_scale: float, eta: float
) -> None:
    model = make_tiny_model(parameterization=parameterization, unconditional=True)
    model.unet.out[2].weight.mul_(0.3)  # random networks predict too much; keep the latents near 1
    context, uncond = noise(2, 7, 32, seed=1), noise(2, 7, 32, seed=2)
    initial = noise(2, 4, 8, 8, seed=3)
    ours = sample_ddim(
        model,
        context,
        shape=(4, 8, 8),
        steps=steps,
        guidance_scale=guidance_scale,
        uncond_context=None if guidance_scale == 1 else uncond,
        eta=eta,
        initial_noise=initial,
        generator=torch.Generator().manual_seed(5),
    )
    theirs = ddim_of_diffusers(
        model,
        context,
        uncond,
        steps=steps,
        guidance_scale=guidance_scale,
        eta=eta,
        latents=initial,
        generator=torch.Generator().manual_seed(5),
    )
    assert relative_error(ours, theirs) <= TOLERANCE


@torch.no_grad()
def test_ddim_with_contexts_of_different_lengths(make_tiny_model: ModelMaker) -> None:
    # The empty prompt may be shorter, and one row may serve all prompts.
    model = make_tiny_model(unconditional=True)
    context, uncond = noise(2, 9, 32, seed=1), noise(1, 4, 32, seed=2)
    options: dict[str, Any] = {"shape": (4, 8, 8), "steps": 3, "initial_noise": noise(2, 4, 8, 8, seed=3)}
    both = sample_ddim(model, context, guidance_scale=4.0, uncond_context=uncond, **options)
    repeated = uncond.expand(2, -1, -1)
    for i in range(2):
        # attention does not see how often a token stands there if all stand there equally often
        single = sample_ddim(
            model,
            context[i : i + 1].repeat(1, 4, 1),
            guidance_scale=4.0,
            uncond_context=repeated[i : i + 1].repeat(1, 9, 1),
            **{**options, "initial_noise": options["initial_noise"][i : i + 1]},
        )
        assert relative_error(both[i : i + 1], single) <= TOLERANCE


@pytest.mark.parametrize(
    ("num_timesteps", "steps", "expected"),
    [
        (1000, 4, [751, 501, 251, 1]),
        (1000, 1, [1]),
        (1000, 7, [995, 853, 711, 569, 427, 285, 143, 1]),  # one more than asked
        (1000, 3, [1000, 667, 334, 1][1:]),
        (10, 10, [9, 8, 7, 6, 5, 4, 3, 2, 1]),  # one less: 10 is not a timestep
        (10, 6, [9, 8, 7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_timesteps_follow_the_rule(num_timesteps: int, steps: int, expected: list[int]) -> None:
    rule = [i * (num_timesteps // steps) + 1 for i in range(num_timesteps)]
    assert ddim_timesteps(num_timesteps, steps) == [t for t in rule if t < num_timesteps][::-1]
    assert ddim_timesteps(num_timesteps, steps) == expected


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps = {steps}; allowed: 1 to 1000"):
        ddim_timesteps(1000, steps)


@torch.no_grad()
def test_ddim_where_steps_do_not_divide_the_schedule(make_tiny_model: ModelMaker) -> None:
    # diffusers drops the first timestep then; from our second one on both must agree.
    model = make_tiny_model(unconditional=True, timesteps=100)
    model.unet.out[2].weight.mul_(0.3)
    seen: list[tuple[int, Tensor]] = []
    predict = model.predict_noise

    def watched(latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        seen.append((int(timesteps[0]), latents.clone()))
        return predict(latents, timesteps, context)

    model.predict_noise = watched  # type: ignore[method-assign]
    context = noise(2, 7, 32, seed=1)
    ours = sample_ddim(
        model,
        context,
        shape=(4, 8, 8),
        steps=7,
        guidance_scale=1.0,
        uncond_context=None,
        initial_noise=noise(2, 4, 8, 8, seed=3),
    )
    assert [t for t, _ in seen] == [99, 85, 71, 57, 43, 29, 15, 1]
    scheduler_latents = seen[1][1]
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=100,
        beta_start=model.params.linear_start,
        beta_end=model.params.linear_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.tolist() == [85, 71, 57, 43, 29, 15, 1]
    for t in scheduler.timesteps:
        predicted = predict(scheduler_latents, torch.full((2,), int(t)), context)
        scheduler_latents = scheduler.step(predicted, t, scheduler_latents).prev_sample
    assert relative_error(ours, scheduler_latents) <= TOLERANCE


@torch.no_grad()
def test_with_rounded_weights_the_coefficients_stay_fp32(make_tiny_model: ModelMaker) -> None:
    """The clean latents that a v network stands for at the noisiest step: bf16 coefficients cost them 2 %."""
    model = make_tiny_model(parameterization="v", unconditional=True, dtype=torch.bfloat16)
    context, latents = noise(2, 7, 32, seed=1), noise(2, 4, 8, 8, seed=3)
    t = torch.full((2,), 999)
    v = model.unet(latents.bfloat16(), t, context.bfloat16()).double()
    a = model.alphas_cumprod.double()[999]
    eps = model.predict_noise(latents, t, context)
    assert eps.dtype == torch.float32
    clean = (latents.double() - (1 - a).sqrt() * eps.double()) / a.sqrt()
    assert relative_error(clean, a.sqrt() * latents.double() - (1 - a).sqrt() * v) < 1e-4
    assert model.prediction_target(latents.bfloat16(), t, latents.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_between_the_steps_latents_are_fp32(make_tiny_model: ModelMaker) -> None:
    model = make_tiny_model(unconditional=True, dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    predict = model.predict_noise

    def watched(latents: Tensor, *args: Tensor) -> Tensor:
        seen.append(latents.dtype)
        return predict(latents, *args)

    model.predict_noise = watched  # type: ignore[method-assign]
    context = noise(2, 7, 32, seed=1).bfloat16()
    options: dict[str, Any] = {"shape": (4, 8, 8), "steps": 3, "initial_noise": noise(2, 4, 8, 8, seed=3)}
    found = sample_ddim(model, context, guidance_scale=4.0, uncond_context=context.flip(0), **options)
    assert seen == [torch.float32] * 3
    assert found.dtype == torch.bfloat16


@torch.no_grad()
def test_q_sample_is_the_schedulers_add_noise(make_tiny_model: ModelMaker) -> None:
    model = make_tiny_model(unconditional=True)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, eps = noise(4, 4, 8, 8), noise(4, 4, 8, 8, seed=1)
    timesteps = torch.tensor([0, 1, 500, 999])
    assert (
        relative_error(model.q_sample(latents, timesteps, eps), scheduler.add_noise(latents, eps, timesteps))
        <= 1e-5
    )
