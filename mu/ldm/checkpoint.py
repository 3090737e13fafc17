"""Checkpoints: read into a model in one pass, and written back in the dtypes of the file that they came from.

`load_model` is the whole way: `read_checkpoint` reads a file or folder, recognises it and translates its names;
`check_state_dict` compares it with the model; `load_state_dict` copies it. `save_checkpoint` is the way back.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.diffusers_folder import is_diffusers_folder, read_diffusers_folder
from mu.ldm.diffusers_tensors import UNET_PREFIX, VAE_PREFIX, from_diffusers
from mu.ldm.ema import EMA_PREFIX, with_ema_weights
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.model_config import load_model_config
from mu.ldm.params import LatentDiffusionParams
from mu.ldm.recognise import (
    FILE,
    FOLDER,
    UNET_ALONE,
    UNET_BARE,
    UNKNOWN,
    CheckpointDescription,
    described,
    kind_of,
    other_kind,
    refuse_other_kinds,
)
from mu.ldm.schedule import SCHEDULE_KEYS, schedule_buffers
from mu.ldm.tensor_file import CheckpointError, Reader, read_state_dict, write_state_dict

_PART_NAMES = {UNET_PREFIX: "UNet", VAE_PREFIX: "VAE (autoencoder)", "cond_stage_model.": "text encoder"}
_TEXT = "cond_stage_model.transformer."
_SHOWN, _FEW = 5, 20
_PACKAGED = "package:algorithms/saliency_unlearning/configs/"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint under CompVis' names, not yet compared with a model."""

    tensors: Mapping[str, Tensor]
    description: CheckpointDescription


def load_model(
    model_config_path: str | Path,
    ckpt_path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    use_ema: bool = False,
) -> LatentDiffusion:
    """Build a model from its CompVis YAML and load its weights.

    Args:
        ckpt_path: a CompVis checkpoint (`.ckpt`, `.pth`, `.safetensors`), a diffusers folder, or one file in diffusers'
            names; the kind is recognised and logged. Without one the weights are random.
        device: "meta" builds the structure alone (no checkpoint).
        dtype: of the weights in memory; `save_checkpoint` writes the file's own dtype again.
        use_ema: take the EMA copy of the UNet in the file and not its raw weights.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or not this model's; or it has no EMA weights.
        ModelConfigError: the YAML is missing or not one that is built here.
    """
    params = load_model_config(model_config_path)
    if ckpt_path is None:
        return LatentDiffusion(params, device=device).cast_weights(dtype).eval()
    checkpoint = read_checkpoint(ckpt_path, params, use_ema=use_ema)
    _log.info("%s is a %s", ckpt_path, checkpoint.description)
    model = LatentDiffusion(params, initialise=False).cast_weights(dtype)
    load_state_dict(model, checkpoint.tensors, source=ckpt_path)
    model.file_has_ema = checkpoint.description.ema
    return model.to(device).eval()


# ---- read, recognise, translate


def read_checkpoint(
    path: str | Path,
    params: LatentDiffusionParams,
    *,
    use_ema: bool = False,
    base: Mapping[str, Tensor] | None = None,
    read: Reader = read_state_dict,
) -> Checkpoint:
    """Read a checkpoint of any kind; its tensors come under CompVis' names, in the dtypes of the file.

    Args:
        params: the model that it is expected to be of.
        use_ema: put the EMA copy in the place of the UNet's weights; the copy itself is then left out.
        base: the tensors of a whole checkpoint, for a file that holds a part of a model: what it lacks is taken from
            there.
        read: what reads each file; with `read_layout` the tensors are on the meta device, without values.

    Raises:
        CheckpointError: it cannot be read; it is no checkpoint but a LoRA, SDXL, ... (`mu.ldm.recognise`), which is
            said with advice; it is a part of a model and there is no base; it has no EMA weights and they are asked
            for; a diffusers folder is configured otherwise than the model.
    """
    path = Path(path)

    # 1. Read its tensors, under its own names.
    metadata: dict[str, str] = {}
    if is_diffusers_folder(path):
        kind, tensors = FOLDER, read_diffusers_folder(path, params, read=read)
    else:
        tensors, metadata = read(path)
        kind = kind_of(tensors)

    # 2. Recognise what it is, or what else.
    refuse_other_kinds(tensors, metadata, source=path)
    description = described(kind, tensors)

    # 3. Translate the names.
    if kind == UNET_BARE:
        tensors = {UNET_PREFIX + name: tensor for name, tensor in tensors.items()}
    elif kind == UNET_ALONE:
        unet = {f"unet.{name.removeprefix('unet.')}": tensor for name, tensor in tensors.items()}
        tensors = from_diffusers(unet, params, source=path)
    elif kind in (FOLDER, FILE):
        tensors = from_diffusers(tensors, params, source=path)

    # 4. Complete a part of a model.
    if base is not None:
        tensors = {**_rest_of(base, tensors), **tensors}
    _refuse_parts(tensors, params, path, kind)

    # 5. Choose the raw weights or the EMA copy.
    if use_ema:
        chosen = with_ema_weights(tensors, source=path)
        tensors = {key: tensor for key, tensor in chosen.items() if not key.startswith(EMA_PREFIX)}
    return Checkpoint(tensors=tensors, description=description)


def describe_checkpoint(path: str | Path) -> CheckpointDescription:
    """What a file or folder is. It is read whole, and so is known to be intact.

    Raises:
        CheckpointError: it cannot be read, see `read_state_dict`.
    """
    path = Path(path)
    if is_diffusers_folder(path):
        return described(FOLDER, read_diffusers_folder(path))
    tensors, metadata = read_state_dict(path)
    other = other_kind(tensors, metadata)
    return described(other.name if other is not None else kind_of(tensors), tensors)


def _rest_of(base: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a base has to give: weights of the UNet one by one, the other networks whole, and never its EMA copy."""
    whole = tuple(
        prefix
        for prefix in _PART_NAMES
        if prefix != UNET_PREFIX and any(key.startswith(prefix) for key in part)
    )
    return {key: tensor for key, tensor in base.items() if not key.startswith((EMA_PREFIX, *whole))}


def _refuse_parts(
    tensors: Mapping[str, Tensor], params: LatentDiffusionParams, path: Path, kind: str
) -> None:
    """Raises CheckpointError where all of a network is missing; says how to complete it."""
    missing = [
        name
        for prefix, name in _PART_NAMES.items()
        if not (prefix.startswith("cond") and params.cond_stage is None)
        and not any(key.startswith(prefix) for key in tensors)
    ]
    if kind == UNKNOWN or not missing:
        return
    count = sum(key.startswith(UNET_PREFIX) for key in tensors)
    what = {
        UNET_ALONE: f"holds a UNet alone, or a part of one ({count:,} tensors), in diffusers' names",
        UNET_BARE: f"holds a UNet alone, or a part of one ({count:,} tensors), in CompVis' names",
    }.get(kind, f"is a {kind} without its {' and '.join(missing)}")
    raise CheckpointError(
        f"{path} {what}: a part of a model. Give the whole checkpoint or diffusers folder; or complete it with "
        "the rest of the model that it was made from: "
        f"unlearn_diff convert {path} whole.safetensors --base_ckpt_path MODEL"
    )


# ---- check, copy


def load_state_dict(model: LatentDiffusion, state_dict: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Copy a checkpoint's tensors into a model and note the dtypes that they had (`model.file_dtypes`).

    Every weight of the model must be there, with its shape, and nothing else, but for: schedule buffers and
    `position_ids` (may be absent), EMA copies (`model_ema.*`), the autoencoder's training loss
    (`first_stage_model.loss.*`) and `logit_scale` (ignored). Text-encoder names without `text_model.`, as newer
    releases of transformers write them, are taken as well.

    A schedule in the file must be the model's. In fp32 it is taken to the bit; in half precision the model keeps
    its own, which is exact.

    Args:
        source: names the file in errors.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape (the first few are listed), a tensor holds NaN
            or Inf, or the schedule differs. The model is unchanged.
    """
    given = check_state_dict(model, state_dict, source=source)
    own = model.state_dict()
    with torch.no_grad():
        for key, tensor in given.items():
            if key in own and (key not in SCHEDULE_KEYS or tensor.dtype.itemsize >= own[key].dtype.itemsize):
                own[key].copy_(tensor)
    model.file_dtypes = {key: tensor.dtype for key, tensor in given.items() if key in own}
    model.carried = {key: tensor for key, tensor in given.items() if key not in own}


def check_state_dict(
    model: LatentDiffusion, state_dict: Mapping[str, Tensor], *, source: str | Path
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are the model's, under its names, as `load_state_dict` would take them.

    Args:
        model: may be on the meta device; it is not changed.
        source: names the file in errors.

    Returns:
        The model's own tensors that the file has, and those that it carries (`LatentDiffusion.is_carried`).

    Raises:
        CheckpointError: see `load_state_dict`.
    """
    found = check_layout(model, state_dict, source=source)
    for key, tensor in found.items():
        # OpenCLIP's causal mask, which some files have, is made of zeros and -Inf.
        if not _is_finite(tensor) and not key.endswith(".attn_mask"):
            raise CheckpointError(
                f"{source}: {key} holds NaN or Inf: its training diverged, or it is damaged"
            )
    _check_schedule(model, found, source)
    return found


def check_layout(
    model: LatentDiffusion, state_dict: Mapping[str, Tensor], *, source: str | Path
) -> dict[str, Tensor]:
    """`check_state_dict` without a look at the values: the tensors may be on the meta device too."""
    own = model.state_dict()
    renamed = {_compvis_name(key, state_dict): tensor for key, tensor in state_dict.items()}
    carried = {key: tensor for key, tensor in renamed.items() if model.is_carried(key)}
    given = {
        key: tensor
        for key, tensor in renamed.items()
        if key not in carried and (key in own or not _may_be_ignored(key))
    }
    _check_keys(own, given, source)
    return given | carried


def _compvis_name(key: str, state_dict: Mapping[str, Tensor]) -> str:
    inner = key.removeprefix(_TEXT)
    if inner != key and inner.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        renamed = f"{_TEXT}text_model.{inner}"
        return key if renamed in state_dict else renamed
    return key


def _may_be_ignored(key: str) -> bool:
    last = key.rsplit(".", 1)[-1]
    return (
        key in SCHEDULE_KEYS
        or last in ("position_ids", "logit_scale")
        or key.startswith(("model_ema.", "first_stage_model.loss."))
    )


def _check_keys(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str | Path) -> None:
    missing = [key for key in own if key not in given and not _may_be_ignored(key)]
    unexpected = [key for key in given if key not in own]
    misshaped = [
        f"{key}: {tuple(given[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    if not (missing or unexpected or misshaped):
        return
    # What to do comes first. Of another model altogether one name of each kind suffices.
    shown = _SHOWN if len(missing) + len(unexpected) + len(misshaped) <= _FEW else 1
    parts = [
        f"{len(found)} {what} ({', '.join(found[:shown])}{', ...' if len(found) > shown else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if found
    ]
    hint = _hint(own, missing, unexpected, misshaped)
    raise CheckpointError(f"{source} is not a checkpoint of this model. {hint}. Tensors: {'; '.join(parts)}")


def _hint(own: Mapping[str, Tensor], missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    if any(key.startswith(("down_blocks.", "encoder.down_blocks.", "text_model.")) for key in unexpected):
        return "The names are those of a part of a diffusers model; give the whole folder, or a CompVis checkpoint"
    if any(key.startswith("cond_stage_model.model.") for key in unexpected):
        return (
            "It is an SD v2 checkpoint, by OpenCLIP's text encoder: set model_config_path to "
            f"{_PACKAGED}sd_v2_base.yaml for 512 px, {_PACKAGED}sd_v2_v.yaml for 768 px"
        )
    if any(key.startswith(_TEXT) for key in unexpected):
        return (
            "It is an SD v1 checkpoint, by CLIP's text encoder: set model_config_path to "
            f"{_PACKAGED}model_config.yaml"
        )
    if len(missing) == sum(not _may_be_ignored(key) for key in own):
        return (
            "None of its names is one of Stable Diffusion's: it is another kind of file, and no model YAML makes it "
            "readable. Give a CompVis checkpoint or a diffusers folder"
        )
    if len(missing) < 0.02 * len(own) and not unexpected and not misshaped:
        return (
            "Nearly all of it fits: the file is not whole. Get it again; or complete it with the rest of the model it "
            "was made from (unlearn_diff convert FILE whole.safetensors --base_ckpt_path MODEL)"
        )
    for key in [] if misshaped else unexpected[:_SHOWN]:  # of another size, other names are no misspellings
        near = difflib.get_close_matches(key, missing[:1000], n=1, cutoff=0.8)
        if near:
            return f"Is {key} meant to be {near[0]}? Then rename it"
    return (
        "Give the model YAML that belongs to the checkpoint (model_config_path; the bundled model's is "
        "package:assets/emoji_canvas/model_config.yaml)"
    )


def _check_schedule(model: LatentDiffusion, given: Mapping[str, Tensor], source: str | Path) -> None:
    key = "alphas_cumprod"
    if key not in given:
        return
    params = model.params
    computed = schedule_buffers(params.linear_start, params.linear_end, params.timesteps)
    theirs, ours = given[key].double().cpu(), computed[key].double()
    # 1 % is beyond the rounding of bf16 and far below the difference between two schedules
    if not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-4):
        raise CheckpointError(
            f"{source}: the noise schedule in the file is not the one of the model YAML ({key}[-1] is "
            f"{theirs[-1]:.3g} in the file, {ours[-1]:.3g} by the YAML); correct linear_start and linear_end"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass, where isfinite makes several tensors of its size; 8-bit floats have neither.
    low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return bool(low.isfinite() and high.isfinite())


# ---- write


def save_checkpoint(
    model: LatentDiffusion,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    unet_dtype: torch.dtype | None = None,
) -> None:
    """Write a model as a CompVis checkpoint, each tensor in the dtype it had in the file it was loaded from.

    A weight that was not changed is written bit for bit as it was read, unless the model was loaded into a narrower
    dtype than the file's, which rounded it. A model that was not loaded from a file is written in its own dtypes.
    What it carries for other programs (`LatentDiffusion.carried`) is written as it was. EMA copies are not: those in
    the file that was loaded would still hold the old weights (`mu.ldm.ema.updated_ema` makes new ones).

    Args:
        path: `.safetensors`, `.ckpt`, `.pth` or `.pt`.
        metadata: see `write_state_dict`.
        unet_dtype: see `tensors_of`.

    Raises:
        CheckpointError: a tensor holds NaN or Inf, or has it in the file's dtype; or see `write_state_dict`.
    """
    write_state_dict(tensors_of(model, path, unet_dtype=unet_dtype), path, metadata)


def tensors_of(
    model: LatentDiffusion, path: str | Path, *, unet_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A model's tensors in the dtypes of the file that it was loaded from, with those that it carries.

    Args:
        path: where they are to be written, for errors.
        unet_dtype: of the UNet's weights instead; None: as in the file.

    Raises:
        CheckpointError: see `save_checkpoint`.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        dtype = unet_dtype if key.startswith(UNET_PREFIX) else None
        tensors[key] = tensor.to(dtype or model.file_dtypes.get(key, tensor.dtype))
        if not tensor.is_meta and not _is_finite(tensors[key]):
            cause = (
                "the training diverged" if not _is_finite(tensor) else f"too large for {tensors[key].dtype}"
            )
            raise CheckpointError(f"{path} is not written: {key} holds NaN or Inf ({cause})")
    return tensors | model.carried
