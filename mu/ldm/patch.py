"""Patches turn one checkpoint into another and back: which entries of its tensors changed, and their old XOR new bits.

XOR of the bits undoes itself, so that one patch both applies and removes, exactly, whatever the bits mean: -0.0, NaN
payloads and denormals come back as they were. It is no arithmetic, though: where two patches change the same entry,
one on top of the other gives nonsense. Each patch therefore knows the SHA-256 of the values that it was made from and
of those that it leads to, tensor by tensor, at its entries and nowhere else. So a patch is refused where its entries
hold anything but its base's values, and patches that share no entry may come and go in any order.

A run may write its UNet in another dtype than that of its base (`save_dtype`). Its patch notes both dtypes: the base is
cast first, and cast back when the patch has been removed, where the new dtype holds every number of the old one.

What follows: what a patch is; making one; applying and removing one; several at once; whole checkpoints; the file, of
which docs/checkpoints.md describes the layout.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mu.errors import MuError
from mu.ldm.checkpoint import read_checkpoint
from mu.ldm.diffusers_folder import is_diffusers_folder, write_diffusers_folder
from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import EMA_PREFIX, ema_name, has_ema, updated_ema, with_ema_weights
from mu.ldm.model_config import load_model_config
from mu.ldm.recognise import COMPVIS, FILE, UNKNOWN, kind_of, refuse_other_kinds
from mu.ldm.tensor_file import (
    FINGERPRINT_KEY,
    PICKLE_SUFFIXES,
    CheckpointError,
    fingerprint,
    is_shape,
    read_state_dict,
    write_state_dict,
)
from mu.ldm.unet_dtype import holds

PATCH_FORMAT = 1
"""Version of the file."""
SUFFIX = ".patch.safetensors"

# Bytes of a dtype -> the integers that hold its bits.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and dtype.itemsize in _INTEGERS
}
_CHANGED_PARTS = (UNET_PREFIX, EMA_PREFIX)
_OWN_KEYS = ("patch_format", "tensors", "base_fingerprint", "has_ema", "weights_changed", "cast")
_AGAIN = "get it again, or make it again by training"
_SHOWN = 5


class PatchError(MuError, ValueError):
    """A patch cannot be made, is damaged, or does not fit what it is to be applied to or removed from."""


@dataclass(frozen=True, kw_only=True)
class TensorPatch:
    """The changed entries of one tensor of n entries, of which at least one changed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    """(count,) integers as wide as the dtype: old XOR new bits of the changed entries, in row-major order."""
    bits: Tensor | None
    """(ceil(n / 8),) uint8: entry i changed where bit i % 8 of byte i // 8 is set, least significant first."""
    index: Tensor | None
    """(count,) int32, ascending row-major positions, where that is smaller than `bits`; both None: all changed."""
    old: str
    """SHA-256 of the changed entries' bits before, in row-major order; 64 hexadecimal digits."""
    new: str
    """The same, after."""

    @property
    def size(self) -> int:
        """Number of the tensor's entries, changed or not."""
        return math.prod(self.shape)

    def changed(self) -> Tensor:
        """(n,) bool: which entries changed."""
        if self.bits is not None:
            unpacked = np.unpackbits(self.bits.numpy(), bitorder="little", count=self.size)
            return torch.from_numpy(unpacked.view(np.bool_))
        if self.index is None:
            return torch.ones(self.size, dtype=torch.bool)
        changed = torch.zeros(self.size, dtype=torch.bool)
        changed[self.index.long()] = True
        return changed


@dataclass(frozen=True, kw_only=True)
class Patch:
    """The difference of two checkpoints' UNets, and of their EMA copies where they have them."""

    tensors: Mapping[str, TensorPatch]
    """CompVis name -> changed entries; tensors without any are absent."""
    base_fingerprint: str
    """Of the UNet that the patch was made from, as masks note it."""
    has_ema: bool
    """Whether the checkpoint that it was made from has an EMA copy of the UNet; its changes are then in the patch."""
    cast: Mapping[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    """CompVis name -> dtypes in the base and in what the patch leads to, of tensors of which they differ."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else its maker noted, such as the concept that was forgotten."""
    source: str = "the patch"
    """What it is called in messages, as a rule its path."""

    @property
    def weights_changed(self) -> int:
        """Number of changed weights; their EMA copies are not counted."""
        counts = {name: tensor.values.numel() for name, tensor in self.tensors.items()}
        return sum(count for name, count in counts.items() if not name.startswith(EMA_PREFIX))


# ---- making one


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor's entries as integers of the same shape: NaN and -0.0 compare as what they are."""
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.dtype.itemsize])


def base_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of a checkpoint's UNet, in the dtypes of the file: what masks call `model_fingerprint`."""
    return fingerprint(
        {name.removeprefix(UNET_PREFIX): t for name, t in tensors.items() if name.startswith(UNET_PREFIX)}
    )


def make_patch(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> Patch:
    """The patch that turns the UNet of one checkpoint, and its EMA copy, into those of another.

    Args:
        before: all tensors of a checkpoint under CompVis' names; those of other networks are not looked at.
        after: the same, changed; its tensors may be in other float dtypes, see `Patch.cast`.
        metadata: see `Patch.metadata`.
        base: the `base_fingerprint` of `before`, where it is known.

    Raises:
        PatchError: they differ in names or shapes, or in dtypes that are not floats.
    """
    names = [name for name in before if name.startswith(_CHANGED_PARTS)]
    others = {name for name in after if name.startswith(_CHANGED_PARTS)}
    if differing := sorted(others ^ set(names)):
        raise PatchError(
            f"no patch can be made: only one of both checkpoints has {_listed(differing)}; a patch is between "
            "two states of one model"
        )
    tensors, cast = {}, {}
    for name in names:
        old, new = before[name], after[name]
        floats = old.is_floating_point() and new.is_floating_point()
        if old.shape != new.shape or (old.dtype != new.dtype and not floats):
            raise PatchError(
                f"no patch can be made: {name} is {old.dtype} {tuple(old.shape)} before and {new.dtype} "
                f"{tuple(new.shape)} after"
            )
        if old.dtype != new.dtype:
            cast[name] = old.dtype, new.dtype
        if (made := _tensor_patch(old.to(new.dtype), new)) is not None:
            tensors[name] = made
    return Patch(
        tensors=tensors,
        base_fingerprint=base_fingerprint(before) if base is None else base,
        has_ema=has_ema(before),
        cast=cast,
        metadata=dict(metadata or {}),
    )


def _tensor_patch(before: Tensor, after: Tensor) -> TensorPatch | None:
    old, new = bits_of(before).reshape(-1), bits_of(after).reshape(-1)  # (n,)
    changed = old != new  # (n,)
    count, size = int(changed.count_nonzero()), changed.numel()
    if not count:
        return None
    old, new = old[changed], new[changed]  # (count,)
    bits = index = None  # the smaller of both; where all have changed, neither
    if 4 * count < (size + 7) // 8 and size <= 2**31:
        index = changed.nonzero().view(-1).to(torch.int32)
    elif count < size:
        bits = torch.from_numpy(np.packbits(changed.numpy(), bitorder="little"))
    return TensorPatch(
        shape=tuple(before.shape),
        dtype=before.dtype,
        values=old ^ new,
        bits=bits,
        index=index,
        old=_sha256(old),
        new=_sha256(new),
    )


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _listed(names: Collection[str]) -> str:
    """`7 tensors: a, b, c, d, e, ...`."""
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{len(names)} tensors: {shown}{', ...' if len(names) > _SHOWN else ''}"


# ---- applying and removing one


def apply_patch(
    tensors: Mapping[str, Tensor], patch: Patch, *, source: object = "the model"
) -> dict[str, Tensor]:
    """The tensors of a checkpoint after a patch; the given ones are not changed.

    EMA copies in the patch are passed over where the checkpoint has none. What the patch has in another dtype is cast.

    Args:
        tensors: all tensors of a checkpoint, under CompVis' names.
        source: names the checkpoint in errors.

    Raises:
        PatchError: a changed entry does not hold the value that the patch was made from, or a tensor is missing or of
            another shape or dtype.
    """
    return _toggled(_cast_for(tensors, patch, source=source), patch, source=source, removing=False)


def remove_patch(
    tensors: Mapping[str, Tensor], patch: Patch, *, source: object = "the model"
) -> dict[str, Tensor]:
    """The tensors of a checkpoint without a patch that was applied to it, to the bit what they were before.

    They come back in the base's dtypes, unless these would round: then another patch is still in them, and they stay in
    those of the patch.

    Raises:
        PatchError: see `apply_patch`; there are EMA copies of which the patch does not know the old values; or the base
            was rounded to another dtype, and its own values are not in the patch.
    """
    if lost := [name for name, (old, new) in patch.cast.items() if name in tensors and not holds(new, old)]:
        old, new = patch.cast[lost[0]]
        raise PatchError(
            f"{patch.source} cannot be removed from {source}: it is of a run that wrote {_listed(lost)} in {new}, "
            f"which rounded the base's {old}. Take the checkpoint that the run was begun with"
        )
    if has_ema(tensors) and not patch.has_ema:
        raise PatchError(
            f"{source} has EMA copies of its weights, {patch.source} has not: their old values are not in it. Applying "
            "it wrote a patch beside the output that has them: remove that one"
        )
    removed = _toggled(_cast_for(tensors, patch, source=source), patch, source=source, removing=True)
    narrow = {name: removed[name].to(old) for name, (old, _) in patch.cast.items() if name in removed}
    exact = all(
        torch.equal(bits_of(t.to(removed[name].dtype)), bits_of(removed[name])) for name, t in narrow.items()
    )
    return removed | narrow if exact else removed


def _cast_for(tensors: Mapping[str, Tensor], patch: Patch, *, source: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the dtypes of what a patch leads to, see `Patch.cast`.

    EMA copies that the patch does not know take the dtype of their weights: a narrower one would keep old values.
    """
    wanted = dict(patch.cast)
    if not patch.has_ema:
        copies = {ema_name(name): new for name, (_, new) in patch.cast.items()}
        wanted |= {name: (tensors[name].dtype, new) for name, new in copies.items() if name in tensors}
    result = dict(tensors)
    for name, (old, new) in wanted.items():
        if name not in tensors:  # an EMA copy; a weight that is missing is found where it is changed
            continue
        if tensors[name].dtype not in (old, new):
            raise PatchError(
                f"{patch.source} is not a patch of {source}: {name} was {old} in its base and {new} after, the "
                f"checkpoint has {tensors[name].dtype}. Give the checkpoint that it was made from, in the type that it "
                "had"
            )
        result[name] = tensors[name].to(new)
    return result


def _toggled(
    tensors: Mapping[str, Tensor], patch: Patch, *, source: object, removing: bool
) -> dict[str, Tensor]:
    """The tensors with the bits of the patch's entries flipped, once all of them are known to be the right ones."""
    result, wrong, done = dict(tensors), [], 0
    names = [name for name in patch.tensors if not name.startswith(EMA_PREFIX) or has_ema(tensors)]
    for name in names:
        part, tensor = patch.tensors[name], tensors.get(name)
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != (part.shape, part.dtype):
            is_what = "has none" if tensor is None else f"has {tensor.dtype} {tuple(tensor.shape)}"
            raise PatchError(
                f"{patch.source} is not a patch of {source}: it changes {name}, {part.dtype} {part.shape}; "
                f"the checkpoint {is_what}. Give the checkpoint that it was made from, in the type that it had"
            )
        expected, leads_to = (part.new, part.old) if removing else (part.old, part.new)
        flat, changed = bits_of(tensor).reshape(-1).clone(), part.changed()  # (n,)
        found = flat[changed]  # (count,)
        if (digest := _sha256(found)) != expected:
            wrong.append(name)
            done += digest == leads_to
            continue
        toggled = found ^ part.values
        if _sha256(toggled) != leads_to:
            raise PatchError(
                f"{patch.source} is damaged: its values do not lead to the SHA-256 that it notes for {name}; "
                "get the file again"
            )
        flat[changed] = toggled
        result[name] = flat.view(part.dtype).view(part.shape)
    if not wrong:
        return result
    if done == len(names):
        state, when = ("is not applied to", "before") if removing else ("is already applied to", "after")
        raise PatchError(f"{patch.source} {state} {source}: all of its entries hold the values {when} it")
    found_at = f"at its entries, {len(wrong)} of its {len(names)} tensors ({_listed(wrong)})"
    if removing:
        raise PatchError(
            f"{patch.source} cannot be removed from {source}: {found_at} do not hold the values that it leads to. It "
            "was not applied, or something else has changed them since"
        )
    hint = (
        "Another patch may have changed the same entries: remove that one, or apply both at once to the base"
    )
    if patch.metadata.get("use_ema"):
        hint = "It was made from EMA weights: set use_ema"
    raise PatchError(
        f"{patch.source} is not a patch of {source}: {found_at} do not hold the values that it was made from. The UNet "
        f"that it was made from has fingerprint {patch.base_fingerprint}, this one {base_fingerprint(tensors)}. {hint}"
    )


# ---- several at once


def apply_patches(
    tensors: Mapping[str, Tensor],
    patches: Sequence[Patch],
    *,
    overlap: str = "refuse",
    source: object = "the model",
) -> tuple[dict[str, Tensor], Patch | None]:
    """Apply patches that were made from the same base; their order makes no difference.

    An EMA copy that a patch does not know is updated as `mu.ldm.ema.updated_ema` does it. Patches of runs that wrote
    another dtype than their base's give that dtype, see `Patch.cast`.

    Args:
        overlap: what becomes of an entry that several of them change. refuse: an error. add: its value in the base
            plus the sum of the patches' changes, in float64, rounded once.

    Returns:
        The tensors; and, where the patches alone could not take them back (entries were added, or an EMA copy was
        updated that is not in them), the one patch that does.

    Raises:
        PatchError: see `apply_patch`; they are of different bases or lead to different dtypes; they overlap and that is
            refused; a sum is not finite.
    """
    # 1. They must go together.
    if len({patch.base_fingerprint for patch in patches}) > 1:
        raise PatchError(
            "the patches were made from different bases: "
            + "; ".join(f"{patch.source} from {patch.base_fingerprint}" for patch in patches)
        )
    differing = [patch for patch in patches if _weights_cast(patch) != _weights_cast(patches[0])]
    if differing:
        raise PatchError(
            f"{patches[0].source} and {differing[0].source} lead to UNets of different dtypes; only patches of runs "
            "with the same save_dtype can be applied to one checkpoint"
        )
    overlaps = [(a, b, _overlap(a, b)) for a, b in itertools.combinations(patches, 2)]
    overlapping = [(a, b, counts) for a, b, counts in overlaps if counts]
    if overlapping and overlap == "refuse":
        a, b, counts = overlapping[0]
        more = f" (and {len(overlapping) - 1} more pairs of patches)" if len(overlapping) > 1 else ""
        raise PatchError(
            f"{a.source} and {b.source} both change {sum(counts.values()):,} entries of {_listed(counts)}{more}; "
            "what is to become of them is not defined. Apply one of them; or add up their changes (overlap add)"
        )

    # 2. Apply them, or add up their changes.
    base = dict(tensors)
    for patch in patches:
        base = _cast_for(base, patch, source=source)
    if overlapping:
        after = _sum(base, patches, source=source)
    else:
        after = base
        for patch in patches:
            after = apply_patch(after, patch, source=source)

    # 3. Update EMA copies that they do not know; then only a new patch takes all of it back.
    if not overlapping and not (has_ema(tensors) and not all(patch.has_ema for patch in patches)):
        return after, None
    after |= updated_ema(after, base, use_ema=False, source=str(source))
    names = [patch.source for patch in patches]
    return after, make_patch(tensors, after, metadata={"combined_from": names})


def _weights_cast(patch: Patch) -> dict[str, object]:
    return {name: dtypes for name, dtypes in patch.cast.items() if not name.startswith(EMA_PREFIX)}


def _overlap(a: Patch, b: Patch) -> dict[str, int]:
    """Weight -> how many of its entries both patches change, where any. EMA copies follow their weights."""
    counts = {
        name: int((a.tensors[name].changed() & b.tensors[name].changed()).count_nonzero())
        for name in a.tensors
        if name in b.tensors
        and not name.startswith(EMA_PREFIX)
        and a.tensors[name].shape == b.tensors[name].shape
    }
    return {name: count for name, count in counts.items() if count}


def _sum(tensors: Mapping[str, Tensor], patches: Sequence[Patch], *, source: object) -> dict[str, Tensor]:
    """Weights with the changes of all patches added up; EMA copies are left as they are.

    An entry that one patch alone changes gets that patch's value, to the bit.
    """
    # A sum of floats depends on the order, so it must not be that of the arguments.
    ordered = sorted(patches, key=lambda patch: sorted((n, t.new) for n, t in patch.tensors.items()))
    applied = [(patch, apply_patch(tensors, patch, source=source)) for patch in ordered]
    result = dict(tensors)
    for name in sorted({name for patch in patches for name in patch.tensors}):
        if name.startswith(EMA_PREFIX):
            continue
        base, value = tensors[name], bits_of(tensors[name])
        total, times = base.double(), torch.zeros(base.shape, dtype=torch.int32)
        for patch, after in applied:
            if name in patch.tensors:
                changed = patch.tensors[name].changed().view(base.shape)
                value = torch.where(changed, bits_of(after[name]), value)
                total = total + (after[name].double() - base.double())
                times = times + changed.int()
        summed = total.to(base.dtype)
        several = times > 1
        if not bool(summed[several].double().isfinite().all()):
            raise PatchError(f"the changes of the patches to {name} add up to NaN or Inf")
        result[name] = torch.where(several, bits_of(summed), value).view(base.dtype)
    return result


# ---- whole checkpoints


def patch_checkpoint(
    source: str | Path,
    target: str | Path,
    patch_paths: Sequence[str | Path],
    *,
    remove: bool = False,
    overlap: str = "refuse",
    use_ema: bool = False,
    model_config_path: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, object]:
    """Apply patches to a checkpoint, or remove them, and write the result; nothing is written when one does not fit.

    A CompVis file keeps its metadata and all tensors that no patch changes; of a pickle, what is neither a tensor nor
    a plain value is lost. A diffusers folder gives a diffusers folder.

    Args:
        source: a CompVis checkpoint, or a diffusers folder.
        target: of the same form: `.safetensors`, `.ckpt`, `.pth` or `.pt`, or a folder. May be `source`.
        patch_paths: files of `save_patch`.
        overlap: see `apply_patches`; removing never needs it.
        use_ema: put the EMA copy of the UNet in the place of its raw weights first.
        model_config_path: the model's CompVis YAML, for a diffusers folder.
        overwrite: replace a target that is there already.

    Returns:
        `wrote`; `entries`, how many entries of weights were changed; and `combined_patch` where the result can be
        taken back only by a new patch, which is written beside the target: its path.

    Raises:
        PatchError: see `apply_patches` and `remove_patch`.
        CheckpointError: the checkpoint or a patch cannot be read, or the target cannot be written or is there already.
    """
    # 1. Read the patches and the checkpoint.
    source, target = Path(source), Path(target)
    if target.exists() and not overwrite:
        raise PatchError(f"{target} is there already; give another name, or set overwrite")
    folder = is_diffusers_folder(source)
    if folder == (target.suffix in (".safetensors", *PICKLE_SUFFIXES)):
        wanted = "a diffusers folder" if folder else "a file (.safetensors, .ckpt, .pth or .pt)"
        raise PatchError(f"{source} gives {wanted}, not {target}; convert makes one form from the other")
    patches = [load_patch(path) for path in patch_paths]
    metadata: dict[str, str] = {}
    if folder:
        if model_config_path is None:
            raise PatchError(f"{source} is a diffusers folder: give its model YAML (model_config_path)")
        params = load_model_config(model_config_path)
        tensors = dict(read_checkpoint(source, params).tensors)
    else:
        tensors, metadata = read_state_dict(source)
        refuse_other_kinds(tensors, metadata, source=source)
        if (kind := kind_of(tensors)) != COMPVIS:
            advice = {
                UNKNOWN: "give the checkpoint that the patches were made from",
                FILE: "convert makes one from it",
            }.get(kind, "convert with --base_ckpt_path makes one from it")
            raise PatchError(
                f"{source} is a {kind}: a patch is applied to a CompVis checkpoint or a diffusers folder; {advice}"
            )
    if use_ema:
        tensors = with_ema_weights(tensors, source=source)

    # 2. Apply or remove them.
    after, combined = dict(tensors), None
    if remove:
        for patch in patches:
            after = remove_patch(after, patch, source=source)
    else:
        after, combined = apply_patches(tensors, patches, overlap=overlap, source=source)

    # 3. Write: a new patch before the checkpoint, which must never be there without it.
    entries = combined.weights_changed if combined else sum(patch.weights_changed for patch in patches)
    result: dict[str, object] = {"wrote": target, "entries": entries}
    if combined is not None:
        result["combined_patch"] = target.with_name(target.stem + SUFFIX)
        save_patch(combined, target.with_name(target.stem + SUFFIX))
    if folder:
        write_diffusers_folder(after, target, params, overwrite=overwrite)
    else:
        kept = {key: text for key, text in metadata.items() if key not in ("format", FINGERPRINT_KEY)}
        write_state_dict(after, target, kept)
    return result


# ---- the file


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
    stored: dict[str, Tensor] = {}
    for name, part in patch.tensors.items():
        for kind, tensor in (("xor", part.values), ("bits", part.bits), ("index", part.index)):
            if tensor is not None:
                stored[f"{kind}/{name}"] = tensor
    own: dict[str, Any] = {
        "patch_format": PATCH_FORMAT,
        "base_fingerprint": patch.base_fingerprint,
        "has_ema": patch.has_ema,
        "weights_changed": patch.weights_changed,
        "tensors": {
            name: {"shape": [*part.shape], "dtype": _name_of(part.dtype), "old": part.old, "new": part.new}
            for name, part in patch.tensors.items()
        },
    }
    if patch.cast:
        own["cast"] = {name: [*map(_name_of, dtypes)] for name, dtypes in patch.cast.items()}
    try:
        described = {
            key: json.dumps(value, allow_nan=False) for key, value in {**patch.metadata, **own}.items()
        }
    except (TypeError, ValueError) as error:
        raise PatchError(f"{path}: the metadata cannot be written as JSON: {error}") from error
    write_state_dict(stored, path, described)


def load_patch(path: str | Path) -> Patch:
    """Read a patch; what it says of itself must agree.

    Raises:
        PatchError: the file is missing, truncated, damaged, or not a patch.
    """
    # 1. Read the file.
    path = Path(path)
    try:
        stored, metadata = read_state_dict(path)
    except CheckpointError as error:
        raise PatchError(f"no patch could be read: {error}") from error
    if "patch_format" not in metadata:
        raise PatchError(
            f"{path} is no patch: its metadata has no patch_format (is it a checkpoint, or a mask?)"
        )

    # 2. Check what it tells of itself.
    try:
        told = {k: json.loads(text) for k, text in metadata.items() if k not in ("format", FINGERPRINT_KEY)}
    except (ValueError, RecursionError) as error:
        raise PatchError(f"{path} is damaged: its metadata is no JSON: {error}; {_AGAIN}") from error
    if told["patch_format"] != PATCH_FORMAT:
        raise PatchError(f"{path} has patch format {told['patch_format']}; this version reads {PATCH_FORMAT}")
    if not _describes_a_patch(told):
        raise PatchError(f"{path} is damaged: its metadata does not describe a patch; {_AGAIN}")

    # 3. Check the values of each tensor.
    parts: dict[str, TensorPatch] = {}
    for name, one in told["tensors"].items():
        values, bits, index = (stored.pop(f"{kind}/{name}", None) for kind in ("xor", "bits", "index"))
        if values is None:
            raise PatchError(f"{path} is damaged: it lacks the values of {name}; {_AGAIN}")
        parts[name] = TensorPatch(
            shape=tuple(one["shape"]),
            dtype=_DTYPES[one["dtype"]],
            values=values,
            bits=bits,
            index=index,
            old=one["old"],
            new=one["new"],
        )
        if (fault := _fault(parts[name])) is not None:
            raise PatchError(f"{path} is damaged: {name} {fault}; {_AGAIN}")
    if stored:
        raise PatchError(f"{path} is damaged: nothing is told of {', '.join(sorted(stored)[:5])}; {_AGAIN}")
    patch = Patch(
        tensors=parts,
        base_fingerprint=told["base_fingerprint"],
        has_ema=told["has_ema"],
        cast={name: (_DTYPES[old], _DTYPES[new]) for name, (old, new) in told.get("cast", {}).items()},
        metadata={key: value for key, value in told.items() if key not in _OWN_KEYS},
        source=str(path),
    )
    if patch.weights_changed != told["weights_changed"]:
        raise PatchError(
            f"{path} is damaged: it changes {patch.weights_changed} weights, its metadata says "
            f"{told['weights_changed']}; {_AGAIN}"
        )
    return patch


def _describes_a_patch(told: Mapping[str, Any]) -> bool:
    """Whether metadata has the keys of a patch, with values of their kind."""
    tensors, cast = told.get("tensors"), told.get("cast", {})
    if not isinstance(tensors, dict) or not isinstance(cast, dict):
        return False
    if not all(name.startswith(_CHANGED_PARTS) for name in (*tensors, *cast)):
        return False
    for one in tensors.values():
        if not isinstance(one, dict) or one.keys() != {"shape", "dtype", "old", "new"}:
            return False
        if not (is_shape(one["shape"]) and _dtype_of(one["dtype"])):
            return False
        if not all(
            isinstance(one[key], str) and re.fullmatch("[0-9a-f]{64}", one[key]) for key in ("old", "new")
        ):
            return False
    for name, dtypes in cast.items():
        if not isinstance(dtypes, list) or len(dtypes) != 2 or dtypes[0] == dtypes[1]:
            return False
        if not all((dtype := _dtype_of(n)) and dtype.is_floating_point for n in dtypes):
            return False
        if name in tensors and tensors[name]["dtype"] != dtypes[1]:
            return False
    base = told.get("base_fingerprint")
    return (
        isinstance(base, str)
        and re.fullmatch("sha256:[0-9a-f]{64}", base) is not None
        and isinstance(told.get("has_ema"), bool)
        and isinstance(told.get("weights_changed"), int)
    )


def _fault(part: TensorPatch) -> str | None:
    """What is wrong with the values and marks of a tensor; None where they agree."""
    size, count, wanted = part.size, part.values.numel(), _INTEGERS[part.dtype.itemsize]
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
    return f"marks {marked} entries and has values for {count}" if marked != count else None


def _dtype_of(name: object) -> torch.dtype | None:
    return _DTYPES.get(name) if isinstance(name, str) else None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
