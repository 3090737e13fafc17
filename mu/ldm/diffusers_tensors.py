"""The same weights under CompVis' names and, network by network, under diffusers' and transformers'. No bit changes.

Only three things are more than a name: the autoencoder's attention is a 1x1 convolution there and linear here, OpenCLIP
keeps query, key and value in one tensor, and diffusers leaves out the layers of OpenCLIP that SD v2 does not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.diffusers_names import inverted, is_vae_projection, renamed, unet_modules, vae_modules
from mu.ldm.params import LatentDiffusionParams, OpenClipParams
from mu.ldm.tensor_file import CheckpointError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
COMPONENTS = ("unet", "vae", "text_encoder")

Components = Mapping[str, Mapping[str, Tensor]]
"""unet, vae, text_encoder -> diffusers' name -> tensor; a model without text encoder has no text_encoder."""

_OPEN_CLIP_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")


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
    unet, vae = unet_modules(params.unet), vae_modules(params.first_stage)
    components: dict[str, dict[str, Tensor]] = {"unet": {}, "vae": {}}
    if params.cond_stage is not None:
        components["text_encoder"] = _text_to_diffusers(tensors, params)
    for key, tensor in tensors.items():
        if key.startswith(UNET_PREFIX):
            components["unet"][_known(key, renamed(key.removeprefix(UNET_PREFIX), unet))] = tensor
        elif key.startswith(VAE_PREFIX) and not key.startswith(f"{VAE_PREFIX}loss."):
            flat = tensor[:, :, 0, 0] if is_vae_projection(key) else tensor  # (C, C, 1, 1) -> (C, C)
            components["vae"][_known(key, renamed(key.removeprefix(VAE_PREFIX), vae))] = flat
    return components


def from_diffusers(
    components: Components, params: LatentDiffusionParams, *, source: str | Path
) -> dict[str, Tensor]:
    """Tensors under CompVis' names from the components of a diffusers model, whatever release wrote them.

    Args:
        source: names the checkpoint in errors.

    Raises:
        CheckpointError: a component has a tensor that this model does not have; the first few are listed. (What is
            missing, or of another shape, is found by `mu.ldm.checkpoint.check_state_dict`.)
    """
    unet = inverted(unet_modules(params.unet))
    vae = inverted(vae_modules(params.first_stage, old_attention=True)) | inverted(
        vae_modules(params.first_stage)
    )
    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []

    def take(component: str, prefix: str, rename: Callable[[str], str | None]) -> None:
        for name, tensor in components.get(component, {}).items():
            ours = rename(name)
            if ours is None:
                unknown.append(f"{component}: {name}")
            else:
                tensors[prefix + ours] = tensor

    take("unet", UNET_PREFIX, lambda name: renamed(name, unet))
    take("vae", VAE_PREFIX, lambda name: renamed(name, vae))
    for key, tensor in list(tensors.items()):
        if key.startswith(VAE_PREFIX) and is_vae_projection(key) and tensor.ndim == 2:
            tensors[key] = tensor[:, :, None, None]  # (C, C) -> (C, C, 1, 1)
    text = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in components.get("text_encoder", {}).items()
        if not name.endswith("position_ids")  # 0, 1, 2, ...: no weight
    }
    if isinstance(params.cond_stage, OpenClipParams):
        tensors |= _open_clip_from_transformers(text, params.cond_stage, unknown, source)
    else:
        tensors |= {CLIP_PREFIX + name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise CheckpointError(
            f"{source} is not a checkpoint of this model: {len(unknown)} unexpected ({shown}). Give the model YAML "
            "that belongs to it (model_config_path)"
        )
    return tensors


def _known(key: str, name: str | None) -> str:
    if name is None:
        raise CheckpointError(f"{key} has no name in diffusers' format")
    return name


def _text_to_diffusers(tensors: Mapping[str, Tensor], params: LatentDiffusionParams) -> dict[str, Tensor]:
    if not isinstance(params.cond_stage, OpenClipParams):
        return {
            f"text_model.{key.removeprefix(CLIP_PREFIX)}": tensor
            for key, tensor in tensors.items()
            if key.startswith(CLIP_PREFIX) and not key.endswith("position_ids")
        }
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(OPEN_CLIP_PREFIX)
        if name == key:
            continue
        if name in _OPEN_CLIP_ENDS:
            found[f"text_model.{_OPEN_CLIP_ENDS[name]}"] = tensor
        elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name):
            if int(match[1]) >= params.cond_stage.layers_run:
                continue
            at = f"text_model.encoder.layers.{match[1]}"
            if match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = match[2].removeprefix("attn.in_proj_")
                for part, piece in zip(_QKV, tensor.chunk(3), strict=True):
                    found[f"{at}.self_attn.{part}.{kind}"] = piece
            else:
                found[f"{at}.{_known(key, renamed(match[2], _OPEN_CLIP_LAYER))}"] = tensor
    return found


def _open_clip_from_transformers(
    text: Mapping[str, Tensor], params: OpenClipParams, unknown: list[str], source: str | Path
) -> dict[str, Tensor]:
    """OpenCLIP's tensors, with CompVis' prefix; what has no place in it is added to `unknown`."""
    ends = inverted(_OPEN_CLIP_ENDS)
    layer = inverted(_OPEN_CLIP_LAYER)
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in text.items():
        name = full_name.removeprefix("text_model.")
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if name in ends:
            tensors[OPEN_CLIP_PREFIX + ends[name]] = tensor
            continue
        if match is None or int(match[1]) >= params.layers_run:
            unknown.append(f"text_encoder: {full_name}")
            continue
        at = f"{OPEN_CLIP_PREFIX}transformer.resblocks.{match[1]}"
        if part := re.fullmatch(r"self_attn\.([qkv]_proj)\.(weight|bias)", match[2]):
            pieces.setdefault(f"{at}.attn.in_proj_{part[2]}", {})[part[1]] = tensor
        elif (inside := renamed(match[2], layer)) is not None:
            tensors[f"{at}.{inside}"] = tensor
        else:
            unknown.append(f"text_encoder: {full_name}")
    for key, parts in pieces.items():
        if missing := [part for part in _QKV if part not in parts]:
            raise CheckpointError(
                f"{source} is not whole: of {key}, {', '.join(missing)} is missing in the text encoder"
            )
        tensors[key] = torch.cat([parts[part] for part in _QKV])  # 3 of (D, D) -> (3 D, D)
    return tensors
