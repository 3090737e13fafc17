"""CompVis' names of weights and diffusers', as tables of modules that follow from a network's shape.

A table has the innermost module whose own parts are named alike on both sides: `input_blocks.1.0.in_layers.2` is
`down_blocks.0.resnets.0.conv1`, and what is inside a spatial transformer needs no entry of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from mu.ldm.params import AutoencoderParams, UNetParams

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
    "nin_shortcut": "conv_shortcut"
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_PROJECTIONS = (".q", ".k", ".v", ".proj_out")


def unet_modules(params: UNetParams) -> dict[str, str]:
    """CompVis' module -> diffusers' module, both relative to the UNet; the same entry may be unused in a small UNet."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
        **_parts("middle_block.0", "mid_block.resnets.0", _UNET_RESNET),
        **_parts("middle_block.2", "mid_block.resnets.1", _UNET_RESNET),
    }
    last = len(params.channel_mult) - 1
    attends = [2**level in params.attention_resolutions for level in range(last + 1)]
    block = 1
    for level in range(last + 1):
        for stage in range(params.num_res_blocks):
            at = f"down_blocks.{level}"
            table |= _parts(f"input_blocks.{block}.0", f"{at}.resnets.{stage}", _UNET_RESNET)
            if attends[level]:
                table[f"input_blocks.{block}.1"] = f"{at}.attentions.{stage}"
            block += 1
        if level != last:
            table[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for up, level in enumerate(range(last, -1, -1)):
        for stage in range(params.num_res_blocks + 1):
            at = f"up_blocks.{up}"
            table |= _parts(f"output_blocks.{block}.0", f"{at}.resnets.{stage}", _UNET_RESNET)
            if attends[level]:
                table[f"output_blocks.{block}.1"] = f"{at}.attentions.{stage}"
            if level and stage == params.num_res_blocks:
                slot = 2 if attends[level] else 1
                table[f"output_blocks.{block}.{slot}.conv"] = f"{at}.upsamplers.0.conv"
            block += 1
    return table


def vae_modules(params: AutoencoderParams, *, old_attention: bool = False) -> dict[str, str]:
    """CompVis' module -> diffusers' module, both relative to the autoencoder.

    Args:
        old_attention: diffusers' names before its release 0.12: query, key, value, proj_attn.
    """
    attention = {ours: _OLD_VAE_ATTENTION.get(theirs, theirs) for ours, theirs in _VAE_ATTENTION.items()}
    attention = attention if old_attention else _VAE_ATTENTION
    last = len(params.ch_mult) - 1
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, down in (("encoder", True), ("decoder", False)):
        table |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.norm_out": f"{side}.conv_norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
            **_parts(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _VAE_RESNET),
            **_parts(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", attention),
            **_parts(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _VAE_RESNET),
        }
        for level in range(last + 1):
            # diffusers counts the decoder's levels in the order in which they run
            ours = f"{side}.{'down' if down else 'up'}.{level}"
            theirs = f"{side}.down_blocks.{level}" if down else f"{side}.up_blocks.{last - level}"
            for stage in range(params.num_res_blocks + (not down)):
                table |= _parts(f"{ours}.block.{stage}", f"{theirs}.resnets.{stage}", _VAE_RESNET)
                if params.resolution // 2**level in params.attn_resolutions:
                    table |= _parts(f"{ours}.attn.{stage}", f"{theirs}.attentions.{stage}", attention)
            if down and level != last:
                table[f"{ours}.downsample.conv"] = f"{theirs}.downsamplers.0.conv"
            if not down and level:
                table[f"{ours}.upsample.conv"] = f"{theirs}.upsamplers.0.conv"
    return table


def is_vae_projection(name: str) -> bool:
    """Whether an autoencoder tensor (CompVis' name) is a 1x1 convolution that is a linear layer in diffusers."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and (".attn." in module or ".attn_1." in module) and module.endswith(_PROJECTIONS)


def renamed(name: str, modules: Mapping[str, str]) -> str | None:
    """The name of a tensor by a table of modules; None where no module of it is in the table."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        if module in modules:
            return ".".join([modules[module], *parts[count:]])
    return None


def inverted(modules: Mapping[str, str]) -> dict[str, str]:
    """diffusers' module -> CompVis' module."""
    return {theirs: ours for ours, theirs in modules.items()}


def _parts(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{our}": f"{theirs}.{their}" for our, their in parts.items()}
