"""The shape of each network as one frozen params dataclass; `mu.ldm.model_config` reads them from a CompVis YAML."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UNetParams:
    """Shape of the UNet. Names are those of `unet_config.params`."""

    in_channels: int
    out_channels: int
    model_channels: int
    attention_resolutions: tuple[int, ...]
    """Downsampling factors (1, 2, 4, ...) at which there are spatial transformers."""
    num_res_blocks: int
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    num_heads: int = -1
    num_head_channels: int = -1
    """Exactly one of num_heads and num_head_channels is set; the other is -1."""
    transformer_depth: int = 1
    context_dim: int | None = None
    use_linear_in_transformer: bool = False
    dropout: float = 0.0
    image_size: int = 32
    """Side of the latents, in latent pixels; `LatentDiffusionParams.image_size` goes before it."""

    def heads_of(self, channels: int) -> tuple[int, int]:
        """(heads, channels a head) of a transformer on `channels` channels."""
        if self.num_head_channels != -1:
            return channels // self.num_head_channels, self.num_head_channels
        return self.num_heads, channels // self.num_heads


@dataclass(frozen=True, kw_only=True)
class AutoencoderParams:
    """Shape of the autoencoder. Names are those of `first_stage_config.params` and its `ddconfig`."""

    embed_dim: int
    z_channels: int
    resolution: int
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0

    @property
    def factor(self) -> int:
        """Image pixels to a latent pixel, along a side."""
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True, kw_only=True)
class TextEncoderParams:
    """Shape of the CLIP text encoder; the defaults are ViT-L/14, the encoder of SD v1."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    max_length: int = 77


@dataclass(frozen=True, kw_only=True)
class OpenClipParams:
    """Shape of an OpenCLIP text encoder; the defaults are ViT-H/14, the encoder of SD v2."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    """All layers of the encoder; with `layer` penultimate the last one is not run."""
    num_attention_heads: int = 16
    max_length: int = 77
    layer: str = "last"
    """Whose output is the embedding, after the final layer norm: "last" or "penultimate"."""

    @property
    def layers_run(self) -> int:
        return self.num_hidden_layers - (self.layer == "penultimate")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionParams:
    """A whole latent diffusion model."""

    unet: UNetParams
    first_stage: AutoencoderParams
    cond_stage: TextEncoderParams | OpenClipParams | None
    linear_start: float = 1e-4
    linear_end: float = 2e-2
    timesteps: int = 1000
    scale_factor: float = 1.0
    image_size: int | None = None
    """Side of the latents, in latent pixels, that the model was trained on. SD v1's YAML leaves the UNet's at 32."""
    parameterization: str = "eps"
    """What the UNet predicts: "eps" (noise) or "v" (velocity, Salimans & Ho 2022)."""

    @property
    def image_step(self) -> int:
        """Of what the side of an image, in pixels, must be a multiple: each level of autoencoder and UNet halves it."""
        return int(self.first_stage.factor * 2 ** (len(self.unet.channel_mult) - 1))
