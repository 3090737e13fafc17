"""Latent diffusion models with CompVis' parameter names. Knows nothing of unlearning."""

from __future__ import annotations

from mu.ldm.checkpoint import CheckpointError, save_checkpoint
from mu.ldm.formats import CheckpointDescription, describe_checkpoint
from mu.ldm.latent_diffusion import LatentDiffusion, NoTextEncoderError, load_model, sample_posterior
from mu.ldm.model_config import LatentDiffusionParams, ModelConfigError, load_model_config

__all__ = [
    "CheckpointDescription",
    "CheckpointError",
    "LatentDiffusion",
    "LatentDiffusionParams",
    "ModelConfigError",
    "NoTextEncoderError",
    "describe_checkpoint",
    "load_model",
    "load_model_config",
    "sample_posterior",
    "save_checkpoint",
]
