"""What turns one checkpoint into another and back: which entries of its tensors changed, and old XOR new bits of them.

XOR of the bits undoes itself, so that one patch both applies and removes, exactly, whatever the bits mean: -0.0, NaN
payloads and denormals come back as they were. It is no arithmetic, though: where two patches change the same entry,
one on top of the other gives nonsense. Each patch therefore knows the SHA-256 of the values that it was made from and
of those that it leads to, tensor by tensor, at its entries and nowhere else. So a patch is refused where its entries
hold anything but its base's values, and patches that share no entry may come and go in any order.

A run may write its UNet in another dtype than that of its base (`save_dtype`). Its patch notes both dtypes: the base is
cast first, and cast back when the patch has been removed, where the new dtype holds every number of the old one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mu.errors import MuError
from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import EMA_PREFIX, ema_name, has_ema
from mu.ldm.tensor_file import fingerprint
from mu.ldm.unet_dtype import holds

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a type -> the integers that hold its bits."""
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


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor's entries as integers of the same shape: NaN and -0.0 compare as what they are."""
    return tensor.detach().cpu().contiguous().view(INTEGERS[tensor.dtype.itemsize])


def base_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of a checkpoint's UNet, in the types of the file: what masks call `model_fingerprint`."""
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
    names = [name for name in before if name.startswith((UNET_PREFIX, EMA_PREFIX))]
    others = {name for name in after if name.startswith((UNET_PREFIX, EMA_PREFIX))}
    if differing := sorted(others ^ set(names)):
        raise PatchError(
            f"no patch can be made: only one of both checkpoints has {listed(differing)}; a patch is between "
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
            another shape or type.
    """
    return _toggled(cast_for(tensors, patch, source=source), patch, source=source, removing=False)


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
            f"{patch.source} cannot be removed from {source}: it is of a run that wrote {listed(lost)} in {new}, which "
            f"rounded the base's {old}. Take the checkpoint that the run was begun with"
        )
    if has_ema(tensors) and not patch.has_ema:
        raise PatchError(
            f"{source} has EMA copies of its weights, {patch.source} has not: their old values are not in it. Applying "
            "it wrote a patch beside the output that has them: remove that one"
        )
    removed = _toggled(cast_for(tensors, patch, source=source), patch, source=source, removing=True)
    narrow = {name: removed[name].to(old) for name, (old, _) in patch.cast.items() if name in removed}
    exact = all(
        torch.equal(bits_of(t.to(removed[name].dtype)), bits_of(removed[name])) for name, t in narrow.items()
    )
    return removed | narrow if exact else removed


def cast_for(tensors: Mapping[str, Tensor], patch: Patch, *, source: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the dtypes of what a patch leads to, see `Patch.cast`.

    EMA copies that the patch does not know take the dtype of their weights: a narrower one would keep old values.

    Raises:
        PatchError: a tensor has neither the dtype of the base nor that which the patch leads to.
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


def _tensor_patch(before: Tensor, after: Tensor) -> TensorPatch | None:
    old, new = bits_of(before).reshape(-1), bits_of(after).reshape(-1)  # (n,)
    changed = old != new  # (n,)
    count, size = int(changed.count_nonzero()), changed.numel()
    if not count:
        return None
    old, new = old[changed], new[changed]  # (count,)
    bits = index = None
    kind = places_kind(count, size)
    if kind == "index":
        index = changed.nonzero().view(-1).to(torch.int32)
    elif kind == "bits":
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


def places_kind(count: int, size: int) -> str | None:
    """How the places of changed entries are kept: "index" or "bits", the smaller; None: all have changed."""
    if 4 * count < (size + 7) // 8 and size <= 2**31:
        return "index"
    return "bits" if count < size else None


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).hexdigest()


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
        flat[changed] = found ^ part.values
        if _sha256(flat[changed]) != leads_to:
            raise PatchError(
                f"{patch.source} is damaged: its values do not lead to the SHA-256 that it notes for {name}; "
                "get the file again"
            )
        result[name] = flat.view(part.dtype).view(part.shape)
    if wrong:
        raise PatchError(_misfit(tensors, patch, wrong, len(names), done, source=source, removing=removing))
    return result


def _misfit(
    tensors: Mapping[str, Tensor],
    patch: Patch,
    wrong: list[str],
    total: int,
    done: int,
    *,
    source: object,
    removing: bool,
) -> str:
    if done == total:
        state = "is not applied to" if removing else "is already applied to"
        when = "before" if removing else "after"
        return f"{patch.source} {state} {source}: all of its entries hold the values {when} it"
    if removing:
        return (
            f"{patch.source} cannot be removed from {source}: at its entries, {len(wrong)} of its {total} tensors "
            f"({listed(wrong)}) do not hold the values that it leads to. It was not applied, or something else has "
            "changed them since"
        )
    hint = (
        "Another patch may have changed the same entries: remove that one, or apply both at once to the base"
    )
    if patch.metadata.get("use_ema"):
        hint = "It was made from EMA weights: set use_ema"
    return (
        f"{patch.source} is not a patch of {source}: at its entries, {len(wrong)} of its {total} tensors "
        f"({listed(wrong)}) do not hold the values that it was made from. The UNet that it was made from has "
        f"fingerprint {patch.base_fingerprint}, this one {base_fingerprint(tensors)}. {hint}"
    )


def listed(names: Collection[str]) -> str:
    """`7 tensors: a, b, c, d, e, ...`."""
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{len(names)} tensors: {shown}{', ...' if len(names) > _SHOWN else ''}"
