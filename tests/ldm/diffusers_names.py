"""diffusers' networks of the same shape as ours, with our weights under their names. Independent of `mu`'s own code."""

from __future__ import annotations

import re

import pytest
from torch import Tensor

from mu.ldm.params import AutoencoderParams, UNetParams

diffusers = pytest.importorskip("diffusers")  # here, since tests import this module before they could skip

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def unet_name(name: str, num_res_blocks: int) -> str:
    """CompVis' name of a UNet tensor, relative to the UNet, in diffusers' terms."""
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        at = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}[match[1]]
        return f"{at}.{_inside(match[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    assert match, name
    side, block, slot, inside = match[1], int(match[2]), int(match[3]), match[4]
    level, stage = divmod(block - (side == "input"), num_res_blocks + 1)
    at = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if inside.startswith("op."):
        return f"{at}.downsamplers.0.conv.{inside.removeprefix('op.')}"
    if inside.startswith("conv."):
        return f"{at}.upsamplers.0.{inside}"
    return f"{at}.{'attentions' if slot else 'resnets'}.{stage}.{_inside(inside)}"


def _inside(name: str) -> str:
    """Names inside a residual block; those inside a spatial transformer are the same on both sides."""
    for ours, theirs in _RESNET.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def diffusers_unet(params: UNetParams, state_dict: dict[str, Tensor]) -> diffusers.UNet2DConditionModel:
    """diffusers' UNet with the weights of ours (names relative to the UNet), loaded strictly."""
    levels = range(len(params.channel_mult))
    widths = tuple(mult * params.model_channels for mult in params.channel_mult)
    attends = [2**level in params.attention_resolutions for level in levels]
    if params.num_head_channels != -1:
        heads = tuple(width // params.num_head_channels for width in widths)
    else:
        heads = tuple(params.num_heads for _ in levels)
    unet = diffusers.UNet2DConditionModel(
        sample_size=params.image_size,
        in_channels=params.in_channels,
        out_channels=params.out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=widths,
        layers_per_block=params.num_res_blocks,
        cross_attention_dim=params.context_dim,
        attention_head_dim=heads,  # diffusers means the number of heads
        transformer_layers_per_block=params.transformer_depth,
        use_linear_projection=params.use_linear_in_transformer,
    )
    unet.load_state_dict({unet_name(k, params.num_res_blocks): v for k, v in state_dict.items()})
    return unet.eval()


def vae_name(name: str, levels: int) -> str:
    """CompVis' name of an autoencoder tensor, relative to the autoencoder, in diffusers' terms."""
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    name = name.replace(".mid.block_1.", ".mid_block.resnets.0.").replace(
        ".mid.block_2.", ".mid_block.resnets.1."
    )
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    if match := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)", name):
        # diffusers counts the decoder's levels in the order they run
        level = int(match[2]) if match[1] == "encoder.down" else levels - 1 - int(match[2])
        inside = match[3].replace("block.", "resnets.").replace("attn.", "attentions.")
        inside = inside.replace("sample.conv", "samplers.0.conv")
        name = f"{match[1]}_blocks.{level}.{inside}"
    if match := re.fullmatch(r"(.*attentions\.\d+)\.(\w+)\.(weight|bias)", name):
        name = f"{match[1]}.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    return name


def diffusers_vae(params: AutoencoderParams, state_dict: dict[str, Tensor]) -> diffusers.AutoencoderKL:
    """diffusers' autoencoder with the weights of ours (names relative to the autoencoder), loaded strictly."""
    levels = len(params.ch_mult)
    attends = [params.resolution // 2**level in params.attn_resolutions for level in range(levels)]
    vae = diffusers.AutoencoderKL(
        in_channels=params.in_channels,
        out_channels=params.out_ch,
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(mult * params.ch for mult in params.ch_mult),
        layers_per_block=params.num_res_blocks,
        latent_channels=params.z_channels,
    )
    converted = {}
    for name, tensor in state_dict.items():
        theirs = vae_name(name, levels)
        # attention is linear there, a 1x1 convolution here
        is_projection = ".attentions." in theirs and tensor.ndim == 4
        converted[theirs] = tensor[:, :, 0, 0] if is_projection else tensor
    vae.load_state_dict(converted)
    return vae.eval()
