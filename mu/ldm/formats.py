"""Checkpoints of every kind that is read here, recognised by what is in them, under CompVis' names.

| kind | what it is |
|---|---|
| CompVis checkpoint | one file with `model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*` |
| diffusers folder | `model_index.json` and a folder for each network |
| diffusers checkpoint | one file with `unet.*`, `vae.*`, `text_encoder.*` in diffusers' names |
| UNet in diffusers' names | one file with `down_blocks.*`, perhaps after `unet.`; whole, or only what was trained |
| UNet in CompVis' names | one file with `input_blocks.*`, without `model.diffusion_model.` before them |

The last two, and a CompVis checkpoint without its VAE or text encoder, are parts of a model: a base completes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mu.ldm.diffusers_folder import is_diffusers_folder, read_diffusers_folder
from mu.ldm.diffusers_tensors import COMPONENTS, UNET_PREFIX, VAE_PREFIX, from_diffusers
from mu.ldm.ema import EMA_PREFIX, has_ema, with_ema_weights
from mu.ldm.params import LatentDiffusionParams
from mu.ldm.recognise import other_kind
from mu.ldm.tensor_file import CheckpointError, Reader, read_state_dict

COMPVIS, FOLDER, FILE = "CompVis checkpoint", "diffusers folder", "diffusers checkpoint"
UNET_ALONE, UNKNOWN = "UNet in diffusers' names", "file of tensors of no known kind"
UNET_BARE = "UNet in CompVis' names"
_UNET_PARTS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "time_embedding.",
    "conv_in.",
    "conv_norm_out.",
    "conv_out.",
)
_BARE_PARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")
_PART_NAMES = {UNET_PREFIX: "UNet", VAE_PREFIX: "VAE (autoencoder)", "cond_stage_model.": "text encoder"}
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
    tensors, metadata = read_state_dict(path)
    other = other_kind(tensors, metadata)
    return _described(other.name if other is not None else kind_of(tensors), tensors)


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
    if is_diffusers_folder(path):
        components = read_diffusers_folder(path, params, read=read)
        joined = _joined(components)
        refuse_other_kinds(joined, {}, source=path)
        description = _described(FOLDER, joined)
        tensors = from_diffusers(components, params, source=path)
    else:
        tensors, metadata = read(path)
        refuse_other_kinds(tensors, metadata, source=path)
        description = _described(kind_of(tensors), tensors)
        if description.kind == FILE:
            tensors = from_diffusers(_split(tensors), params, source=path)
        elif description.kind == UNET_ALONE:
            unet = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
            tensors = from_diffusers({"unet": unet}, params, source=path)
        elif description.kind == UNET_BARE:
            tensors = {UNET_PREFIX + name: tensor for name, tensor in tensors.items()}
    if base is not None:
        tensors = {**_rest_of(base, tensors), **tensors}
    _refuse_parts(tensors, params, path, description.kind)
    if use_ema:
        chosen = with_ema_weights(tensors, source=path)
        tensors = {key: tensor for key, tensor in chosen.items() if not key.startswith(EMA_PREFIX)}
    return Checkpoint(tensors=tensors, description=description)


def refuse_other_kinds(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, source: str | Path
) -> None:
    """Raises CheckpointError where a file is known to be something else, and says what and what to do."""
    if (other := other_kind(tensors, metadata)) is not None:
        raise CheckpointError(f"{source} is {other.name}, not a checkpoint that is read here: {other.advice}")


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """The kind of a file, by the names of its tensors."""
    if any(key.startswith(UNET_PREFIX) for key in tensors):
        return COMPVIS
    if any(key.startswith(("vae.", "text_encoder.")) for key in tensors):
        return FILE
    if tensors and all(key.removeprefix("unet.").startswith(_UNET_PARTS) for key in tensors):
        return UNET_ALONE
    if tensors and all(key.startswith(_BARE_PARTS) for key in tensors):
        return UNET_BARE
    return UNKNOWN


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
        f"the rest of the model that it was made from: convert {path} whole.safetensors --base_ckpt_path MODEL"
    )


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
    alone = kind in (UNET_ALONE, UNET_BARE)
    unet = tuple(key for key in tensors if alone or key.startswith((UNET_PREFIX, "unet.")))
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
