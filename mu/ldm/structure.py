"""Whether a model of these params can be built and run: what torch would refuse at the first step, said beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mu.ldm.params import (
    AutoencoderParams,
    LatentDiffusionParams,
    OpenClipParams,
    TextEncoderParams,
    UNetParams,
)

NORM_GROUPS = 32
"""Groups of every GroupNorm: the channels that it is given must be a multiple."""
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "relu", "silu")
"""Activations of a CLIP text encoder."""
_WIDTH, _COUNT, _FACTOR = (1, 65536), (1, 1000), (1, 1024)
# Least and largest value of a key; of a list, of each of its items. None in the YAML is not looked at.
_RANGES: dict[type, dict[str, tuple[float, float]]] = {
    UNetParams: {
        "in_channels": _WIDTH,
        "out_channels": _WIDTH,
        "model_channels": _WIDTH,
        "attention_resolutions": (1, 65536),
        "num_res_blocks": _COUNT,
        "channel_mult": _FACTOR,
        "num_heads": (-1, 65536),
        "num_head_channels": (-1, 65536),
        "transformer_depth": _COUNT,
        "context_dim": _WIDTH,
        "image_size": (1, 8192),
    },
    AutoencoderParams: {
        "embed_dim": _WIDTH,
        "z_channels": _WIDTH,
        "resolution": (1, 65536),
        "ch": _WIDTH,
        "ch_mult": _FACTOR,
        "num_res_blocks": _COUNT,
        "attn_resolutions": (1, 65536),
    },
    TextEncoderParams: {
        "hidden_size": _WIDTH,
        "intermediate_size": (1, 262144),
        "num_hidden_layers": _COUNT,
        "num_attention_heads": _WIDTH,
        "max_length": (2, 4096),
    },
    LatentDiffusionParams: {"timesteps": (1, 100_000), "image_size": (1, 8192)},
}
_RANGES[OpenClipParams] = _RANGES[TextEncoderParams]
_LEVELS = 10
_LEAST_LOG_SIGNAL = -60


def structure_problems(params: LatentDiffusionParams) -> list[str]:
    """Why a model cannot be built or run; a sentence each, with key, value and what is allowed. Empty where it can."""
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


def _range_problems(name: str, section: Any) -> Iterator[str]:
    for key, (least, largest) in _RANGES[type(section)].items():
        value = getattr(section, key)
        items = value if isinstance(value, tuple) else (value,)
        if any(item is not None and not least <= item <= largest for item in items):
            yield f"{name}.{key} = {_shown(value)}; allowed: {least:,} to {largest:,}"
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
    levels = enumerate(unet.channel_mult)
    attended = [mult for level, mult in levels if 2**level in unet.attention_resolutions]
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
    side, step = params.image_size or unet.image_size, 2 ** (len(unet.channel_mult) - 1)
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


def other_inputs(more: int, latent: int) -> str:
    """What a UNet is, by how many channels it takes beside those of the latents; "" where that is not known."""
    kinds = {
        latent + 1: "an inpainting model",
        latent: "InstructPix2Pix, which edits images",
        1: "a depth model",
        3: "an upscaler",
    }
    return kinds.get(more, "")


def _schedule_problems(params: LatentDiffusionParams) -> Iterator[str]:
    start, end, steps = params.linear_start**0.5, params.linear_end**0.5, params.timesteps
    betas = ((start + (end - start) * t / max(1, steps - 1)) ** 2 for t in range(steps))
    log_signal = sum(
        math.log1p(-beta) for beta in betas
    )  # of abar, the squared share of the image in the last latents
    if log_signal < _LEAST_LOG_SIGNAL:
        yield (
            f"linear_start = {params.linear_start}, linear_end = {params.linear_end} and timesteps = "
            f"{params.timesteps} leave exp({log_signal:.0f}) of an image at the last step, which fp32 cannot "
            f"hold; allowed: at least exp({_LEAST_LOG_SIGNAL}) (Stable Diffusion: 0.00085, 0.0120 and 1000)"
        )


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value}"
