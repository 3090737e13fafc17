"""The checkpoints of the results table: each method's model that has forgotten a concept, made once and kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.table_config import RowKeys
from benchmarks.table_rows import PlannedRow, planned_rows
from benchmarks.table_text import Row
from mu.arithmetic import CUBLAS_WORKSPACE, run_arithmetic
from mu.atomic import write_atomically
from mu.config import override, resolve_path
from mu.ldm import load_model
from mu.ldm.tensor_file import fingerprint

_COUNTS = ("steps", "weights_selected", "weights_changed", "weights_total")
"""What a row keeps of an algorithm's result, where it has it."""


class Unlearned:
    """What the rows of a folder are made of; a row that is there with the same settings is not made again."""

    def __init__(self, config: RowKeys) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        # A recipe may ask for deterministic kernels, when CUDA has long begun; cuBLAS reads this once.
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        self._fingerprints: dict[Path, str] = {}

    @run_arithmetic()
    def made(self, concept: str) -> list[tuple[PlannedRow, Row]]:
        """Each row of a concept with what was made: `checkpoint`, below the folder, `seconds`, numbers of weights."""
        # 1. What there is, and what an earlier call has made of it
        planned = planned_rows(self.config, concept)
        kept = [self._kept(row) for row in planned]

        # 2. Masks: one pass of gradients for all that are missing
        missing = [
            row for row, made in zip(planned, kept, strict=True) if made is None and row.mask is not None
        ]
        seconds = self._make_masks(missing) if missing else {}

        # 3. The models that are missing
        return [
            (row, made or self._unlearn(row, seconds if row in missing else {}))
            for row, made in zip(planned, kept, strict=True)
        ]

    def _make_masks(self, rows: Sequence[PlannedRow]) -> dict[str, float]:
        """The masks of all sizes, for the method that has them; the seconds of the pass."""
        first, stage = rows[0].mask, rows[0].method.mask
        assert first is not None
        assert stage is not None
        thresholds = tuple(dict.fromkeys(row.threshold for row in rows))
        started = time.monotonic()
        stage.run(override(first, threshold=thresholds))
        return {"mask": round(time.monotonic() - started, 1)}

    def _kept(self, row: PlannedRow) -> Row | None:
        """What an earlier call made with the same settings."""
        path = row.folder / "made.json"
        if not self.config.resume or not path.exists():
            return None
        kept: Row = json.loads(path.read_text(encoding="utf-8"))
        same = kept["settings_sha256"] == row.settings(self._fingerprint(row.train))
        return kept if same and (self.folder / kept["checkpoint"]).exists() else None

    def _unlearn(self, row: PlannedRow, seconds: Mapping[str, float]) -> Row:
        """Make the checkpoint of a row; `seconds` are those of its mask."""
        started = time.monotonic()
        made = row.method.train.run(row.train)
        took = round(time.monotonic() - started, 1)
        found: Row = {
            "settings_sha256": row.settings(self._fingerprint(row.train)),
            "checkpoint": str(Path(made["checkpoint"]).relative_to(self.folder)),
            "seconds": {**seconds, "train": took},
            **{key: made[key] for key in _COUNTS if key in made},
        }
        write_atomically(row.folder / "made.json", json.dumps(found, indent=2).encode())
        return found

    def _fingerprint(self, train: Any) -> str:
        """Of the recipe's model before unlearning."""
        path = train.checkpoint()
        if path not in self._fingerprints:
            model = load_model(resolve_path(train.model_config_path), path, use_ema=train.use_ema)
            self._fingerprints[path] = fingerprint(model.state_dict())
        return self._fingerprints[path]


@contextmanager
def claimed(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the folder for itself; the lock goes with its process, also when that is killed.

    Args:
        wait: until another process has let go of it; else False is yielded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    with lock:
        yield True
