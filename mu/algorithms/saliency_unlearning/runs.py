"""What both runs do alike: their folder, its last files, and in how many parts a process keeps things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mu import ranks
from mu.algorithms.saliency_unlearning.checkpoints import run_of
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.run_state import Head
from mu.algorithms.saliency_unlearning.utils import run_name
from mu.run_folder import RESULT, RunFolder, shared_folder

Result = dict[str, Any]


def open_run(config: MaskConfig | TrainConfig, resumed: Head | None = None) -> RunFolder:
    """A new folder with its config.yaml; or that of the run which is resumed, where it lies in `output_dir`."""

    def open_it() -> RunFolder:
        if isinstance(config, TrainConfig) and resumed is not None and (run := run_of(resumed, config)):
            return RunFolder.go_on(run.parent, run.name)
        folder = RunFolder.create(config.output_dir, run_name(config))
        folder.save_config(config)
        return folder

    return shared_folder(open_it)


def save_result(folder: RunFolder, result: Result) -> None:
    """Write the environment; and last, because it says that the run is done, a result as metrics.json."""
    folder.save_environment()
    folder.save_json(RESULT, _plain(result))


def parts_of(config: MaskConfig | TrainConfig) -> int:
    """Into how many parts weights, gradients and the optimizer's state are cut."""
    return ranks.world_size() if config.sharding == "full" else 1


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
