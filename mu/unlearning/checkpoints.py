"""The checkpoints of a training run: when they are written, which are kept, and which one a run goes on with."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mu import ranks
from mu.config import ConfigError, as_text, keys_of, override, resolve_path
from mu.ldm.checkpoint import check_layout
from mu.ldm.schedule import SCHEDULE_KEYS
from mu.ldm.tensor_file import CheckpointError, fingerprint
from mu.run_folder import is_finished, is_running
from mu.unlearning.moving import MovingModel
from mu.unlearning.run_state import (
    ResumeError,
    RunState,
    read_head,
    read_run_state,
    verify_run_state,
    write_run_state,
)
from mu.unlearning.training_config import RESUME_NEWEST, TrainingKeys

MAY_DIFFER = frozenset(
    {
        *("devices", "logger", "wandb", "wandb_project"),
        *("resume", "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints"),
        *("output_dir", "processed_dataset_dir", "output_format", "save_dtype", "patch"),
        *("sample_prompts", "sample_seeds"),
        # Looked at beside the training.
        *("sample_every_steps", "validate_every_steps"),
        *("report", "show_unsafe_pictures"),
        # Memory and speed, the result to rounding.
        *("micro_batch_size", "channels_last", "gradient_checkpointing", "compile"),
        # What lies at these paths is compared, not the paths.
        *("ckpt_path", "model_config_path", "mask_path", "raw_dataset_dir", "retain_dataset_dir"),
    }
)
"""Keys that a resumed run may have other values of: they do not change what the run comes to."""

_FOLDER = "checkpoints"
_FILES = "step-*.safetensors"
_NO_KEY = "no key any more"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, `<run>/checkpoints/step-<steps done>.safetensors`.

    As a context manager it ends with the run: a run that is done needs no checkpoints, and they are removed; for one
    that stopped early, the command that goes on with it is logged. Of several processes, the main one does so.

    Args:
        run: the run's folder.
        config: `checkpoint_every_steps`, `checkpoint_every_minutes` and `keep_checkpoints`.
    """

    def __init__(self, run: Path, config: TrainingKeys) -> None:
        self.run = run
        self.config = config
        self.folder = run / _FOLDER
        self._identity: Callable[[], dict[str, str]] = dict
        self._saved_at = time.monotonic()

    @property
    def paths(self) -> list[Path]:
        """The checkpoints that are there, newest first."""
        return sorted(self.folder.glob(_FILES), reverse=True)

    def identify(
        self,
        model: MovingModel,
        data: object,
        original: Mapping[str, Tensor],
        resumed: RunState | None = None,
    ) -> None:
        """Say what the run is of, before its first step; the checkpoint that it goes on with must be of the same.

        The digests are computed here only where there is such a checkpoint, else when the first one is written: a run
        that writes none hashes nothing for it. Of several processes, the main one does so.

        Args:
            data: what tells the images and prompts of a run from those of another, as JSON knows it.
            original: the tensors of the file that the model was loaded from, as they are there.

        Raises:
            ConfigError: it is not; names the keys that lead to something else than they did.
        """
        if not ranks.is_main():
            original = {}
        self._identity = _identity(model, data, original)
        if resumed is not None:
            ranks.on_main(lambda: _check_identity(resumed, self._identity()))

    def is_due(self, step: int) -> bool:
        """Whether the interval says to save after `step` steps."""
        steps, minutes = self.config.checkpoint_every_steps, self.config.checkpoint_every_minutes
        return (steps is not None and step % steps == 0) or (
            minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        )

    def save(self, step: int, tensors: Mapping[str, Tensor], schedule: Mapping[str, Any]) -> Path:
        """Write a checkpoint, read it back, and only then remove those that are too many.

        Args:
            step: steps that are done.
            tensors: see `training_tensors` and `table_tensors`.
            schedule: see `RunState`.

        Raises:
            CheckpointError: it could not be written, or reads back otherwise; the earlier ones are as they were.
        """
        path = self.folder / f"step-{step:08d}.safetensors"
        state = RunState(
            path=path,
            step=step,
            settings=settings_of(self.config),
            identity=self._identity(),
            schedule=dict(schedule),
            tensors=tensors,
        )
        write_run_state(state)
        try:
            verify_run_state(path)
        except CheckpointError:
            path.unlink()
            raise
        for old in [other for other in self.paths if other < path][self.config.keep_checkpoints - 1 :]:
            old.unlink()
        self._saved_at = time.monotonic()
        _log.info("checkpoint after step %d: %s", step, path)
        return path

    def __enter__(self) -> Checkpoints:
        if not ranks.is_main():
            return self
        for cut_off in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            cut_off.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not ranks.is_main():
            return
        if kind is None:
            if self.folder.exists():
                shutil.rmtree(self.folder)
        elif self.paths:
            _log.info("to go on from %s: %s", self.paths[0], resume_command(self.run, self.config.MODULE))


def resume_command(run: Path, module: str) -> str:
    """The command that goes on with a run."""
    words = ["python", "-m", module, "--config_path", str(run / "config.yaml"), "--resume", str(run)]
    return shlex.join(words)


def settings_of(config: TrainingKeys) -> dict[str, Any]:
    """The keys that decide what a run comes to, as JSON has them."""
    wanted = {
        key.name: getattr(config, key.name) for key in keys_of(type(config)) if key.name not in MAY_DIFFER
    }
    settings: dict[str, Any] = json.loads(json.dumps(wanted))
    return settings


def _identity(
    model: MovingModel, data: object, original: Mapping[str, Tensor]
) -> Callable[[], dict[str, str]]:
    """Gives digests of what a config names by path, and what the rounding depends on; computed once, when asked for.

    By then weights may have moved: those of the model are taken from the file, in the dtypes that they had when loaded.
    """
    selected, device = model.selected, model.ldm.device.type
    own = model.ldm.state_dict()
    dtypes = {name: tensor.dtype for name, tensor in own.items()}
    there = check_layout(model.ldm, original, source="ckpt_path") if original else own
    # Not the weights themselves: to hold them would keep the memory that they move away from.
    kept = {name: own[name].cpu() for name in own if name in SCHEDULE_KEYS or name not in there}
    del own, there

    @cache
    def identity() -> dict[str, str]:
        found = check_layout(model.ldm, original, source="ckpt_path") if original else {}
        loaded = {name: kept[name] if name in kept else found[name] for name in dtypes}
        return {
            "ckpt_path": fingerprint(loaded, dtypes=dtypes),
            "model_config_path": _sha256(repr(model.ldm.params)),
            "mask_path": fingerprint(selected),
            "raw_dataset_dir": _sha256(json.dumps(data)),
            "arithmetic": f"torch {torch.__version__} on {device}",
        }

    return identity


def _check_identity(resumed: RunState, identity: Mapping[str, str]) -> None:
    was = resumed.identity
    if was["arithmetic"] != identity["arithmetic"]:
        _log.warning(
            "resume: the run was begun with %s and goes on with %s: its last bits may come out otherwise",
            was["arithmetic"],
            identity["arithmetic"],
        )
    what = {
        "ckpt_path": "the model is not the one that the run was begun with",
        "model_config_path": "the model's structure is not that which the run was begun with",
        "mask_path": "the weights that may move are not those of the run: it was begun with another mask",
        "raw_dataset_dir": "the images and prompts are not those of the run",
    }
    faults = [f"{key}: {message}" for key, message in what.items() if was[key] != identity[key]]
    if faults:
        raise ConfigError([f"{fault} ({resumed.path})" for fault in faults])


def find_run_state(config: TrainingKeys) -> RunState:
    """The checkpoint that `resume` leads to, checked; damaged ones before it are named in the log.

    Raises:
        ResumeError: there is none.
        ConfigError: it is of a run with other settings; names the keys.
    """
    assert config.resume is not None
    settings = settings_of(config)
    refused: ConfigError | None = None
    damaged: list[str] = []
    for path in _candidates(config):
        try:
            faults = _differences(read_head(path), settings, type(config))
            if not faults:
                state = read_run_state(path)
                _log.info("resume: going on after step %d, from %s", state.step, path)
                return state
        except CheckpointError as error:
            _log.warning("resume: passed over: %s", error)
            damaged.append(str(path))
        else:
            refused = refused or ConfigError(faults)
            if config.resume != RESUME_NEWEST:
                raise refused
    if refused is not None:
        raise refused
    place = f"below {config.output_dir}" if config.resume == RESUME_NEWEST else f"at {config.resume}"
    raise ResumeError(
        f"resume: there is no {'whole ' if damaged else ''}checkpoint of an unfinished run {place}"
        f"{'; damaged: ' + ', '.join(damaged) if damaged else ''}. Without --resume the run begins anew"
    )


def steps_done(config: TrainingKeys) -> int:
    """After how many steps the newest unfinished run with these settings in `output_dir` goes on; 0: there is none.

    Of its checkpoints only the heads are read.
    """
    config = override(config, resume=RESUME_NEWEST)
    settings = settings_of(config)
    for path in _candidates(config):
        try:
            head = read_head(path)
        except CheckpointError:  # the run itself passes it over, and says so
            continue
        if not _differences(head, settings, type(config)):
            return head.step
    return 0


def resumed_state(config: TrainingKeys) -> RunState:
    """As `find_run_state`; all processes of a run take the checkpoint that the main one finds."""
    found: list[RunState] = []

    def find() -> Path:
        found.append(find_run_state(config))
        return found[0].path

    path = ranks.on_main(find)
    return found[0] if found else read_run_state(path)


def run_of(state: RunState, config: TrainingKeys) -> Path | None:
    """The run folder that a resumed run goes on in; None: a new one, as the old is not in `output_dir`."""
    run = state.path.absolute().parent.parent
    inside = state.path.parent.name == _FOLDER and run.parent.resolve() == Path(config.output_dir).resolve()
    return Path(config.output_dir) / run.name if inside else None


def run_checkpoint_bytes(config: TrainingKeys) -> int:
    """What lies in the folder of checkpoints that a resumed run goes on in, cut-off ones too; 0 for one that is new.

    Raises:
        ResumeError: `resume` leads to nothing, or to a finished run.
    """
    if config.resume is None or not (found := _candidates(config)):
        return 0
    folder = found[0].parent.resolve()
    if Path(config.output_dir).resolve() not in folder.parents:
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _candidates(config: TrainingKeys) -> list[Path]:
    """The checkpoint files that `resume` may mean, newest first."""
    assert config.resume is not None
    if config.resume == RESUME_NEWEST:
        runs = [run.parent for run in Path(config.output_dir).glob(f"*/{_FOLDER}")]
        idle = [run for run in runs if not (is_finished(run) or is_running(run))]
        found = [path for run in idle for path in (run / _FOLDER).glob(_FILES)]
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)
    path = resolve_path(config.resume)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ResumeError(f"resume: there is no file or folder {path}")
    if is_finished(path):
        raise ResumeError(f"resume: the run in {path} is finished; there is nothing to go on with")
    return sorted((path / _FOLDER).glob(_FILES), reverse=True)


def _differences(head: RunState, settings: Mapping[str, Any], kind: type[TrainingKeys]) -> list[str]:
    """The keys of which a checkpoint has other values; one that it lacks had its default, as one that is gone has."""
    defaults = {key.name: key.default for key in keys_of(kind)}
    was = {**json.loads(json.dumps(_only(defaults, settings))), **head.settings}
    differing = [
        key
        for key in was
        if (was[key] != settings[key] if key in settings else as_text(was[key]) != kind.gone.get(key))
    ]
    return [
        f"{key}: the run was begun with {was[key]}, now it is {settings.get(key, _NO_KEY)} ({head.path})"
        for key in differing
    ]


def _only(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
