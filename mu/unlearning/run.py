"""The steps of a run that changes a model, the same for every method and in this order.

with open_run(config) as folder:
    loaded = load(config)
    pictures = ProgressPictures(config, loaded.ldm, forget_prompts, retain_prompts)
    draw(pictures, "before")
    ...                                         # the method moves weights of loaded.ldm
    written = write_and_prove(...)              # from here on, what was unlearned is on disk
    return decorate(folder, pictures, written)  # pictures after, metrics.json: a failure is a warning
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mu import ranks
from mu.devices import peak_memory_bytes
from mu.ldm import LatentDiffusion
from mu.run_folder import RESULT, RunFolder
from mu.unlearning.config import OutputKeys
from mu.unlearning.output import check_save_dtype, model_of, original_of
from mu.unlearning.progress_pictures import ProgressPictures
from mu.unlearning.runs import Result, decorating, save_result


@dataclass(frozen=True)
class Loaded:
    """A model, and the file that it was loaded from."""

    ldm: LatentDiffusion
    source: Path
    original: Mapping[str, Tensor]
    """The tensors of that file as they are there, mapped; empty but in the main process."""


def load(config: OutputKeys) -> Loaded:
    """The model of a config.

    Raises:
        CheckpointError: it cannot be loaded, or its UNet cannot be written in the dtype that `save_dtype` names.
    """
    source = ranks.on_main(config.checkpoint)
    ldm = model_of(config)
    original = original_of(source, ldm.params, use_ema=config.use_ema) if ranks.is_main() else {}
    ranks.on_main(lambda: check_save_dtype(original, config.save_dtype))
    return Loaded(ldm, source, original)


def draw(pictures: ProgressPictures, moment: str) -> None:
    """Sample the pictures of a moment, such as "before"."""
    with decorating(f"pictures {moment}"):
        pictures.take(moment)


def decorate(folder: RunFolder, pictures: ProgressPictures, result: Result, *, started: float) -> Result:
    """Pictures after; and last metrics.json, which says that the run is done. A failure is a warning.

    Args:
        result: what the run has found out so far.
        started: by `time.monotonic`.

    Returns:
        `result` with `run`, `pictures`, `seconds` and `peak_memory_bytes`.
    """
    draw(pictures, "after")
    path, table = folder.path / "pictures" / "before_after.png", None
    with decorating(path.name):
        table = pictures.save(path)
    result = {
        "run": folder.path,
        **result,
        "pictures": table,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    with decorating(RESULT):
        save_result(folder, result)
    return result
