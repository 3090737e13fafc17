"""From any checkpoint that is read here to any that is written: no bit changes, unless another type is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.checkpoint import check_state_dict, read_checkpoint
from mu.ldm.diffusers_configs import diffusers_configs
from mu.ldm.diffusers_folder import write_diffusers_folder
from mu.ldm.diffusers_tensors import to_diffusers
from mu.ldm.ema import EMA_PREFIX, is_ema_copy
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.model_config import load_model_config
from mu.ldm.params import LatentDiffusionParams, OpenClipParams
from mu.ldm.recognise import CheckpointDescription
from mu.ldm.schedule import SCHEDULE_KEYS, schedule_buffers
from mu.ldm.tensor_file import CheckpointError, write_bare_state_dict, write_state_dict
from mu.ldm.unet_dtype import DTYPES, cast_weight

FORMATS = ("compvis", "diffusers", "unet")


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    model_config_path: str | Path,
    format: str,
    use_ema: bool = False,
    base: str | Path | None = None,
    dtype: str = "source",
    variant: str | None = None,
    overwrite: bool = False,
) -> CheckpointDescription:
    """Read a checkpoint, check it against its model, and write it in another format.

    Args:
        source: any kind that `mu.ldm.load_model` reads; with `base` also a UNet alone in diffusers' names.
        target: compvis: a `.safetensors` (with ModelSpec metadata), `.ckpt` or `.pth` file. diffusers: a folder.
            unet: a file (`.pt`, `.bin` or `.safetensors`) with the UNet's weights alone, in diffusers' names.
        model_config_path: the model's CompVis YAML.
        use_ema: take the UNet's EMA copy. Else it is kept where source and target are both CompVis'.
        base: a whole checkpoint from which all is taken that the source lacks.
        dtype: type of the written weights, one of `DTYPES`; "source": each in the type that it has. The schedule's
            constants keep theirs.
        variant: for format diffusers: stands in the names of the weights' files, as `from_pretrained(variant=)` looks
            for them.

    Returns:
        What the source is.

    Raises:
        CheckpointError: the source is not this model's, the target is there already or cannot be written, or a weight
            is too large for the type.
        ModelConfigError: see `load_model_config`.
    """
    # 1. Refuse what cannot be written before gigabytes are read.
    target = Path(target)
    params = load_model_config(model_config_path)
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}; known: {', '.join(FORMATS)}")
    if dtype != "source" and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; known: source, {', '.join(DTYPES)}")
    if variant is not None and format != "diffusers":
        raise CheckpointError(f"variant {variant} is for format diffusers; {format} has one file of weights")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} is there already; give another name, or set overwrite")
    if format == "diffusers":
        diffusers_configs(params)

    # 2. Read, and check against the model.
    rest = read_checkpoint(base, params).tensors if base is not None else None
    checkpoint = read_checkpoint(source, params, use_ema=use_ema, base=rest)
    tensors = check_state_dict(LatentDiffusion(params, device="meta"), checkpoint.tensors, source=source)
    ema = {key: t for key, t in checkpoint.tensors.items() if key.startswith(EMA_PREFIX)}

    # 3. Write.
    if dtype != "source":
        tensors, ema = (_cast(found, DTYPES[dtype], target) for found in (tensors, ema))
    if format == "diffusers":
        write_diffusers_folder(tensors, target, params, variant=variant, overwrite=overwrite)
    elif format == "unet":
        write_bare_state_dict(to_diffusers(tensors, params)["unet"], target)
    else:
        metadata = model_spec(params, title=target.stem) if target.suffix == ".safetensors" else {}
        write_state_dict({**_schedule(params, tensors), **tensors, **ema}, target, metadata)
    return checkpoint.description


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> dict[str, Tensor]:
    """Weights in another type. Integers, the schedule and the counters of an EMA copy are none, and stay."""
    return {
        name: tensor
        if not tensor.is_floating_point()
        or name in SCHEDULE_KEYS
        or (name.startswith(EMA_PREFIX) and not is_ema_copy(name))
        else cast_weight(tensor, dtype, name=name, path=path)
        for name, tensor in tensors.items()
    }


def model_spec(params: LatentDiffusionParams, *, title: str) -> dict[str, str]:
    """Metadata of a CompVis `.safetensors` after the ModelSpec standard 1.0.0.

    Args:
        title: what the file is called in user interfaces.
    """
    side = params.latent_side * params.first_stage.factor
    architecture, implementation = _architecture(params)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}[params.parameterization],
    }


def _architecture(params: LatentDiffusionParams) -> tuple[str, str]:
    """ModelSpec's name of a known model, else of the family; and the code base that its weights are named after."""
    sd_unet = params.unet.model_channels == 320 and params.unet.channel_mult == (1, 2, 4, 4)
    if sd_unet and isinstance(params.cond_stage, OpenClipParams) and params.unet.context_dim == 1024:
        name = "stable-diffusion-v2-768-v" if params.parameterization == "v" else "stable-diffusion-v2-512"
        return name, "https://github.com/Stability-AI/stablediffusion"
    implementation = "https://github.com/CompVis/stable-diffusion"
    if sd_unet and params.unet.context_dim == 768:
        return "stable-diffusion-v1", implementation
    return "latent-diffusion", implementation


def _schedule(params: LatentDiffusionParams, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The schedule's buffers that a CompVis checkpoint has and another kind has not."""
    if any(key in SCHEDULE_KEYS for key in tensors):
        return {}
    return schedule_buffers(params.linear_start, params.linear_end, params.timesteps)
