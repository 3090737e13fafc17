"""Mask files: one bit a weight, with what the mask was made from; and whether a mask fits a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mu.ldm.tensor_file import (
    FINGERPRINT_KEY,
    MOST_DIMENSIONS,
    CheckpointError,
    is_shape,
    read_state_dict,
    write_state_dict,
)
from mu.unlearning.optim import SelectionError

MASK_FORMAT = 1
"""Version of the file. Each tensor is a (ceil(n / 8),) uint8 vector under the weight's name: entry i, in row-major
order, is bit i % 8 of byte i // 8, least significant first; spare bits are 0. Metadata: `mask_format`; `shapes`, JSON
of {name: shape} in the order of the mask; the counts `kept` and `total`; and whatever the writer adds."""


_FILE_KEYS = ("format", FINGERPRINT_KEY)
"""Metadata that every file of tensors has."""

Mask = dict[str, Tensor]
"""UNet-relative name -> bool tensor of the weight's shape; True: the entry may move."""


class MaskError(SelectionError):
    """A mask cannot be made, is damaged, or is of another model."""


def save_mask(mask: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write a mask as safetensors, one bit a weight, whole or not at all.

    Args:
        mask: UNet-relative name -> bool tensor.
        path: ends in `.safetensors`.
        metadata: what the mask is: `concept`, `threshold`, `pool`, `model_fingerprint` and the like; values are
            anything that JSON knows. `load_mask_metadata` gives them back, with the counts `kept` and `total`.

    Raises:
        MaskError: a tensor is not bool, or the metadata is not JSON or contradicts the mask.
        CheckpointError: the file could not be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise MaskError(f"{path}: masks are written as .safetensors, not {path.suffix!r}")
    shapes = {name: tuple(marked.shape) for name, marked in mask.items()}
    described = stored_form(metadata, shapes, kept=_count_kept(mask, path), path=path)
    write_state_dict({name: _pack(marked) for name, marked in mask.items()}, path, described)


def stored_form(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kept: int,
    path: str | Path = "the mask",
) -> dict[str, str]:
    """What a mask file carries as metadata; see `save_mask`.

    Args:
        path: names the file in errors.
    """
    own = {
        "mask_format": MASK_FORMAT,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "kept": kept,
        "total": sum(map(math.prod, shapes.values())),
    }
    for key in own.keys() & metadata.keys():
        if metadata[key] != own[key]:
            raise MaskError(f"{path}: the metadata says {key} = {metadata[key]!r}; the mask: {own[key]!r}")
    try:
        return {key: _to_text(value) for key, value in {**metadata, **own}.items()}
    except (TypeError, ValueError) as error:
        raise MaskError(f"{path}: the metadata cannot be written as JSON: {error}") from error


def load_mask(path: str | Path) -> Mask:
    """Read a mask: a file of `save_mask`, or a `.pt` dict of 0/1 tensors as SalUn's authors write it.

    Returns:
        UNet-relative name -> bool tensor on the CPU, in the order in which it was saved.

    Raises:
        MaskError: the file is missing, damaged, not a mask, has values other than 0 and 1, or marks nothing.
    """
    try:
        tensors, metadata = read_state_dict(path)
    except CheckpointError as error:
        raise MaskError(f"no mask could be read: {error}") from error
    if "mask_format" in metadata:
        mask = _unpack_all(tensors, _parse_metadata(metadata, path), path)
    else:
        mask = {name: _from_numbers(name, tensors.pop(name), path) for name in list(tensors)}
    _refuse_empty(mask, path)
    return mask


def load_mask_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_mask` was told of a mask, with `kept` and `total`; read from the head of the file alone.

    Returns:
        The metadata; empty for a `.pt` mask, which has none.

    Raises:
        MaskError: the file is missing or damaged, or is a safetensors file but no mask.
    """
    path = Path(path)
    if not path.is_file():
        raise MaskError(f"{path}: there is no such mask file")
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise MaskError(f"{path} is not a valid safetensors file: {error}; make the mask again") from error
    if "mask_format" not in metadata:
        raise MaskError(f"{path} is a safetensors file, but no mask: its metadata has no mask_format")
    parsed = _parse_metadata(metadata, path)
    return {key: value for key, value in parsed.items() if key not in ("mask_format", "shapes")}


def check_mask(
    mask: Mapping[str, Tensor],
    unet: nn.Module,
    *,
    metadata: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Refuse a mask that is not of this UNet.

    Args:
        mask: name -> bool tensor.
        unet: its parameters' names and shapes must be exactly those of the mask.
        metadata: of the mask; its `model_fingerprint`, if it has one, must be `fingerprint`.
        fingerprint: of the model that is going to be trained.

    Raises:
        MaskError: names the first few differences, or both fingerprints.
    """
    check_shapes({name: tuple(marked.shape) for name, marked in mask.items()}, unet)
    _refuse_empty(mask, "the mask")
    check_fingerprint(metadata or {}, fingerprint)


def check_shapes(given: Mapping[str, tuple[int, ...]], unet: nn.Module) -> None:
    """Refuse a mask whose names and shapes are not those of a UNet's parameters, which may be on the meta device.

    Raises:
        MaskError: names the first few differences.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    missing = [name for name in shapes if name not in given]
    unknown = [name for name in given if name not in shapes]
    differing = [
        f"{name} {given[name]} instead of {shape}"
        for name, shape in shapes.items()
        if name in given and given[name] != shape
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (differing, "of another shape"))
        if names
    ]
    if faults:
        raise MaskError(f"the mask is of another model: {'; '.join(faults)}. Make one from this checkpoint")


def check_fingerprint(metadata: Mapping[str, Any], fingerprint: str | None) -> None:
    """Refuse a mask that says it was made from another model than the one of a fingerprint; None: not known.

    Raises:
        MaskError: names both.
    """
    made_from = metadata.get("model_fingerprint")
    if made_from is not None and fingerprint is not None and made_from != fingerprint:
        raise MaskError(
            f"the mask was made from a model with fingerprint {made_from}, this one has {fingerprint}: "
            "make a mask from this checkpoint, or load the one that the mask was made from"
        )


def marks_of(path: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The shape of each tensor of a mask file, and how many of its entries are marked; one tensor at a time.

    Raises:
        MaskError: see `load_mask`.
    """
    if Path(path).suffix != ".safetensors":
        mask = load_mask(path)
        shapes = {name: tuple(marked.shape) for name, marked in mask.items()}
        return shapes, {name: count_marked(marked) for name, marked in mask.items()}
    load_mask_metadata(path)  # refuses what is no mask
    try:
        with safe_open(path, framework="np") as file:
            shapes = _parse_metadata(file.metadata(), path)["shapes"]
            marks = {
                name: int(np.unpackbits(file.get_tensor(name)).sum(dtype=np.int64))
                for name in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise MaskError(f"{path} is damaged: {error}; make the mask again") from error
    return {name: tuple(shape) for name, shape in shapes.items()}, marks


def count_marked(marked: Tensor) -> int:
    """How many entries of a bool tensor, on any device, are True."""
    if marked.device.type == "cpu":
        return int(np.count_nonzero(marked.numpy()))  # several times as fast as torch
    return int(marked.count_nonzero())


def _count_kept(mask: Mapping[str, Tensor], source: object) -> int:
    for name, marked in mask.items():
        if marked.dtype != torch.bool:
            raise MaskError(f"{source}: {name} is {marked.dtype}, not bool")
    return sum(count_marked(marked) for marked in mask.values())


def _refuse_empty(mask: Mapping[str, Tensor], source: object) -> None:
    if not _count_kept(mask, source):
        raise MaskError(f"{source}: no weight is marked, in {len(mask)} tensors: nothing could be trained")


def _pack(marked: Tensor) -> Tensor:
    bits = marked.detach().cpu().reshape(-1).numpy()  # (n,)
    return torch.from_numpy(np.packbits(bits, bitorder="little"))  # (ceil(n / 8),)


def _unpack_all(packed: Mapping[str, Tensor], metadata: Mapping[str, Any], path: str | Path) -> Mask:
    shapes = metadata["shapes"]
    if packed.keys() != shapes.keys():
        differing = sorted(packed.keys() ^ shapes.keys())
        raise MaskError(f"{path} is damaged: tensors and `shapes` disagree on {', '.join(differing[:5])}")
    mask = {}
    for name, shape in shapes.items():
        size, bits = math.prod(shape), packed[name]
        if bits.dtype != torch.uint8 or bits.shape != ((size + 7) // 8,):
            raise MaskError(
                f"{path} is damaged: {name} is {tuple(bits.shape)} {bits.dtype} for shape {shape}"
            )
        unpacked = np.unpackbits(bits.numpy(), bitorder="little")
        if unpacked[size:].any():
            raise MaskError(f"{path} is damaged: {name} has bits beyond its {size} entries")
        mask[name] = torch.from_numpy(unpacked[:size].view(np.bool_)).view(shape)
    kept = _count_kept(mask, path)
    if kept != metadata["kept"]:
        raise MaskError(f"{path} is damaged: {kept} entries are marked, its metadata says {metadata['kept']}")
    return mask


def _from_numbers(name: str, values: Tensor, path: str | Path) -> Tensor:
    if values.ndim > MOST_DIMENSIONS:
        raise MaskError(f"{path} is not a mask: {name} has {values.ndim} dimensions")
    if values.dtype == torch.bool:
        return values
    marked = values == 1
    if not (marked | (values == 0)).all():
        raise MaskError(f"{path} is not a mask: {name} has values other than 0 and 1 (is it a checkpoint?)")
    return marked


def _to_text(value: Any) -> str:
    """A string as it is, unless it could be read as JSON; anything else as JSON. `_from_text` undoes it."""
    if isinstance(value, str) and isinstance(_from_text(value), str) and _from_text(value) == value:
        return value
    return json.dumps(value, allow_nan=False)


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and lists in lists in lists
        return text


def _parse_metadata(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    parsed = {key: _from_text(value) for key, value in metadata.items() if key not in _FILE_KEYS}
    if parsed["mask_format"] != MASK_FORMAT:
        raise MaskError(f"{path} has mask format {metadata['mask_format']}; this version reads {MASK_FORMAT}")
    shapes = parsed.get("shapes")
    sound = isinstance(shapes, dict) and all(is_shape(shape) for shape in shapes.values())
    if not sound or not isinstance(parsed.get("kept"), int):
        raise MaskError(f"{path} is damaged: its metadata lacks the shapes or the count of the mask")
    return parsed
