"""Patches applied to a checkpoint and removed from it: one or several, on tensors and on files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mu.ldm.diffusers_folder import is_diffusers_folder, write_diffusers_folder
from mu.ldm.ema import EMA_PREFIX, has_ema, updated_ema, with_ema_weights
from mu.ldm.formats import COMPVIS, kind_of, read_checkpoint
from mu.ldm.model_config import load_model_config
from mu.ldm.patch import (
    Patch,
    PatchError,
    apply_patch,
    bits_of,
    cast_for,
    listed,
    make_patch,
    remove_patch,
)
from mu.ldm.patch_file import SUFFIX, load_patch, save_patch
from mu.ldm.tensor_file import FINGERPRINT_KEY, PICKLE_SUFFIXES, read_state_dict, write_state_dict

OVERLAPS = ("refuse", "add")


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
        if (kind := kind_of(tensors)) != COMPVIS:
            raise PatchError(
                f"{source} is a {kind}: a patch is applied to a CompVis checkpoint or a diffusers folder; convert "
                "makes one from it"
            )
    if use_ema:
        tensors = with_ema_weights(tensors, source=source)
    after, combined = dict(tensors), None
    if remove:
        for patch in patches:
            after = remove_patch(after, patch, source=source)
    else:
        after, combined = apply_patches(tensors, patches, overlap=overlap, source=source)
    result: dict[str, object] = {
        "wrote": target,
        "entries": (
            combined.weights_changed if combined else sum(patch.weights_changed for patch in patches)
        ),
    }
    if combined is not None:
        # Before the checkpoint, which must never be there without it.
        result["combined_patch"] = target.with_name(target.stem + SUFFIX)
        save_patch(combined, target.with_name(target.stem + SUFFIX))
    if folder:
        write_diffusers_folder(after, target, params, overwrite=overwrite)
    else:
        kept = {key: text for key, text in metadata.items() if key not in ("format", FINGERPRINT_KEY)}
        write_state_dict(after, target, kept)
    return result


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
    bases = {patch.base_fingerprint for patch in patches}
    if len(bases) > 1:
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
            f"{a.source} and {b.source} both change {sum(counts.values()):,} entries of {listed(counts)}{more}; "
            "what is to become of them is not defined. Apply one of them; or add up their changes (overlap add)"
        )
    base = dict(tensors)
    for patch in patches:
        base = cast_for(base, patch, source=source)
    if overlapping:
        after = _sum(base, patches, source=source)
    else:
        after = base
        for patch in patches:
            after = apply_patch(after, patch, source=source)
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
