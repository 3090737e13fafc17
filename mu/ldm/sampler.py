"""DDIM sampling (Song et al. 2021) as pure functions: model, contexts and numbers in, latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mu.ldm.latent_diffusion import LatentDiffusion


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """The timesteps i * (T // S) + 1 that stay below T, largest first; one more than S where S does not divide T.

    Raises:
        ValueError: steps is not in 1 .. num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps = {steps}; allowed: 1 to {num_timesteps}, the model's number of timesteps")
    return list(range(1, num_timesteps, num_timesteps // steps))[::-1] or [0]


def guided_noise(
    model: LatentDiffusion,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor,
    *,
    uncond_context: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guided prediction uncond + scale (cond - uncond) (Ho & Salimans 2022), (B, C, H, W).

    Both branches go through the network in one call where their contexts have the same length. fp32 (or wider).
    """
    if guidance_scale == 1.0:
        return model.predict_noise(latents, timesteps, context)
    if uncond_context is None:
        raise ValueError(
            f"guidance_scale = {guidance_scale} needs uncond_context, the embedding of the empty prompt"
        )
    uncond_context = uncond_context.expand(len(context), -1, -1)
    if uncond_context.shape == context.shape:
        both = model.predict_noise(
            torch.cat([latents, latents]),
            torch.cat([timesteps, timesteps]),
            torch.cat([uncond_context, context]),
        )
        uncond, cond = both.chunk(2)
    else:
        uncond = model.predict_noise(latents, timesteps, uncond_context)
        cond = model.predict_noise(latents, timesteps, context)
    return uncond + guidance_scale * (cond - uncond)


@torch.no_grad()
def sample_ddim(
    model: LatentDiffusion,
    context: Tensor,
    *,
    shape: tuple[int, int, int],
    steps: int,
    guidance_scale: float,
    uncond_context: Tensor | None,
    eta: float = 0.0,
    initial_noise: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    first_step: int = 0,
    stop_after: int | None = None,
    after_step: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample latents with DDIM.

    Args:
        context: (B, L, D) embeddings of the prompts.
        shape: (C, H, W) of a latent.
        steps: number of DDIM steps S; for the timesteps see `ddim_timesteps`.
        guidance_scale: 1 is no guidance.
        uncond_context: (B or 1, L', D) embedding of the empty prompt; not needed at guidance_scale 1.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        initial_noise: (B, C, H, W); drawn when absent.
        generator: for what is drawn here (the initial noise, and the noise of eta > 0); one for each image makes an
            image independent of the batch it is in.
        first_step: leave out so many steps; the initial noise must be latents as noisy as the timestep at that place.
        stop_after: do only so many steps; the latents are then as noisy as the timestep at that place. None: all.
        after_step: is told after each step how many are done.

    Between the steps latents are fp32 (or wider), whatever the networks compute in.

    Returns:
        (B, C, H, W) scaled latents of the context's dtype, for `LatentDiffusion.decode`.
    """
    device, dtype = context.device, torch.promote_types(context.dtype, torch.float32)
    batch = len(context)

    def draw() -> Tensor:
        if generator is None or isinstance(generator, torch.Generator):
            return torch.randn((batch, *shape), generator=generator).to(device, dtype)
        return torch.stack([torch.randn(shape, generator=one) for one in generator]).to(device, dtype)

    latents = draw() if initial_noise is None else initial_noise.to(device, dtype)
    if latents.shape != (batch, *shape):
        raise ValueError(f"initial_noise has shape {tuple(latents.shape)}, expected {(batch, *shape)}")

    timesteps = ddim_timesteps(model.num_timesteps, steps)
    abar = model.alphas_cumprod.double().tolist()
    for i, t in list(enumerate(timesteps[:stop_after]))[first_step:]:
        a = abar[t]
        a_next = abar[timesteps[i + 1]] if i + 1 < len(timesteps) else abar[0]
        noise = guided_noise(
            model,
            latents,
            torch.full((batch,), t, dtype=torch.int64, device=device),
            context,
            uncond_context=uncond_context,
            guidance_scale=guidance_scale,
        )
        # Song et al. 2021, equations 12 and 16
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        clean = (latents - (1 - a) ** 0.5 * noise) / a**0.5
        latents = a_next**0.5 * clean + max(1 - a_next - sigma**2, 0.0) ** 0.5 * noise
        if sigma:
            latents = latents + sigma * draw()
        if after_step is not None:
            after_step(i + 1 - first_step)
    return latents.to(context.dtype)
