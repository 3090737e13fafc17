"""The state of a run between two steps, as one safetensors file: nothing in it is run when it is read.

A nested state (what `state_dict()` gives) is taken apart: its tensors go into the file under their path, and the rest
is JSON in the file's head. The file carries the SHA-256 of both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mu.ldm.tensor_file import (
    FINGERPRINT_KEY,
    CheckpointError,
    fingerprint,
    read_state_dict,
    write_state_dict,
)

RUN_STATE_FORMAT = "1"
_HEAD_KEY = "run_state"
_DIGEST_KEY = "run_state_sha256"


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a checkpoint of a run is of; read without its tensors."""

    path: Path
    step: int
    """Steps that were done."""
    settings: dict[str, Any]
    """The keys of the config that decide the result, as JSON knows them."""
    identity: dict[str, str]
    """Digests of what the settings name by path: the model, the mask, the rows; and versions."""


@dataclass(frozen=True, kw_only=True)
class RunState(Head):
    """A checkpoint of a run, whole; its tensors are on the CPU."""

    content: dict[str, Any]


def write_run_state(
    path: Path,
    content: Mapping[str, Any],
    *,
    step: int,
    settings: Mapping[str, Any],
    identity: Mapping[str, str],
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        content: nested dicts (of str and int keys), lists and tuples of tensors, numbers, text and None.

    Raises:
        CheckpointError: it could not be written; what was there before is unchanged.
        TypeError: the content holds something else.
    """
    tensors: dict[str, Tensor] = {}
    head = {
        "format": RUN_STATE_FORMAT,
        "step": step,
        "settings": dict(settings),
        "identity": dict(identity),
        "content": _take_apart(content, "", tensors),
    }
    text = json.dumps(head)
    write_state_dict(tensors, path, {_HEAD_KEY: text, _DIGEST_KEY: _digest(text)})


def read_head(path: Path) -> Head:
    """What a checkpoint is of.

    Raises:
        CheckpointError: it is missing, damaged, or no checkpoint of a run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            head = _parsed(file.metadata() or {}, path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Head(path=path, step=head["step"], settings=head["settings"], identity=head["identity"])


def read_run_state(path: Path) -> RunState:
    """A whole checkpoint, checked against the SHA-256 that it carries.

    Raises:
        CheckpointError: it is missing, damaged, or no checkpoint of a run.
    """
    tensors, metadata = read_state_dict(path)
    head = _parsed(metadata, path)
    return RunState(
        path=path,
        step=head["step"],
        settings=head["settings"],
        identity=head["identity"],
        content=_put_together(head["content"], tensors),
    )


def verify_run_state(path: Path) -> None:
    """Read a checkpoint back, one tensor at a time, and compare it with the SHA-256 that it carries.

    Raises:
        CheckpointError: it is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _parsed(metadata, path)
            same = fingerprint(_OnDisk(file)) == metadata.get(FINGERPRINT_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not same:
        raise CheckpointError(f"{path}: what is read back is not what was written; the disk may be failing")


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


def _parsed(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    text = metadata.get(_HEAD_KEY)
    if text is None:
        raise CheckpointError(
            f"{path} is no checkpoint of a run; runs keep theirs as checkpoints/step-*.safetensors"
        )
    if _digest(text) != metadata.get(_DIGEST_KEY):
        raise CheckpointError(f"{path} is damaged: its head does not have the SHA-256 that it carries")
    head: dict[str, Any] = json.loads(text)
    if head["format"] != RUN_STATE_FORMAT:
        raise CheckpointError(
            f"{path} has format {head['format']}, this version reads {RUN_STATE_FORMAT}: go on with the version of "
            "this package that wrote it"
        )
    return head


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; its tensors go to `tensors` under their path. Containers become {their kind: their items}."""
    if type(value) in (Tensor, nn.Parameter):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{name}: the key {key!r} is neither text nor a whole number")
        return {"dict": [[key, _take_apart(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take_apart(item, f"{name}/{place}", tensors) for place, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint of a run")


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "tensor":
        return tensors[items]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in items}
    together = [_put_together(item, tensors) for item in items]
    return together if kind == "list" else tuple(together)
