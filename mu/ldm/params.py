"""The shape of each network as one frozen params dataclass, and whether a model of these can be built and run.

`mu.ldm.model_config` reads them from a CompVis YAML.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

VOCAB_SIZE = 49408
"""Tokens of CLIP's vocabulary, which OpenCLIP has too."""
START_TOKEN, END_TOKEN = 49406, 49407
NORM_GROUPS = 32
"""Groups of every GroupNorm: the channels that it is given must be a multiple."""
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "relu", "silu")
"""Activations of a CLIP text encoder."""

# Least and largest value of a field, or of each of its items; None is not looked at.
_WIDTH, _COUNT, _FACTOR = {"allowed": (1, 65536)}, {"allowed": (1, 1000)}, {"allowed": (1, 1024)}
_HEADS, _INNER = {"allowed": (-1, 65536)}, {"allowed": (1, 262144)}
_SIDE, _TOKENS, _STEPS = {"allowed": (1, 8192)}, {"allowed": (2, 4096)}, {"allowed": (1, 100_000)}
_LEVELS = 10
_LEAST_LOG_SIGNAL = -60


@dataclass(frozen=True, kw_only=True)
class UNetParams:
    """Shape of the UNet. Names are those of `unet_config.params`."""

    in_channels: int = field(metadata=_WIDTH)
    out_channels: int = field(metadata=_WIDTH)
    model_channels: int = field(metadata=_WIDTH)
    attention_resolutions: tuple[int, ...] = field(metadata=_WIDTH)
    """Downsampling factors (1, 2, 4, ...) at which there are spatial transformers."""
    num_res_blocks: int = field(metadata=_COUNT)
    channel_mult: tuple[int, ...] = field(default=(1, 2, 4, 8), metadata=_FACTOR)
    num_heads: int = field(default=-1, metadata=_HEADS)
    num_head_channels: int = field(default=-1, metadata=_HEADS)
    """Exactly one of num_heads and num_head_channels is set; the other is -1."""
    transformer_depth: int = field(default=1, metadata=_COUNT)
    context_dim: int | None = field(default=None, metadata=_WIDTH)
    use_linear_in_transformer: bool = False
    dropout: float = 0.0
    image_size: int = field(default=32, metadata=_SIDE)
    """Side of the latents, in latent pixels; `LatentDiffusionParams.image_size` goes before it."""

    def heads_of(self, channels: int) -> tuple[int, int]:
        """(heads, channels a head) of a transformer on `channels` channels."""
        if self.num_head_channels != -1:
            return channels // self.num_head_channels, self.num_head_channels
        return self.num_heads, channels // self.num_heads

    @property
    def attends(self) -> list[bool]:
        """Whether each level has spatial transformers, the highest resolution first."""
        return [2**level in self.attention_resolutions for level in range(len(self.channel_mult))]


@dataclass(frozen=True, kw_only=True)
class AutoencoderParams:
    """Shape of the autoencoder. Names are those of `first_stage_config.params` and its `ddconfig`."""

    embed_dim: int = field(metadata=_WIDTH)
    z_channels: int = field(metadata=_WIDTH)
    resolution: int = field(metadata=_WIDTH)
    in_channels: int
    out_ch: int
    ch: int = field(metadata=_WIDTH)
    ch_mult: tuple[int, ...] = field(metadata=_FACTOR)
    num_res_blocks: int = field(metadata=_COUNT)
    attn_resolutions: tuple[int, ...] = field(default=(), metadata=_WIDTH)
    dropout: float = 0.0

    @property
    def factor(self) -> int:
        """Image pixels to a latent pixel, along a side."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def attends(self) -> list[bool]:
        """Whether each level has attention, the highest resolution first."""
        return [self.resolution // 2**level in self.attn_resolutions for level in range(len(self.ch_mult))]


@dataclass(frozen=True, kw_only=True)
class TextEncoderParams:
    """Shape of the CLIP text encoder; the defaults are ViT-L/14, the encoder of SD v1."""

    hidden_size: int = field(default=768, metadata=_WIDTH)
    intermediate_size: int = field(default=3072, metadata=_INNER)
    num_hidden_layers: int = field(default=12, metadata=_COUNT)
    num_attention_heads: int = field(default=12, metadata=_WIDTH)
    hidden_act: str = "quick_gelu"
    max_length: int = field(default=77, metadata=_TOKENS)

    @property
    def layers_run(self) -> int:
        return self.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class OpenClipParams:
    """Shape of an OpenCLIP text encoder; the defaults are ViT-H/14, the encoder of SD v2."""

    hidden_size: int = field(default=1024, metadata=_WIDTH)
    intermediate_size: int = field(default=4096, metadata=_INNER)
    num_hidden_layers: int = field(default=24, metadata=_COUNT)
    """All layers of the encoder; with `layer` penultimate the last one is not run."""
    num_attention_heads: int = field(default=16, metadata=_WIDTH)
    max_length: int = field(default=77, metadata=_TOKENS)
    layer: str = "last"
    """Whose output is the embedding, after the final layer norm: "last" or "penultimate"."""

    @property
    def layers_run(self) -> int:
        return self.num_hidden_layers - (self.layer == "penultimate")

    @property
    def not_run(self) -> tuple[str, ...]:
        """Beginnings of the keys that checkpoints have for this encoder and that nothing runs."""
        layers = range(self.layers_run, self.num_hidden_layers)
        names = (
            "text_projection",
            "logit_scale",
            "attn_mask",
            *(f"transformer.resblocks.{i}." for i in layers),
        )
        return tuple(f"cond_stage_model.model.{name}" for name in names)


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionParams:
    """A whole latent diffusion model."""

    unet: UNetParams
    first_stage: AutoencoderParams
    cond_stage: TextEncoderParams | OpenClipParams | None
    linear_start: float = 1e-4
    linear_end: float = 2e-2
    timesteps: int = field(default=1000, metadata=_STEPS)
    scale_factor: float = 1.0
    image_size: int | None = field(default=None, metadata=_SIDE)
    """Side of the latents, in latent pixels, that the model was trained on. SD v1's YAML leaves the UNet's at 32."""
    parameterization: str = "eps"
    """What the UNet predicts: "eps" (noise) or "v" (velocity, Salimans & Ho 2022)."""

    @property
    def latent_side(self) -> int:
        """Side of the latents, in latent pixels, that the model was trained on."""
        return self.image_size or self.unet.image_size

    @property
    def image_step(self) -> int:
        """Of what the side of an image, in pixels, must be a multiple: each level of autoencoder and UNet halves it."""
        return int(self.first_stage.factor * 2 ** (len(self.unet.channel_mult) - 1))


def structure_problems(params: LatentDiffusionParams) -> list[str]:
    """Why a model cannot be built or run, found before torch refuses it at the first step.

    Returns:
        A sentence for each problem, with key, value and what is allowed; empty where there is none.
    """
    sections: dict[str, Any] = {
        "model": params,
        "unet_config": params.unet,
        "first_stage_config": params.first_stage,
    }
    if params.cond_stage is not None:
        sections["cond_stage_config"] = params.cond_stage
    out_of_range = [
        problem for name, section in sections.items() for problem in _range_problems(name, section)
    ]
    # The others divide by these numbers.
    return out_of_range or [
        *_unet_problems(params.unet),
        *_autoencoder_problems(params.first_stage),
        *_text_problems(params),
        *_latent_problems(params),
        *_schedule_problems(params),
    ]


def other_inputs(more: int, latent: int) -> str:
    """What a UNet is, by how many channels it takes beside those of the latents; "" where that is not known."""
    kinds = {
        latent + 1: "an inpainting model",
        latent: "InstructPix2Pix, which edits images",
        1: "a depth model",
        3: "an upscaler",
    }
    return kinds.get(more, "")


def _range_problems(name: str, section: Any) -> Iterator[str]:
    for key, (least, largest) in (
        (one.name, one.metadata["allowed"]) for one in fields(section) if "allowed" in one.metadata
    ):
        value = getattr(section, key)
        items = value if isinstance(value, tuple) else (value,)
        if any(item is not None and not least <= item <= largest for item in items):
            shown = list(value) if isinstance(value, tuple) else value
            yield f"{name}.{key} = {shown}; allowed: {least:,} to {largest:,}"
    for key in ("channel_mult", "ch_mult"):
        levels = len(getattr(section, key, (1,)))
        if not 1 <= levels <= _LEVELS:
            yield f"{name}.{key} has {levels} levels; allowed: 1 to {_LEVELS}"
    dropout = getattr(section, "dropout", 0.0)
    if not 0 <= dropout < 1:
        yield f"{name}.dropout = {dropout}; allowed: from 0 to below 1"
    if isinstance(section, LatentDiffusionParams):
        start, end = section.linear_start, section.linear_end
        if not 0 < start <= end < 1:
            yield (
                f"{name}.linear_start = {start} and linear_end = {end}; allowed: 0 < linear_start <= linear_end < 1 "
                "(Stable Diffusion: 0.00085 and 0.0120)"
            )
        if not (math.isfinite(section.scale_factor) and section.scale_factor > 0):
            yield f"{name}.scale_factor = {section.scale_factor}; allowed: above 0 (Stable Diffusion: 0.18215)"


def _unet_problems(unet: UNetParams) -> Iterator[str]:
    name = "unet_config"
    heads = [key for key in ("num_heads", "num_head_channels") if getattr(unet, key) != -1]
    if len(heads) != 1 or getattr(unet, heads[0]) < 1:
        yield (
            f"{name}.params needs one of num_heads and num_head_channels, not both, as a number above 0; they are "
            f"{unet.num_heads} and {unet.num_head_channels}"
        )
        return
    if unet.model_channels % NORM_GROUPS:
        yield f"{name}.model_channels = {unet.model_channels}; it must be divisible by {NORM_GROUPS}"
        return
    # Besides the levels that are asked for, the middle block has attention, as wide as the last level.
    attended = [mult for mult, attends in zip(unet.channel_mult, unet.attends, strict=True) if attends]
    for mult in dict.fromkeys([*attended, unet.channel_mult[-1]]):
        channels = mult * unet.model_channels
        count, width = unet.heads_of(channels)
        if count * width != channels or not width:
            yield (
                f"{name}.{heads[0]} = {getattr(unet, heads[0])} does not divide the {channels} channels of a level "
                "(model_channels x channel_mult)"
            )


def _autoencoder_problems(stage: AutoencoderParams) -> Iterator[str]:
    name = "first_stage_config"
    for mult in dict.fromkeys(stage.ch_mult):
        if mult * stage.ch % NORM_GROUPS:
            yield (
                f"{name}.ch = {stage.ch} with ch_mult {mult} gives {mult * stage.ch} channels; they must be "
                f"divisible by {NORM_GROUPS}"
            )
    if stage.ch % NORM_GROUPS:
        yield f"{name}.ch = {stage.ch}; it must be divisible by {NORM_GROUPS}"
    for key in ("in_channels", "out_ch"):
        if getattr(stage, key) != 3:
            yield f"{name}.{key} = {getattr(stage, key)}; allowed: 3, the channels of an RGB image"


def _text_problems(params: LatentDiffusionParams) -> Iterator[str]:
    name, text = "cond_stage_config", params.cond_stage
    if text is None:
        return
    if text.hidden_size % text.num_attention_heads:
        yield (
            f"{name}.num_attention_heads = {text.num_attention_heads} does not divide hidden_size = {text.hidden_size}"
        )
    if isinstance(text, OpenClipParams):
        if text.layer not in ("last", "penultimate"):
            yield f"{name}.layer is {text.layer!r}; allowed: last, penultimate (SD v2)"
        elif text.layers_run < 1:
            yield f"{name}.num_hidden_layers = {text.num_hidden_layers} leaves no layer before the penultimate one"
    elif text.hidden_act not in ACTIVATIONS:
        yield f"{name}.hidden_act is {text.hidden_act!r}; allowed: {', '.join(ACTIVATIONS)}"
    if params.unet.context_dim != text.hidden_size:
        given = params.unet.context_dim
        yield (
            f"the text encoder is {text.hidden_size} wide (cond_stage_config), unet_config.params.context_dim is "
            f"{'missing' if given is None else given}; they must be equal: 768 with CLIP "
            "(SD v1), 1024 with OpenCLIP (SD v2)"
        )


def _latent_problems(params: LatentDiffusionParams) -> Iterator[str]:
    unet, stage = params.unet, params.first_stage
    if unet.out_channels != stage.embed_dim:
        yield (
            f"latents have first_stage_config.embed_dim {stage.embed_dim} channels, the UNet gives out_channels "
            f"{unet.out_channels}; they must be equal"
        )
    if unet.in_channels != stage.embed_dim:
        kind = other_inputs(unet.in_channels - stage.embed_dim, stage.embed_dim)
        advice = (
            f". It looks like {kind}, which is given another image beside the prompt and cannot be run here: take the "
            "text-to-image model that it was made from"
        )
        yield (
            f"unet_config.in_channels = {unet.in_channels}, and latents have {stage.embed_dim} channels (embed_dim); "
            f"they must be equal{advice if kind else ''}"
        )
    side, step = params.latent_side, 2 ** (len(unet.channel_mult) - 1)
    if side % step:
        yield (
            f"image_size = {side} latent pixels; the {len(unet.channel_mult)} levels of the UNet halve it "
            f"{len(unet.channel_mult) - 1} times, so it must be divisible by {step}"
        )
    # The first block of the lowest level is given the channels of the one before.
    lowest = {"unet_config": (side // step, min(unet.channel_mult[-2:]) * unet.model_channels)}
    lowest["first_stage_config"] = (side, min(stage.ch_mult[-2:]) * stage.ch)
    for name, (pixels, channels) in lowest.items():
        if pixels == 1 and channels == NORM_GROUPS:
            yield (
                f"image_size = {side} latent pixels leaves one pixel at the lowest level of {name}, of {channels} "
                "channels: too little for a group norm; allowed: twice as large"
            )


def _schedule_problems(params: LatentDiffusionParams) -> Iterator[str]:
    start, end, steps = params.linear_start**0.5, params.linear_end**0.5, params.timesteps
    betas = ((start + (end - start) * t / max(1, steps - 1)) ** 2 for t in range(steps))
    # Of abar, the squared share of the image in the last latents.
    log_signal = sum(math.log1p(-beta) for beta in betas)
    if log_signal < _LEAST_LOG_SIGNAL:
        yield (
            f"linear_start = {params.linear_start}, linear_end = {params.linear_end} and timesteps = "
            f"{params.timesteps} leave exp({log_signal:.0f}) of an image at the last step, which fp32 cannot "
            f"hold; allowed: at least exp({_LEAST_LOG_SIGNAL}) (Stable Diffusion: 0.00085, 0.0120 and 1000)"
        )
