"""The latent diffusion model: an autoencoder, a text encoder, a UNet and a noise schedule under CompVis' names."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mu.errors import MuError
from mu.ldm.autoencoder import AutoencoderKL
from mu.ldm.params import LatentDiffusionParams, OpenClipParams, TextEncoderParams
from mu.ldm.schedule import schedule_buffers
from mu.ldm.unet import UNet


class NoTextEncoderError(MuError, RuntimeError):
    """A prompt was given to a model that has no text encoder."""


class ImageSizeError(MuError, ValueError):
    """Images of a size that the model cannot draw."""

    exit_code = 2


class LatentDiffusion(nn.Module):
    """A latent diffusion model whose `state_dict()` has the keys of a CompVis checkpoint.

    Args:
        params: see `mu.ldm.model_config`.
        device: where the weights are made; "meta" builds the structure alone.
        initialise: False leaves the weights of UNet and autoencoder undefined, for a caller that loads them.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self, params: LatentDiffusionParams, *, device: str | torch.device = "cpu", initialise: bool = True
    ) -> None:
        super().__init__()
        self.params = params
        self.file_dtypes: dict[str, torch.dtype] = {}
        """key -> dtype in the file that was loaded: `save_checkpoint` writes each tensor back in it."""
        self.file_has_ema = False
        """Whether the file that was loaded has an EMA copy of the UNet."""
        self.carried: dict[str, Tensor] = {}
        """Tensors of the file that belong to the model but are not run: written back as they were, on the CPU."""
        device = torch.device(device)
        for name, values in schedule_buffers(
            params.linear_start, params.linear_end, params.timesteps
        ).items():
            self.register_buffer(name, values.to(device))
        with torch.device(device if initialise else "meta"):
            self.model = nn.ModuleDict({"diffusion_model": UNet(params.unet)})
            self.first_stage_model = AutoencoderKL(params.first_stage)
        self.cond_stage_model = _text_encoder(params.cond_stage, device, initialise=initialise)
        if not initialise:
            self.model.to_empty(device=device)
            self.first_stage_model.to_empty(device=device)

    @property
    def unet(self) -> UNet:
        """The network that unlearning changes; parameter names relative to it are the names in a mask."""
        unet = self.model["diffusion_model"]
        assert isinstance(unet, UNet)
        return unet

    @property
    def num_timesteps(self) -> int:
        return self.params.timesteps

    @property
    def scale_factor(self) -> float:
        """Latents are scaled by this, so that their standard deviation is about 1."""
        return self.params.scale_factor

    @property
    def device(self) -> torch.device:
        return self.betas.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the UNet's weights."""
        return next(self.unet.parameters()).dtype

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels, that the model was trained on."""
        return self.params.latent_side * self.params.first_stage.factor

    def is_carried(self, key: str) -> bool:
        """Whether a checkpoint's key belongs to this model though the model does not run it, see `carried`."""
        text = self.params.cond_stage
        return isinstance(text, OpenClipParams) and key.startswith(text.not_run)

    def latent_shape(self, image_size: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of square images of `image_size` pixels.

        Raises:
            ImageSizeError: the levels of autoencoder and UNet cannot halve such images.
        """
        size, step = image_size or self.image_size, self.params.image_step
        if size % step:
            raise ImageSizeError(
                f"image_size = {size} px: this model needs a multiple of {step} px, for example "
                f"{max(step, round(size / step) * step)}"
            )
        side = size // self.params.first_stage.factor
        return self.params.first_stage.embed_dim, side, side

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled posterior moments of images.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            mean and logvar, each (B, C, H/f, W/f); logvar clamped to [-30, 20].
        """
        return self.first_stage_model.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], from scaled latents (B, C, H/f, W/f)."""
        return self.first_stage_model.decode(latents / self.scale_factor)

    def embed(self, prompts: list[str]) -> Tensor:
        """Prompt embeddings (B, 77, D).

        Raises:
            NoTextEncoderError: the model was configured without a text encoder.
        """
        if self.cond_stage_model is None:
            raise NoTextEncoderError(
                "this model has no text encoder (cond_stage_config: __is_unconditional__): pass a context tensor"
            )
        return self.cond_stage_model(prompts)

    def q_sample(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Noisy latents z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps (Ho et al. 2020, equation 4).

        Args:
            latents: (B, C, H, W), scaled.
            timesteps: (B,) integers in 0 .. num_timesteps - 1.
            noise: (B, C, H, W).
        """
        signal, sigma = self._signal_and_sigma(timesteps)  # two of (B, 1, 1, 1)
        return (signal * latents + sigma * noise).to(latents.dtype)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """What the network itself predicts: the noise eps, or v, as the model's parameterization says.

        Losses are taken of this: see `prediction_target`.

        Args:
            noisy_latents: (B, C, H, W); cast to the dtype of the weights, as the context is.
            timesteps: (B,) integers.
            context: (B, L, D), any L.

        Returns:
            (B, C, H, W), fp32 (or wider) whatever the dtype of the weights.
        """
        dtype = self.dtype
        prediction = self.unet(noisy_latents.to(dtype), timesteps, context.to(dtype))  # (B, C, H, W)
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))

    def prediction_target(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """What `predict` shall give for `q_sample` of the same arguments: eps, or v.

        v = sqrt(abar) eps - sqrt(1 - abar) z (Salimans & Ho 2022, section 4). Losses on eps of a network that predicts
        v would be those on v times abar_t, 0.005 at the last timestep of Stable Diffusion: its noisy steps would
        hardly count.

        Returns:
            (B, C, H, W), fp32 (or wider).
        """
        if self.params.parameterization == "v":
            signal, sigma = self._signal_and_sigma(timesteps)  # two of (B, 1, 1, 1)
            return signal * noise - sigma * latents
        return noise.to(torch.promote_types(noise.dtype, torch.float32))

    def predict_noise(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The model's estimate of the noise, whatever quantity its network predicts; arguments as of `predict`.

        Returns:
            (B, C, H, W), fp32 (or wider).
        """
        prediction = self.predict(noisy_latents, timesteps, context)  # (B, C, H, W)
        if self.params.parameterization == "v":  # eps = sqrt(abar) v + sqrt(1 - abar) z_t
            signal, sigma = self._signal_and_sigma(timesteps)  # two of (B, 1, 1, 1)
            return signal * prediction + sigma * noisy_latents
        return prediction

    def _signal_and_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), (B, 1, 1, 1), in the schedule's fp32 whatever the latents' dtype."""
        shape = (-1, 1, 1, 1)
        signal, sigma = self.sqrt_alphas_cumprod[timesteps], self.sqrt_one_minus_alphas_cumprod[timesteps]
        return signal.view(shape), sigma.view(shape)

    def cast_weights(self, dtype: torch.dtype) -> LatentDiffusion:
        """Change the dtype of all weights; the schedule stays fp32."""
        for child in self.children():
            child.to(dtype)
        return self


class Predictor(Protocol):
    """What the losses need of a target model: `mu.ldm.LatentDiffusion`, or something that stands in for it."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor: ...


PredictionInputs = tuple[Tensor, Tensor, Tensor]
"""noisy latents (B, C, H, W), timesteps (B,), context (B, L, D)."""


def predict_pair(
    model: Predictor, first: PredictionInputs, second: PredictionInputs
) -> tuple[Tensor, Tensor]:
    """Two predictions (B, C, H, W), (B', C, H, W) in one call where the shapes allow it, else in two."""
    if any(a.shape[1:] != b.shape[1:] for a, b in zip(first, second, strict=True)):
        return model.predict(*first), model.predict(*second)
    joined = (torch.cat(pair) for pair in zip(first, second, strict=True))  # (B + B', ...) each
    both = model.predict(*joined)  # (B + B', C, H, W)
    return both[: len(first[0])], both[len(first[0]) :]


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor, scale_factor: float) -> Tensor:
    """Scaled latents z = scale_factor (mean + sigma noise) from posterior moments; all (B, C, H, W)."""
    return scale_factor * (mean + torch.exp(0.5 * logvar) * noise)


def _text_encoder(
    params: TextEncoderParams | OpenClipParams | None, device: torch.device, *, initialise: bool
) -> nn.Module | None:
    if params is None:
        return None
    from mu.ldm.text_encoder import OpenClipTextEncoder, TextEncoder  # late: it imports transformers

    if isinstance(params, TextEncoderParams):  # its buffers are made with it, so it is always initialised
        with torch.device(device):
            return TextEncoder(params)
    with torch.device(device if initialise else "meta"):
        encoder = OpenClipTextEncoder(params)
    return encoder if initialise else encoder.to_empty(device=device)
