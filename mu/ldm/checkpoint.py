"""Weights of a whole model: loaded strictly, written back in the dtypes of the file they came from.

Reading and writing the files themselves is in `mu.ldm.tensor_file`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.schedule import schedule_buffers
from mu.ldm.tensor_file import CheckpointError, fingerprint, read_state_dict, write_state_dict

if TYPE_CHECKING:
    from mu.ldm.latent_diffusion import LatentDiffusion

__all__ = [
    "CheckpointError",
    "check_layout",
    "check_state_dict",
    "fingerprint",
    "load_state_dict",
    "read_state_dict",
    "save_checkpoint",
    "tensors_of",
    "write_state_dict",
]

SCHEDULE_KEYS = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "logvar",
        "lvlb_weights",
    }
)
_TEXT = "cond_stage_model.transformer."
_SHOWN = 5


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
        if not _is_finite(tensor):
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


def save_checkpoint(
    model: LatentDiffusion,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    ema: Mapping[str, Tensor] | None = None,
    unet_dtype: torch.dtype | None = None,
) -> None:
    """Write a model as a CompVis checkpoint, each tensor in the dtype it had in the file it was loaded from.

    A weight that was not changed is written bit for bit as it was read, unless the model was loaded into a narrower
    dtype than the file's, which rounded it. A model that was not loaded from a file is written in its own dtypes.
    What it carries for other programs (`LatentDiffusion.carried`) is written as it was. EMA copies are not, unless
    they are given: those in the file that was loaded would still hold the old weights.

    Args:
        path: `.safetensors`, `.ckpt`, `.pth` or `.pt`.
        ema: EMA copies of the weights as they are now, see `mu.ldm.ema.updated_ema`.
        metadata: see `write_state_dict`.
        unet_dtype: see `tensors_of`.

    Raises:
        CheckpointError: a tensor holds NaN or Inf, or has it in the file's dtype; or see `write_state_dict`.
    """
    tensors = tensors_of(model, path, unet_dtype=unet_dtype)
    write_state_dict({**tensors, **(ema or {})}, path, metadata)


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
    parts = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if found
    ]
    listed = "; ".join(parts)
    raise CheckpointError(
        f"{source} is not a checkpoint of this model: {listed}. {_hint(missing, unexpected, misshaped)}"
    )


def _hint(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    if any(key.startswith(("down_blocks.", "encoder.down_blocks.", "text_model.")) for key in unexpected):
        return "The names are those of a part of a diffusers model; give the whole folder, or a CompVis checkpoint"
    if any(key.startswith("cond_stage_model.model.") for key in unexpected):
        return "The text encoder is OpenCLIP's: an SD v2 checkpoint, which needs a model YAML of SD v2"
    for key in [] if misshaped else unexpected[:_SHOWN]:  # of another size, other names are no misspellings
        near = difflib.get_close_matches(key, missing[:1000], n=1, cutoff=0.8)
        if near:
            return f"Is {key} meant to be {near[0]}?"
    return "Give the model YAML that belongs to the checkpoint (model_config_path)"


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # 8-bit floats have no isfinite of their own
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


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
