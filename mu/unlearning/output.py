"""The unlearned checkpoint: written, proved to differ nowhere else than it may, and its patch."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mu.bars import counted, waiting
from mu.datasets.index import concept_label
from mu.errors import MuError
from mu.ldm import CheckpointError, LatentDiffusion, LatentDiffusionParams
from mu.ldm.checkpoint import read_checkpoint, tensors_of
from mu.ldm.convert import model_spec
from mu.ldm.diffusers_folder import write_diffusers_folder
from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import EMA_PREFIX, ema_name, has_ema, updated_ema, with_ema_weights
from mu.ldm.patch import bits_of, make_patch, save_patch
from mu.ldm.schedule import SCHEDULE_KEYS
from mu.ldm.tensor_file import open_state_dict, write_state_dict
from mu.ldm.unet_dtype import SAVE_DTYPES, WithUNetDtype, is_of_unet, largest_lost
from mu.run_folder import RunFolder
from mu.unlearning.config import OutputKeys
from mu.unlearning.find_checkpoint import DIFFUSERS_NAME, PATCH_NAME
from mu.unlearning.moving import TrainingError
from mu.unlearning.runs import Result, decorating

_log = logging.getLogger(__name__)


def original_of(
    source: Path, params: LatentDiffusionParams, *, use_ema: bool = False
) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint in its own dtypes, mapped: a value is read from the disk when it is used.

    They stay those of the file that was opened, should another one be put in its place.

    Args:
        use_ema: with the EMA copy of the UNet in the place of its raw weights, and beside them.
    """
    tensors = read_checkpoint(source, params, read=open_state_dict).tensors
    return with_ema_weights(tensors, source=source) if use_ema else tensors


def write_and_prove(
    ldm: LatentDiffusion,
    config: OutputKeys,
    folder: RunFolder,
    *,
    source: Path,
    original: Mapping[str, Tensor],
    selected: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    base: str | None = None,
    lr: float | None = None,
) -> Result:
    """What every method does once its weights have moved: write the checkpoint, prove it, and write its patch.

    Afterwards the UNet in memory has the values of the file, which its dtype may have rounded: what is drawn from it is
    what anybody gets who loads the file. A checkpoint that fails its proof is removed.

    Args:
        ldm: the unlearned model.
        source: the checkpoint that the run started from.
        original: its tensors, see `original_of`.
        selected: UNet-relative name -> bool tensor of the entries that were allowed to move.
        metadata: what the patch says of the method, beside concept and `use_ema`.
        base: the fingerprint of the source's UNet, where it is known.
        lr: the learning rate of a training, for the warning of `rounding_warning`.

    Returns:
        `checkpoint`, its path; `weights_changed`, that differ from the original in the file; `weights_moved`, that do
        so in memory, and `weights_rounded_back`, the others of them; `patch`, its path, None without.

    Raises:
        CheckpointError: the checkpoint cannot be written.
        TrainingError: it differs from the source elsewhere, or from what is in memory.
    """
    # 1. Write.
    with waiting("writing the unlearned model"):
        checkpoint = write_unlearned(ldm, config, folder.path, source=source)

    # 2. Prove: nothing else differs from the source, and what moved is in the file. Every bit of it is compared, so its
    # SHA-256 is not taken again.
    try:
        written = original_of(checkpoint, ldm.params)
        before = WithUNetDtype(original, SAVE_DTYPES[config.save_dtype])
        changed = verify_tensors(before, written, selected, before=source, after=checkpoint)
        verify_trained(ldm, written, selected, after=checkpoint)
    except MuError:
        remove_checkpoint(checkpoint)
        raise

    # 3. Count what the file's dtype has rounded back.
    moved = count_moved(ldm, original, selected)
    folder.logger.info("%d weights changed, all of them among those that may: %s", changed, checkpoint)
    if warning := rounding_warning(moved=moved, changed=changed, lr=lr):
        folder.logger.warning("%s", warning)

    # 4. What was unlearned is on disk: a patch that cannot be written loses nothing.
    patch = None
    if config.patch:
        with decorating(PATCH_NAME), waiting("writing the patch"):
            patch = write_patch(
                original, written, config, folder.path, source=source, metadata=metadata, base=base
            )
    load_written_(ldm, written)
    return {
        "checkpoint": checkpoint,
        "weights_changed": changed,
        "weights_moved": moved,
        "weights_rounded_back": moved - changed,
        "patch": patch,
    }


def write_unlearned(ldm: LatentDiffusion, config: OutputKeys, folder: Path, *, source: Path) -> Path:
    """Write the unlearned model into a run's folder, in the form that `output_format` names; returns its path.

    Where the checkpoint that training started from has an EMA copy of the UNet, so has a CompVis checkpoint written
    here, updated: nobody gets the forgotten concept back by taking it. A diffusers folder has none. The UNet and its
    EMA copy are written in the dtype that `save_dtype` names, all else as in that checkpoint.

    Args:
        source: the checkpoint that the run started from.

    Raises:
        CheckpointError: see `mu.ldm.save_checkpoint` and `mu.ldm.diffusers_folder.write_diffusers_folder`.
    """
    dtype = SAVE_DTYPES[config.save_dtype]
    if config.output_format == "diffusers":
        path = folder / DIFFUSERS_NAME
        write_diffusers_folder(tensors_of(ldm, path, unet_dtype=dtype), path, ldm.params)
        return path
    path = folder / f"model.{config.output_format}"
    tensors = tensors_of(ldm, path, unet_dtype=dtype)
    if ldm.file_has_ema:
        before = WithUNetDtype(original_of(source, ldm.params), dtype)
        tensors |= updated_ema(tensors, before, use_ema=config.use_ema, source=source)
    spec = model_spec(ldm.params, title=f"{concept_label(config.concepts)} unlearned")
    write_state_dict(tensors, path, spec if path.suffix == ".safetensors" else None)
    return path


def check_save_dtype(original: Mapping[str, Tensor], save_dtype: str) -> None:
    """Check, before anything is trained, that the UNet can be written in the dtype that `save_dtype` names.

    Args:
        original: see `original_of`.

    Raises:
        CheckpointError: it, or its EMA copy, has weights that are too large for it; names one.
    """
    dtype = SAVE_DTYPES[save_dtype]
    if dtype is None or dtype == torch.float32:
        return
    for name, tensor in original.items():
        if is_of_unet(name) and (largest := largest_lost(tensor, dtype)) is not None:
            raise CheckpointError(
                f"save_dtype is {save_dtype}, which ends at {torch.finfo(dtype).max:g}: {name} has {largest:g}; take "
                "bf16 or fp32"
            )


def verify_tensors(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    selected: Mapping[str, Tensor],
    *,
    before: Path,
    after: Path,
) -> int:
    """Compare the tensors of two checkpoints, bit by bit, outside the entries that were allowed to move.

    Args:
        old: of the checkpoint that training started from (`original_of`), in the dtypes in which it was written again
            (`WithUNetDtype`).
        new: of the unlearned one, as it lies on disk.
        selected: UNet-relative name -> bool tensor of the entries that may differ.
        before, after: their paths, for errors.

    Returns:
        The number of weights that do differ; their EMA copies are not counted.

    Raises:
        TrainingError: another entry differs, a tensor changed its dtype, a weight of the UNet is missing, there is one
            that was not there before, or an EMA copy still has the old value of a weight that changed.
    """
    lost = [name for name in old if name.startswith(UNET_PREFIX) and name not in new]
    if lost:
        raise TrainingError(f"{after}: {len(lost)} tensors of {before} are missing: {', '.join(lost[:5])}")
    allowed_in = {UNET_PREFIX + name: marked.cpu() for name, marked in selected.items()}
    allowed_in |= {ema_name(name): marked for name, marked in allowed_in.items()}
    changed = 0
    for name, tensor in counted(list(new.items()), f"comparing {after.name} with its source", unit="tensors"):
        # Newer releases of transformers name the text encoder's weights without `text_model.`.
        original = old.get(name, old.get(name.replace(".transformer.text_model.", ".transformer.")))
        if name in SCHEDULE_KEYS and (original is None or original.dtype.itemsize < 4):
            continue  # the model's own, exact one, which loading has compared
        if original is None:
            if name.endswith(".position_ids"):  # 0, 1, 2, ...; not in every file
                continue
            raise TrainingError(f"{after}: {name} was not in {before}")
        if original.dtype != tensor.dtype or original.shape != tensor.shape:
            raise TrainingError(f"{after}: {name} is {tensor.dtype}, in {before} it is {original.dtype}")
        same = bits_of(original) == bits_of(tensor)  # of the tensor's shape
        if bool(same.all()):
            continue
        allowed = allowed_in.get(name)
        if allowed is None or not bool((same | allowed).all()):
            raise TrainingError(f"{after}: {name} differs from {before} outside what may move")
        if name.startswith(EMA_PREFIX):
            continue
        changed += int((~same).count_nonzero())
        copy = new.get(ema_name(name))
        if copy is not None and not torch.equal(copy[~same], tensor[~same].to(copy.dtype)):
            raise TrainingError(f"{after}: {ema_name(name)} still has old values of weights that changed")
    return changed


def verify_trained(
    ldm: LatentDiffusion, new: Mapping[str, Tensor], selected: Mapping[str, Tensor], *, after: Path
) -> None:
    """Check that a written checkpoint holds, in its own dtype, what was trained.

    Args:
        new: its tensors, under CompVis' names.
        after: its path, for errors.

    Raises:
        TrainingError: a tensor of which something may have moved is another on disk than in memory.
    """
    for name, parameter in ldm.unet.named_parameters():
        if name not in selected:
            continue
        tensor = new[UNET_PREFIX + name]
        if not torch.equal(bits_of(parameter.to(tensor.dtype)), bits_of(tensor)):
            raise TrainingError(
                f"{after}: {name} reads back otherwise than it was written; the disk may be failing"
            )


def remove_checkpoint(path: Path) -> None:
    """Remove an unlearned checkpoint, a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def count_moved(ldm: LatentDiffusion, old: Mapping[str, Tensor], selected: Mapping[str, Tensor]) -> int:
    """How many of the selected weights training has moved, as they are in memory: before the file's dtype rounds them.

    Args:
        ldm: the trained model, before `load_written_`.
        old: the tensors of the checkpoint that training started from, under CompVis' names.
        selected: UNet-relative name -> bool tensor of the entries that may have moved.
    """
    moved = 0
    for name, parameter in ldm.unet.named_parameters():
        if name in selected:
            original = old[UNET_PREFIX + name].to(parameter.dtype)
            moved += int((bits_of(parameter) != bits_of(original)).count_nonzero())
    return moved


@torch.no_grad()
def load_written_(ldm: LatentDiffusion, new: Mapping[str, Tensor]) -> None:
    """Give the UNet in memory the values of a written checkpoint, which its dtype may have rounded.

    What is drawn afterwards is what anybody gets who loads the file.
    """
    for name, parameter in ldm.unet.named_parameters():
        parameter.copy_(new[UNET_PREFIX + name])


def rounding_warning(*, moved: int, changed: int, lr: float | None = None) -> str | None:
    """What to say when rounding to the file's dtype has undone more than half of a run; else None.

    Args:
        moved: weights that differ from the original in memory.
        changed: those that do so in the file.
        lr: the learning rate that moved them, if one did.
    """
    lost = moved - changed
    if 2 * lost <= moved:
        return None
    return (
        f"most of the training is not in the file: {lost:,} of {moved:,} weights that moved were rounded back to the "
        "original's values, because the file's dtype is too coarse"
        + (
            f" for lr {lr:g}. Set save_dtype fp32, or a higher lr"
            if lr is not None
            else ". Set save_dtype fp32"
        )
    )


def write_patch(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    config: OutputKeys,
    folder: Path,
    *,
    source: Path,
    metadata: Mapping[str, Any],
    base: str | None = None,
) -> Path:
    """Write what turns the checkpoint that the run started from into the unlearned one, and back; returns its path.

    EMA copies in the original are in the patch, also where the unlearned checkpoint, a diffusers folder, has none.
    With `use_ema`, what is patched is the original with its EMA weights in the place of the raw ones.

    With another `save_dtype` than the original's, the patch notes both dtypes.

    Args:
        old, new: the tensors of both, see `verify_tensors`; the old ones in the dtypes of their file.
        folder: of the run.
        source: the checkpoint that the run started from, for errors.
        metadata: what the patch says of the method, beside concept and `use_ema`.
        base: the fingerprint of its UNet, where it is known.

    Raises:
        PatchError: they are not two states of one UNet.
        CheckpointError: the patch could not be written.
    """
    if has_ema(old) and not has_ema(new):
        cast = WithUNetDtype(old, SAVE_DTYPES[config.save_dtype])
        new = {**new, **updated_ema(new, cast, use_ema=False, source=source)}
    described = {**described_concept(config), **metadata, "use_ema": config.use_ema}
    patch = make_patch(old, new, metadata=described, base=base)
    save_patch(patch, folder / PATCH_NAME)
    return folder / PATCH_NAME


def described_concept(config: OutputKeys) -> dict[str, Any]:
    """What was forgotten, as files note it."""
    return {
        "template": config.template,
        "template_name": config.concepts[0] if len(config.concepts) == 1 else list(config.concepts),
    }
