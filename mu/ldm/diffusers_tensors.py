"""The same weights under CompVis' names and under diffusers' and transformers', as tables. No bit changes.

Each network has a table of modules that follows from its params. It has the innermost module whose own parts are named
alike on both sides: `input_blocks.1.0.in_layers.2` is `down_blocks.0.resnets.0.conv1`, and what is inside a spatial
transformer needs no entry of its own.

Three things are more than a name: the autoencoder's attention is a 1x1 convolution here and linear there, OpenCLIP has
query, key and value in one tensor, and diffusers leaves out the layers of OpenCLIP that SD v2 does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.params import AutoencoderParams, LatentDiffusionParams, OpenClipParams, UNetParams
from mu.ldm.tensor_file import CheckpointError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
COMPONENTS = ("unet", "vae", "text_encoder")
"""Networks of a diffusers model; each is a folder, or in one file the beginning of its tensors' names."""

# ---- the tables

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# diffusers' names before its release 0.12
_VAE_OLD_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
_CLIP = {name: f"text_model.{name}" for name in ("embeddings", "encoder", "final_layer_norm")}
_OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True, kw_only=True)
class NetworkNames:
    """How the tensors of one network are named on both sides; CompVis' names stand without the network's prefix."""

    prefix: str
    """Of its tensors in a CompVis checkpoint."""
    modules: Mapping[str, str]
    """CompVis' module, or whole tensor -> diffusers'. An entry may be unused in a small network."""
    old_modules: Mapping[str, str] = field(default_factory=dict)
    """The same, as earlier releases of diffusers name them: read, and never written."""
    convolutions: frozenset[str] = frozenset()
    """CompVis' tensors that are 1x1 convolutions (C, C, 1, 1) here and linear (C, C) there."""
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """CompVis' tensor -> diffusers' tensors that it is made of, one below the other."""
    root: str = ""
    """What diffusers' names begin with; some releases of transformers leave it out."""
    left_out: tuple[str, ...] = ()
    """Beginnings of CompVis' keys, with the prefix, for which diffusers has no place."""


def network_names(params: LatentDiffusionParams) -> dict[str, NetworkNames]:
    """The tables of a model's networks, by component (`COMPONENTS`); without text encoder that of none."""
    projections = _vae_attention(params.first_stage)
    names = {
        "unet": NetworkNames(prefix=UNET_PREFIX, modules=_unet_modules(params.unet)),
        "vae": NetworkNames(
            prefix=VAE_PREFIX,
            modules=_vae_modules(params.first_stage) | _attention_parts(projections, _VAE_PROJECTIONS),
            old_modules=_attention_parts(projections, _VAE_OLD_PROJECTIONS),
            convolutions=frozenset(
                f"{ours}.{part}.weight" for ours in projections for part in _VAE_PROJECTIONS
            ),
            left_out=(f"{VAE_PREFIX}loss.",),
        ),
    }
    if isinstance(params.cond_stage, OpenClipParams):
        names["text_encoder"] = _open_clip_names(params.cond_stage)
    elif params.cond_stage is not None:
        names["text_encoder"] = NetworkNames(
            prefix=CLIP_PREFIX,
            modules=_CLIP,
            root="text_model.",
            left_out=(f"{CLIP_PREFIX}embeddings.position_ids",),
        )
    return names


def _unet_modules(params: UNetParams) -> dict[str, str]:
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
    block = 1
    for level, attends in enumerate(params.attends):
        at = f"down_blocks.{level}"
        for stage in range(params.num_res_blocks):
            table |= _parts(f"input_blocks.{block}.0", f"{at}.resnets.{stage}", _UNET_RESNET)
            if attends:
                table[f"input_blocks.{block}.1"] = f"{at}.attentions.{stage}"
            block += 1
        if level != last:
            table[f"input_blocks.{block}.0.op"] = f"{at}.downsamplers.0.conv"
            block += 1
    block = 0
    for up, level in enumerate(range(last, -1, -1)):
        at, attends = f"up_blocks.{up}", params.attends[level]
        for stage in range(params.num_res_blocks + 1):
            table |= _parts(f"output_blocks.{block}.0", f"{at}.resnets.{stage}", _UNET_RESNET)
            if attends:
                table[f"output_blocks.{block}.1"] = f"{at}.attentions.{stage}"
            if level and stage == params.num_res_blocks:
                slot = 2 if attends else 1
                table[f"output_blocks.{block}.{slot}.conv"] = f"{at}.upsamplers.0.conv"
            block += 1
    return table


def _vae_levels(params: AutoencoderParams, side: str) -> list[tuple[str, str, int]]:
    """(CompVis' level, diffusers' level, blocks in it) of the encoder or decoder, the highest resolution first."""
    last = len(params.ch_mult) - 1
    if side == "encoder":
        return [
            (f"encoder.down.{i}", f"encoder.down_blocks.{i}", params.num_res_blocks) for i in range(last + 1)
        ]
    # diffusers counts the decoder's levels in the order in which they run
    return [
        (f"decoder.up.{i}", f"decoder.up_blocks.{last - i}", params.num_res_blocks + 1)
        for i in range(last + 1)
    ]


def _vae_modules(params: AutoencoderParams) -> dict[str, str]:
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        table |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.norm_out": f"{side}.conv_norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
            **_parts(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _VAE_RESNET),
            **_parts(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _VAE_RESNET),
        }
        for ours, theirs, blocks in _vae_levels(params, side):
            for stage in range(blocks):
                table |= _parts(f"{ours}.block.{stage}", f"{theirs}.resnets.{stage}", _VAE_RESNET)
            # The lowest level has no downsampling and the highest no upsampling: then the entry is unused.
            resample = "downsample" if side == "encoder" else "upsample"
            table[f"{ours}.{resample}.conv"] = f"{theirs}.{resample}rs.0.conv"
    return table


def _vae_attention(params: AutoencoderParams) -> dict[str, str]:
    """CompVis' attention -> diffusers', wherever the autoencoder has one."""
    table = {f"{side}.mid.attn_1": f"{side}.mid_block.attentions.0" for side in ("encoder", "decoder")}
    for side in ("encoder", "decoder"):
        for (ours, theirs, blocks), attends in zip(_vae_levels(params, side), params.attends, strict=True):
            if attends:
                table |= {f"{ours}.attn.{i}": f"{theirs}.attentions.{i}" for i in range(blocks)}
    return table


def _attention_parts(attention: Mapping[str, str], projections: Mapping[str, str]) -> dict[str, str]:
    table: dict[str, str] = {}
    for ours, theirs in attention.items():
        table |= _parts(ours, theirs, {"norm": "group_norm", **projections})
    return table


def _open_clip_names(params: OpenClipParams) -> NetworkNames:
    modules, stacked = dict(_OPEN_CLIP), {}
    for layer in range(params.layers_run):
        ours, theirs = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        modules |= _parts(ours, theirs, _OPEN_CLIP_LAYER)
        for kind in ("weight", "bias"):
            stacked[f"{ours}.attn.in_proj_{kind}"] = tuple(
                f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"
            )
    return NetworkNames(
        prefix=OPEN_CLIP_PREFIX,
        modules=modules,
        stacked=stacked,
        root="text_model.",
        left_out=params.not_run,
    )


def _parts(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{our}": f"{theirs}.{their}" for our, their in parts.items()}


# ---- tensors


def to_diffusers(
    tensors: Mapping[str, Tensor], params: LatentDiffusionParams
) -> dict[str, dict[str, Tensor]]:
    """CompVis' tensors by component under diffusers' names.

    What a diffusers folder has no place for is left out: schedule, EMA copies, and of OpenCLIP the layers that are not
    run, `text_projection` and `logit_scale`.

    Args:
        tensors: those of a whole checkpoint that `mu.ldm.checkpoint.check_state_dict` has found to be the model's.

    Raises:
        CheckpointError: diffusers has no such network: its first level must be as wide as its first convolution.
    """
    for key, mult in (
        ("channel_mult", params.unet.channel_mult[0]),
        ("ch_mult", params.first_stage.ch_mult[0]),
    ):
        if mult != 1:
            raise CheckpointError(
                f"{key} begins with {mult}: diffusers has no such network, there it always begins with 1"
            )
    components: dict[str, dict[str, Tensor]] = {}
    for component, names in network_names(params).items():
        found = components[component] = {}
        for key, tensor in tensors.items():
            if not key.startswith(names.prefix) or key.startswith(names.left_out):
                continue
            name = key.removeprefix(names.prefix)
            if name in names.stacked:
                theirs = names.stacked[name]
                found |= zip(theirs, tensor.chunk(len(theirs)), strict=True)  # (3 D, D) -> 3 of (D, D)
            elif (their := _renamed(name, names.modules)) is not None:
                found[their] = tensor[:, :, 0, 0] if name in names.convolutions else tensor
            else:
                raise CheckpointError(f"{key} has no name in diffusers' format")
    return components


def from_diffusers(
    tensors: Mapping[str, Tensor], params: LatentDiffusionParams, *, source: str | Path
) -> dict[str, Tensor]:
    """Tensors under CompVis' names from those of a diffusers model, whatever release wrote them.

    Args:
        tensors: under diffusers' names after the component's: `unet.conv_in.weight`.
        source: names the checkpoint in errors.

    Raises:
        CheckpointError: there is a tensor that this model does not have; the first few are listed. (What is missing,
            or of another shape, is found by `mu.ldm.checkpoint.check_state_dict`.)
    """
    if other := [key for key in tensors if key.partition(".")[0] not in COMPONENTS]:
        raise CheckpointError(
            f"the diffusers checkpoint has {other[0]}, of none of its parts ({', '.join(COMPONENTS)})"
        )
    tables = network_names(params)
    result: dict[str, Tensor] = {}
    unknown: list[str] = []
    for component in COMPONENTS:
        found = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{component}.")}
        if component not in tables:
            unknown += [f"{component}: {name}" for name in found]
            continue
        names = tables[component]
        modules = {
            theirs: ours for table in (names.old_modules, names.modules) for ours, theirs in table.items()
        }
        place_of = {part: place for place, parts in names.stacked.items() for part in parts}
        pieces: dict[str, dict[str, Tensor]] = {}
        for given, tensor in found.items():
            name = given if given.startswith(names.root) else names.root + given
            # 0, 1, 2, ..., and the scale of CLIP's similarities: no weights of this model
            if name.rpartition(".")[2] in ("position_ids", "logit_scale"):
                continue
            if name in place_of:
                pieces.setdefault(place_of[name], {})[name] = tensor
            elif (ours := _renamed(name, modules)) is None:
                unknown.append(f"{component}: {name}")
            elif ours in names.convolutions and tensor.ndim == 2:
                result[names.prefix + ours] = tensor[:, :, None, None]  # (C, C) -> (C, C, 1, 1)
            else:
                result[names.prefix + ours] = tensor
        for place, parts in pieces.items():
            if missing := [part.split(".")[-2] for part in names.stacked[place] if part not in parts]:
                raise CheckpointError(
                    f"{source} is not whole: of {names.prefix}{place}, {', '.join(missing)} is missing in the text "
                    "encoder"
                )
            result[names.prefix + place] = torch.cat(
                [parts[part] for part in names.stacked[place]]
            )  # (3 D, D)
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise CheckpointError(
            f"{source} is not a checkpoint of this model: {len(unknown)} unexpected ({shown}). Give the model YAML "
            "that belongs to it (model_config_path)"
        )
    return result


def _renamed(name: str, modules: Mapping[str, str]) -> str | None:
    """The name of a tensor by a table of modules; None where neither it nor a module of it is in the table."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (module := modules.get(".".join(parts[:count]))) is not None:
            return ".".join([module, *parts[count:]])
    return None
