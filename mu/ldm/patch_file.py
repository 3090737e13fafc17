"""Patch files: the changed entries of a checkpoint as safetensors. docs/patches.md describes the layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import EMA_PREFIX
from mu.ldm.patch import INTEGERS, Patch, PatchError, TensorPatch
from mu.ldm.tensor_file import (
    FINGERPRINT_KEY,
    CheckpointError,
    is_shape,
    read_state_dict,
    write_state_dict,
)

PATCH_FORMAT = 1
"""Version of the file."""
SUFFIX = ".patch.safetensors"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_OWN_KEYS = ("patch_format", "tensors", "base_fingerprint", "has_ema", "weights_changed", "cast")
_AGAIN = "get it again, or make it again by training"


def save_patch(patch: Patch, path: str | Path) -> None:
    """Write a patch, whole or not at all. The same patch gives the same file, to the byte.

    Raises:
        PatchError: the name does not end in `.safetensors`, or the metadata is no JSON.
        CheckpointError: the file could not be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise PatchError(f"{path}: patches are written as .safetensors, not {path.suffix!r}")
    if clash := sorted(set(_OWN_KEYS) & patch.metadata.keys()):
        raise PatchError(f"{path}: the metadata must not have the keys {', '.join(clash)}")
    stored, described = stored_form(patch, path)
    write_state_dict(stored, path, described)


def stored_form(patch: Patch, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a patch file.

    Raises:
        PatchError: the metadata is no JSON; names the path.
    """
    own: dict[str, Any] = {
        "patch_format": PATCH_FORMAT,
        "base_fingerprint": patch.base_fingerprint,
        "has_ema": patch.has_ema,
        "weights_changed": patch.weights_changed,
        "tensors": {
            name: {
                "shape": list(part.shape),
                "dtype": _name_of(part.dtype),
                "old": part.old,
                "new": part.new,
            }
            for name, part in patch.tensors.items()
        },
    }
    if patch.cast:
        own["cast"] = {name: [*map(_name_of, dtypes)] for name, dtypes in patch.cast.items()}
    stored: dict[str, Tensor] = {}
    for name, part in patch.tensors.items():
        for kind, tensor in (("xor", part.values), ("bits", part.bits), ("index", part.index)):
            if tensor is not None:
                stored[f"{kind}/{name}"] = tensor
    try:
        described = {
            key: json.dumps(value, allow_nan=False) for key, value in {**patch.metadata, **own}.items()
        }
    except (TypeError, ValueError) as error:
        raise PatchError(f"{path}: the metadata cannot be written as JSON: {error}") from error
    return stored, described


def load_patch(path: str | Path) -> Patch:
    """Read a patch; what it says of itself must agree.

    Raises:
        PatchError: the file is missing, truncated, damaged, or not a patch.
    """
    path = Path(path)
    try:
        stored, metadata = read_state_dict(path)
    except CheckpointError as error:
        raise PatchError(f"no patch could be read: {error}") from error
    if "patch_format" not in metadata:
        raise PatchError(
            f"{path} is no patch: its metadata has no patch_format (is it a checkpoint, or a mask?)"
        )
    own = _parsed(metadata, path)
    described = own["tensors"]
    parts = {name: _part(name, told, stored, path) for name, told in described.items()}
    if stored:
        raise PatchError(f"{path} is damaged: nothing is told of {', '.join(sorted(stored)[:5])}; {_AGAIN}")
    patch = Patch(
        tensors=parts,
        base_fingerprint=own["base_fingerprint"],
        has_ema=own["has_ema"],
        cast={name: (_dtype(old), _dtype(new)) for name, (old, new) in own.get("cast", {}).items()},
        metadata={key: value for key, value in own.items() if key not in _OWN_KEYS},
        source=str(path),
    )
    if patch.weights_changed != own["weights_changed"]:
        raise PatchError(
            f"{path} is damaged: it changes {patch.weights_changed} weights, its metadata says "
            f"{own['weights_changed']}; {_AGAIN}"
        )
    return patch


def _parsed(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        own = {k: json.loads(text) for k, text in metadata.items() if k not in ("format", FINGERPRINT_KEY)}
    except (ValueError, RecursionError) as error:
        raise PatchError(f"{path} is damaged: its metadata is no JSON: {error}; {_AGAIN}") from error
    if own["patch_format"] != PATCH_FORMAT:
        raise PatchError(f"{path} has patch format {own['patch_format']}; this version reads {PATCH_FORMAT}")
    sound = (
        isinstance(own.get("tensors"), dict)
        and all(_is_sound(name, told) for name, told in own["tensors"].items())
        and isinstance(own.get("base_fingerprint"), str)
        and _FINGERPRINT.fullmatch(own["base_fingerprint"])
        and isinstance(own.get("has_ema"), bool)
        and isinstance(own.get("weights_changed"), int)
        and isinstance(own.get("cast", {}), dict)
        and all(_is_sound_cast(name, told, own["tensors"]) for name, told in own.get("cast", {}).items())
    )
    if not sound:
        raise PatchError(f"{path} is damaged: its metadata does not describe a patch; {_AGAIN}")
    return own


def _is_sound(name: str, told: object) -> bool:
    return (
        name.startswith((UNET_PREFIX, EMA_PREFIX))
        and isinstance(told, dict)
        and told.keys() == {"shape", "dtype", "old", "new"}
        and is_shape(told["shape"])
        and _is_dtype(told["dtype"])
        and all(isinstance(told[key], str) and _SHA256.fullmatch(told[key]) for key in ("old", "new"))
    )


def _is_sound_cast(name: str, told: object, tensors: Mapping[str, Any]) -> bool:
    return (
        name.startswith((UNET_PREFIX, EMA_PREFIX))
        and isinstance(told, list)
        and len(told) == 2
        and all(_is_dtype(dtype) and _dtype(dtype).is_floating_point for dtype in told)
        and told[0] != told[1]
        and (name not in tensors or tensors[name]["dtype"] == told[1])
    )


def _is_dtype(name: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(getattr(torch, name, None), torch.dtype)
        and getattr(torch, name).itemsize in INTEGERS
    )


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _part(name: str, told: Mapping[str, Any], stored: dict[str, Tensor], path: Path) -> TensorPatch:
    """One tensor's changed entries, taken out of `stored` and checked: they are as many as marked, and do change."""
    dtype = _dtype(told["dtype"])
    values, bits, index = (stored.pop(f"{kind}/{name}", None) for kind in ("xor", "bits", "index"))
    if values is None:
        raise PatchError(f"{path} is damaged: it lacks the values of {name}; {_AGAIN}")
    part = TensorPatch(
        shape=tuple(told["shape"]),
        dtype=dtype,
        values=values,
        bits=bits,
        index=index,
        old=told["old"],
        new=told["new"],
    )
    if (fault := _fault(part)) is not None:
        raise PatchError(f"{path} is damaged: {name} {fault}; {_AGAIN}")
    return part


def _fault(part: TensorPatch) -> str | None:
    size, count, wanted = part.size, part.values.numel(), INTEGERS[part.dtype.itemsize]
    if part.values.dtype != wanted or part.values.ndim != 1:
        return f"has values of {part.values.dtype}, not a row of {wanted} for {part.dtype}"
    if not bool((part.values != 0).all()) or not count:
        return "has entries that do not change"
    if part.bits is not None and part.index is not None:
        return "marks its entries twice"
    # What is marked is counted without a tensor of the size that is claimed: a file may claim terabytes.
    if part.bits is not None:
        if part.bits.dtype != torch.uint8 or part.bits.shape != ((size + 7) // 8,):
            return f"has {tuple(part.bits.shape)} {part.bits.dtype} of marks for shape {part.shape}"
        if size % 8 and int(part.bits[-1]) >> size % 8:
            return f"has marks beyond its {size} entries"
        marked = int(part.changed().count_nonzero())
    elif part.index is not None:
        index = part.index
        if index.dtype != torch.int32 or index.ndim != 1 or not index.numel():
            return "has positions that are not a row of int32"
        ascending = bool((index[1:] > index[:-1]).all())
        if not ascending or int(index[0]) < 0 or int(index[-1]) >= size:
            return f"has positions that are not ascending within its {size} entries"
        marked = index.numel()
    else:
        marked = size
    if marked != count:
        return f"marks {marked} entries and has values for {count}"
    return None
