"""What the runs of all methods do alike: their folder, its name, and its last files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from mu.datasets.index import concept_label
from mu.errors import MuError, first_line
from mu.memory import let_go
from mu.run_folder import RESULT, RunFolder, shared_folder
from mu.unlearning.checkpoints import run_of
from mu.unlearning.compute import is_out_of_memory
from mu.unlearning.config import RunKeys
from mu.unlearning.run_state import RunState
from mu.unlearning.training_config import TrainingKeys

Result = dict[str, Any]
_log = logging.getLogger(__name__)


def run_name(config: RunKeys) -> str:
    """What a run's folder is called, before its date: `style-Noto`, `style-Noto+Blob`."""
    return f"{config.template}-{concept_label(config.concepts)}"


def open_run(config: RunKeys, resumed: RunState | None = None) -> RunFolder:
    """A new folder with its config.yaml; or that of the run which is resumed, where it lies in `output_dir`."""

    def open_it() -> RunFolder:
        if isinstance(config, TrainingKeys) and resumed is not None and (run := run_of(resumed, config)):
            return RunFolder.go_on(run.parent, run.name)
        folder = RunFolder.create(config.output_dir, run_name(config))
        folder.save_config(config)
        return folder

    return shared_folder(open_it)


def save_result(folder: RunFolder, result: Result) -> None:
    """Write the environment; and last, because it says that the run is done, a result as metrics.json."""
    folder.save_environment()
    folder.save_json(RESULT, _plain(result))


@contextmanager
def decorating(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Do what a run only decorates itself with: where it cannot be done, a warning says so, and the run goes on.

    What is caught: an error of this package, of the operating system (a full disk), memory that does not suffice, and a
    picture that is none. Anything else is a defect, and is raised.

    Args:
        what: is made, for the warning.
        errors: more that making it may meet.
    """
    always = (MuError, OSError, MemoryError, Image.DecompressionBombError)
    passed_over: tuple[type[Exception], ...] = (*always, *errors)
    try:
        yield
    except passed_over as error:
        reason = first_line(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = f"out of memory: {first_line(error)}"
    else:
        return
    let_go()  # only here is the error gone, which holds the tensors of what failed
    _log.warning("%s could not be made (%s); the run goes on without", what, reason)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
