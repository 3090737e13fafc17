"""The steps of a run that changes a model, the same for every method and in this order.

with open_run(config) as folder:
    loaded = load(config)
    pictures = Pictures(config, loaded.ldm, rows)
    ...                                             # the method moves weights of loaded.ldm
    counts, written = write_proved(...)             # from here on, what was trained is on disk
    result = decorate(...)                          # patch, pictures, metrics.json: a failure is a warning
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mu import ranks
from mu.devices import peak_memory_bytes
from mu.errors import MuError
from mu.ldm import LatentDiffusion
from mu.ldm.unet_dtype import SAVE_DTYPES, WithUNetDtype
from mu.run_folder import RESULT, RunFolder, shared_folder
from mu.unlearning.checkpoints import run_of
from mu.unlearning.decorating import decorating
from mu.unlearning.find_checkpoint import PATCH_NAME
from mu.unlearning.moving import MovingModel
from mu.unlearning.output import (
    check_save_dtype,
    count_moved,
    load_written_,
    model_of,
    original_of,
    remove_checkpoint,
    rounding_warning,
    run_name,
    verify_tensors,
    verify_trained,
    write_patch,
    write_unlearned,
)
from mu.unlearning.progress import ProgressPictures
from mu.unlearning.run_state import RunState
from mu.unlearning.training_config import ComputeKeys, TrainingKeys, UnlearnKeys

Result = dict[str, Any]


def open_run(config: ComputeKeys, resumed: RunState | None = None) -> RunFolder:
    """A new folder with its config.yaml; or that of the run which is resumed, where it lies in `output_dir`."""

    def open_it() -> RunFolder:
        if isinstance(config, TrainingKeys) and resumed is not None and (run := run_of(resumed, config)):
            return RunFolder.go_on(run.parent, run.name)
        folder = RunFolder.create(config.output_dir, run_name(config))
        folder.save_config(config)
        return folder

    return shared_folder(open_it)


@dataclass(frozen=True)
class Loaded:
    """A model, and the file that it was loaded from."""

    ldm: LatentDiffusion
    source: Path
    original: Mapping[str, Tensor]
    """The tensors of that file as they are there, mapped; in the main process alone."""


def load(config: UnlearnKeys) -> Loaded:
    """The model of a config.

    Raises:
        CheckpointError: it cannot be loaded, or its UNet cannot be written in the dtype that `save_dtype` names.
    """
    source = ranks.on_main(config.checkpoint)
    ldm = model_of(config)
    original = original_of(source, ldm.params, use_ema=config.use_ema) if ranks.is_main() else {}
    ranks.on_main(lambda: check_save_dtype(original, config.save_dtype))
    return Loaded(ldm, source, original)


def write_proved(
    config: UnlearnKeys, folder: RunFolder, model: MovingModel, loaded: Loaded, *, lr: float | None = None
) -> tuple[Result, Mapping[str, Tensor]]:
    """Write the checkpoint, and compare it with the original and with what was trained; one that fails is removed.

    Args:
        lr: what the weights were moved with, for the warning that most of it was rounded away; None: not by steps.

    Returns:
        `checkpoint` and the counts of weights; and the tensors of the file, in its own dtypes.

    Raises:
        TrainingError: a weight outside the selected ones changed, or the file reads back otherwise.
        CheckpointError: it could not be written.
    """
    source, original = loaded.source, loaded.original
    checkpoint = write_unlearned(loaded.ldm, config, folder.path, source=source)
    try:
        new = original_of(checkpoint, loaded.ldm.params)  # not its SHA-256: what follows sees every bit
        cast = WithUNetDtype(original, SAVE_DTYPES[config.save_dtype])
        changed = verify_tensors(cast, new, model.selected, before=source, after=checkpoint)
        verify_trained(loaded.ldm, new, model.selected, after=checkpoint)
    except MuError:
        remove_checkpoint(checkpoint)
        raise
    moved = count_moved(loaded.ldm, original, model.selected)
    folder.logger.info("%d weights changed, all of them among those that may: %s", changed, checkpoint)
    if lr is not None and (warning := rounding_warning(moved=moved, changed=changed, lr=lr)):
        folder.logger.warning("%s", warning)
    written = {
        "checkpoint": checkpoint,
        "weights_selected": model.counts["selected"],
        "weights_changed": changed,
        "weights_moved": moved,
        "weights_rounded_back": moved - changed,
        "weights_total": model.counts["total"],
    }
    return written, new


def decorate(
    config: UnlearnKeys,
    folder: RunFolder,
    loaded: Loaded,
    new: Mapping[str, Tensor],
    pictures: ProgressPictures,
    result: Result,
    *,
    started: float,
    unet_fingerprint: str | None = None,
) -> Result:
    """Patch, pictures after, and last metrics.json, which says that the run is done: a failure is a warning.

    Args:
        new: the tensors of the written file; the pictures are drawn from them.
        result: what the run has found out so far; returned with `run`, `patch`, `pictures`, `seconds` and
            `peak_memory_bytes`.
        started: by `time.monotonic`.
        unet_fingerprint: of the original, where it is known.
    """
    patch = table = None
    if config.patch:
        with decorating(PATCH_NAME):
            source = loaded.source
            patch = write_patch(
                loaded.original, new, config, folder.path, source=source, base=unet_fingerprint
            )
    load_written_(loaded.ldm, new)
    draw(pictures, "after")
    path = folder.path / "pictures" / "before_after.png"
    with decorating(path.name):
        table = pictures.save(path)
    result = {
        "run": folder.path,
        **result,
        "patch": patch,
        "pictures": table,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    with decorating(RESULT):
        save_result(folder, result)
    return result


def draw(pictures: ProgressPictures, moment: str) -> None:
    """Sample the pictures of a moment, such as "before"."""
    with decorating(f"pictures {moment}"):
        pictures.take(moment)


def save_result(folder: RunFolder, result: Result) -> None:
    """Write the environment; and last, because it says that the run is done, a result as metrics.json."""
    folder.save_environment()
    folder.save_json(RESULT, _plain(result))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
