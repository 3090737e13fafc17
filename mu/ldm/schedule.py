"""The noise schedule: betas linear in their square root, and what CompVis checkpoints store of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def schedule_buffers(linear_start: float, linear_end: float, num_timesteps: int) -> dict[str, Tensor]:
    """All schedule constants, computed in fp64 and rounded once to fp32.

    `betas` are the squares of `num_timesteps` equal steps from sqrt(linear_start) to sqrt(linear_end); the others
    follow from them (Ho et al. 2020, equations 4 and 7). Names and order are those of CompVis checkpoints.

    Returns:
        name -> (num_timesteps,) fp32.
    """
    betas = np.linspace(linear_start**0.5, linear_end**0.5, num_timesteps, dtype=np.float64) ** 2
    alphas = 1.0 - betas
    abar = np.cumprod(alphas)
    abar_prev = np.append(1.0, abar[:-1])
    posterior_variance = betas * (1.0 - abar_prev) / (1.0 - abar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": abar_prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
        "log_one_minus_alphas_cumprod": np.log(1.0 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1.0),
        "posterior_variance": posterior_variance,
        # The first variance is 0: its logarithm is cut off.
        "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1.0 - abar),
        "posterior_mean_coef2": (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
    }
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in buffers.items()}


SCHEDULE_KEYS = frozenset((*schedule_buffers(1e-4, 2e-2, 2), "logvar", "lvlb_weights"))
"""What CompVis checkpoints store of the schedule; the last two belong to losses that are not used here."""
