"""Checkpoints of every kind that is read here, recognised by what is in them, under CompVis' names.

| kind | what it is |
|---|---|
| CompVis checkpoint | one file with `model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*` |
| diffusers folder | `model_index.json` and a folder for each network |
| diffusers checkpoint | one file with `unet.*`, `vae.*`, `text_encoder.*` in diffusers' names |
| UNet in diffusers' names | one file with `down_blocks.*`: a part of a model |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mu.ldm.diffusers_folder import is_diffusers_folder, read_diffusers_folder
from mu.ldm.diffusers_tensors import COMPONENTS, UNET_PREFIX, from_diffusers
from mu.ldm.ema import EMA_PREFIX, has_ema, with_ema_weights
from mu.ldm.params import LatentDiffusionParams
from mu.ldm.tensor_file import CheckpointError, Reader, read_state_dict

COMPVIS, FOLDER, FILE = "CompVis checkpoint", "diffusers folder", "diffusers checkpoint"
UNET_ALONE, UNKNOWN = "UNet in diffusers' names", "file of tensors of no known kind"
_CONTEXT_ENDS = ("attn2.to_k.weight",)


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """What a checkpoint is, as far as its names, shapes and types tell."""

    kind: str
    text_encoder: str | None
    """CLIP (SD v1), OpenCLIP (SD v2), or None."""
    context_dim: int | None
    """Width of the prompt embeddings that its UNet takes: 768 in SD v1, 1024 in SD v2."""
    unet_weights: int
    """Number of the UNet's raw weights."""
    dtypes: tuple[str, ...]
    """Types of the tensors, such as float16; the most frequent one first."""
    ema: bool
    """Whether there is an EMA copy of the UNet."""

    def __str__(self) -> str:
        parts = [f"UNet of {self.unet_weights:,} weights"]
        if self.context_dim is not None:
            parts.append(f"prompts {self.context_dim} wide")
        parts.append(f"text encoder {self.text_encoder or 'none'}")
        parts.append("with EMA weights" if self.ema else "no EMA weights")
        return f"{self.kind}: {', '.join(parts)}; {', '.join(self.dtypes)}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint under CompVis' names, not yet compared with a model."""

    tensors: Mapping[str, Tensor]
    description: CheckpointDescription


def describe_checkpoint(path: str | Path) -> CheckpointDescription:
    """What a file or folder is. It is read whole, and so is known to be intact.

    Raises:
        CheckpointError: it cannot be read, see `read_state_dict`.
    """
    path = Path(path)
    if is_diffusers_folder(path):
        components = read_diffusers_folder(path)
        return _described(FOLDER, _joined(components))
    tensors, _ = read_state_dict(path)
    return _described(kind_of(tensors), tensors)


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
        base: the tensors of a whole checkpoint, for a file that holds a UNet alone: all but the UNet is taken from it.
        read: what reads each file; with `read_layout` the tensors are on the meta device, without values.

    Raises:
        CheckpointError: it cannot be read; it is a part of a model, or of another one; it has no EMA weights and they
            are asked for; a diffusers folder is configured otherwise than the model.
    """
    path = Path(path)
    if is_diffusers_folder(path):
        components = read_diffusers_folder(path, params, read=read)
        description = _described(FOLDER, _joined(components))
        tensors = from_diffusers(components, params, source=path)
    else:
        tensors, _ = read(path)
        description = _described(kind_of(tensors), tensors)
        if description.kind == FILE:
            tensors = from_diffusers(_split(tensors), params, source=path)
        elif description.kind == UNET_ALONE:
            if base is None:
                raise CheckpointError(
                    f"{path} holds a UNet alone, in diffusers' names: a part of a model. Give the whole diffusers "
                    "folder; or convert it with the rest of another checkpoint (convert ... --base_ckpt_path)"
                )
            unet = from_diffusers({"unet": tensors}, params, source=path)
            kept = {k: v for k, v in base.items() if not k.startswith((UNET_PREFIX, EMA_PREFIX))}
            tensors = {**kept, **unet}
    if use_ema:
        chosen = with_ema_weights(tensors, source=path)
        tensors = {key: tensor for key, tensor in chosen.items() if not key.startswith(EMA_PREFIX)}
    return Checkpoint(tensors=tensors, description=description)


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """The kind of a file, by the names of its tensors."""
    if any(key.startswith(UNET_PREFIX) for key in tensors):
        return COMPVIS
    if any(key.startswith("unet.") for key in tensors):
        return FILE
    if any(key.startswith("down_blocks.") for key in tensors) and "conv_in.weight" in tensors:
        return UNET_ALONE
    return UNKNOWN


def _joined(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, found in components.items() for name, tensor in found.items()}


def _split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    components: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        if component not in COMPONENTS:
            raise CheckpointError(
                f"the diffusers checkpoint has {key}, of none of its parts ({', '.join(COMPONENTS)})"
            )
        components.setdefault(component, {})[name] = tensor
    return components


def _described(kind: str, tensors: Mapping[str, Tensor]) -> CheckpointDescription:
    unet = tuple(key for key in tensors if kind == UNET_ALONE or key.startswith((UNET_PREFIX, "unet.")))
    widths = [tensors[key].shape[-1] for key in unet if key.endswith(_CONTEXT_ENDS)]
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return CheckpointDescription(
        kind=kind,
        text_encoder=_text_encoder(tensors),
        context_dim=widths[0] if widths else None,
        unet_weights=sum(tensors[key].numel() for key in unet),
        dtypes=tuple(sorted(counts, key=lambda name: -counts[name])),
        ema=has_ema(tensors),
    )


def _text_encoder(tensors: Mapping[str, Tensor]) -> str | None:
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        return "OpenCLIP"
    for key, tensor in tensors.items():
        if key.startswith(("cond_stage_model.", "text_encoder.")):
            if not key.endswith("position_embedding.weight"):
                continue
            # transformers' names are the same for both: only the width tells
            wide = key.startswith("text_encoder.") and tensor.shape[-1] == 1024
            return "OpenCLIP" if wide else "CLIP"
    return None
