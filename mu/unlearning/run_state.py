"""A training run between two steps, as one safetensors file: nothing in it is run when it is read.

Tensors, flat: `weights/<name>`, the values that move; `exp_avg/<name>` and `exp_avg_sq/<name>`, the two moments of Adam
for each of them; `tables/<file>`, the bytes of the tables in the run's folder. All else is JSON in the file's metadata.
The file carries the SHA-256 of both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mu.atomic import write_atomically
from mu.errors import MuError
from mu.ldm.tensor_file import (
    FINGERPRINT_KEY,
    CheckpointError,
    fingerprint,
    read_state_dict,
    write_state_dict,
)
from mu.unlearning.moving import MovingModel
from mu.unlearning.optim import MaskedAdam

RUN_STATE_FORMAT = "2"
_HEAD_KEY = "run_state"
_DIGEST_KEY = "run_state_sha256"


class ResumeError(MuError, ValueError):
    """There is no checkpoint that a run could go on with."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A checkpoint of a run; of `read_head` without its tensors."""

    path: Path
    step: int
    """Steps that were done."""
    settings: dict[str, Any]
    """The keys of the config that decide the result, as JSON knows them."""
    identity: dict[str, str]
    """Digests of what the settings name by path: the model, the mask, the rows; and versions."""
    schedule: dict[str, Any]
    """State of the learning rate's schedule; empty without one."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """On the CPU."""

    def part(self, kind: str) -> dict[str, Tensor]:
        """The tensors of a kind, such as `weights`, by the rest of their name."""
        return {
            name.removeprefix(f"{kind}/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{kind}/")
        }


def write_run_state(state: RunState) -> None:
    """Write a checkpoint to its path, whole or not at all.

    Raises:
        CheckpointError: it could not be written; what was there before is unchanged.
    """
    head = {
        "format": RUN_STATE_FORMAT,
        "step": state.step,
        "settings": state.settings,
        "identity": state.identity,
        "schedule": state.schedule,
    }
    text = json.dumps(head)
    write_state_dict(state.tensors, state.path, {_HEAD_KEY: text, _DIGEST_KEY: _digest(text)})


def read_head(path: Path) -> RunState:
    """What a checkpoint is of, without its tensors.

    Raises:
        CheckpointError: it is missing, damaged, or no checkpoint of a run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _parsed(metadata, path, {})


def read_run_state(path: Path) -> RunState:
    """A whole checkpoint, checked against the SHA-256 that it carries.

    Raises:
        CheckpointError: it is missing, damaged, or no checkpoint of a run.
    """
    tensors, metadata = read_state_dict(path)
    return _parsed(metadata, path, tensors)


def verify_run_state(path: Path) -> None:
    """Read a checkpoint back, one tensor at a time, and compare it with the SHA-256 that it carries.

    Raises:
        CheckpointError: it is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _parsed(metadata, path, {})
            same = fingerprint(_OnDisk(file)) == metadata.get(FINGERPRINT_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not same:
        raise CheckpointError(f"{path}: what is read back is not what was written; the disk may be failing")


def training_tensors(model: MovingModel, optimizer: MaskedAdam) -> dict[str, Tensor]:
    """The values of the entries that move, and their moments, (count,) each, row-major."""
    tensors = {f"weights/{name}": values for name, values in model.selected_values().items()}
    for name, parameter in model.parameters_to_train():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return tensors


def restore_training_(state: RunState, model: MovingModel, optimizer: MaskedAdam) -> None:
    """Take over what `training_tensors` gave.

    Raises:
        ResumeError: it is of other weights than those that move.
    """
    weights, named = state.part("weights"), model.parameters_to_train()
    if weights.keys() != dict(named).keys():
        raise ResumeError(f"resume: {state.path} has the values of other weights than those that move")
    model.write_selected_(weights)
    saved = optimizer.state_dict()  # of an optimizer that has made no step
    saved["state"] = {
        index: {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.tensors[f"exp_avg/{name}"],
            "exp_avg_sq": state.tensors[f"exp_avg_sq/{name}"],
        }
        for index, (name, _) in enumerate(named)
    }
    optimizer.load_state_dict(saved)


def table_tensors(run: Path, known: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The tables in a run's folder, (bytes,) uint8 each.

    Args:
        known: what some of them hold, or should: these are not read.
    """
    content = {path.name: path.read_bytes() for path in run.glob("*.csv") if path.name not in known}
    return {
        f"tables/{name}": torch.from_numpy(np.frombuffer(table, np.uint8).copy())
        for name, table in {**content, **known}.items()
    }


def restore_tables(state: RunState, run: Path) -> None:
    """Give the tables in a run's folder the rows that they had at a checkpoint."""
    tables = state.part("tables")
    for path in run.glob("*.csv"):
        if path.name not in tables:
            path.unlink()  # begun after the checkpoint
    for name, content in tables.items():
        write_atomically(run / name, content.numpy().tobytes())


class _OnDisk(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names: list[str] = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parsed(metadata: Mapping[str, str], path: Path, tensors: Mapping[str, Tensor]) -> RunState:
    text = metadata.get(_HEAD_KEY)
    if text is None:
        raise CheckpointError(
            f"{path} is no checkpoint of a run; runs keep theirs as checkpoints/step-*.safetensors"
        )
    if _digest(text) != metadata.get(_DIGEST_KEY):
        raise CheckpointError(f"{path} is damaged: its head does not have the SHA-256 that it carries")
    head: dict[str, Any] = json.loads(text)
    if (found := head.pop("format")) != RUN_STATE_FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, this version reads {RUN_STATE_FORMAT}: the run was begun with another "
            "version of this package; go on with that one, or begin anew without --resume"
        )
    return RunState(path=path, tensors=tensors, **head)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
