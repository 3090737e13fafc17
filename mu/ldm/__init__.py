"""Latent diffusion models with CompVis' parameter names. Knows nothing of unlearning."""

from __future__ import annotations

from mu.ldm.checkpoint import describe_checkpoint, load_model, save_checkpoint
from mu.ldm.latent_diffusion import LatentDiffusion, NoTextEncoderError, sample_posterior
from mu.ldm.model_config import ModelConfigError, load_model_config
from mu.ldm.params import LatentDiffusionParams
from mu.ldm.recognise import CheckpointDescription
from mu.ldm.tensor_file import CheckpointError

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
