"""What happens between two steps: a checkpoint when one is due, an orderly stop when one was asked for."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from mu import ranks
from mu.atomic import WriteError, write_atomically
from mu.errors import Terminated
from mu.ldm.tensor_file import CheckpointError
from mu.run_folder import RunFolder
from mu.unlearning.checkpoints import (
    Checkpoints,
    ResumeError,
)
from mu.unlearning.moving import MovingModel
from mu.unlearning.run_state import RunState

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nstopping after this step, with a checkpoint; once more: at once, without\n"


class StepBoundary(pl.Callback):
    """Saves and restores everything that the next step depends on, and stops the run between two steps.

    That is: the values of the weights that move, the optimizer, the schedule of its learning rate, the number of
    steps done, and the tables (*.csv) in the run's folder. There is no state of random numbers: those of a step
    follow from the seed and the step (`mu.datasets.streams`). It belongs last among the callbacks, so that what the
    others write is saved too.

    Args:
        model: its selected weights are saved.
        folder: its tables are.
        checkpoints: says when, and writes.
        total_steps: of the whole run.
    """

    def __init__(
        self, model: MovingModel, folder: RunFolder, checkpoints: Checkpoints, *, total_steps: int
    ) -> None:
        self.model = model
        self.folder = folder
        self.checkpoints = checkpoints
        self.total_steps = total_steps
        self.step = 0
        """Steps that are done."""
        self._asked: int | None = None  # the signal that asked for a stop
        self._failed: WriteError | None = None  # why the run has to stop
        self._unwritten: Mapping[str, bytes] = {}  # tables that are not on disk as they should be
        self._before: dict[int, Any] = {}  # signal -> what handles it outside of `taking_signals`
        self._to_load: RunState | None = None

    def restore(self, state: RunState) -> None:
        """Take over a checkpoint: weights and tables now, the rest when Lightning has made the optimizer.

        Raises:
            ResumeError: it is not of this model.
        """
        self.step = state.step
        weights = state.content["weights"]
        if weights.keys() != dict(self.model.parameters_to_train()).keys():
            raise ResumeError(f"resume: {state.path} has the values of other weights than those that move")
        self.model.write_selected_(weights)
        ranks.on_main(lambda: self._restore_tables(state.content["tables"]))
        self._to_load = state

    def _restore_tables(self, tables: Mapping[str, torch.Tensor]) -> None:
        for path in self.folder.path.glob("*.csv"):
            if path.name not in tables:
                path.unlink()  # begun after the checkpoint
        for name, content in tables.items():
            write_atomically(self.folder.path / name, content.numpy().tobytes())

    @contextmanager
    def taking_signals(self) -> Iterator[None]:
        """While the block lasts, SIGINT and SIGTERM stop the run after its step; a second one ends it at once."""
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            handlers = {signum: signal.getsignal(signum) for signum in _SIGNALS}
            self._before = {signum: old for signum, old in handlers.items() if old is not signal.SIG_IGN}
        try:
            yield
        finally:
            self._give_signals_back()
            self._before = {}

    def fail(self, error: WriteError, tables: Mapping[str, bytes]) -> None:
        """Stop the run after this step, with a checkpoint, because something of it could not be written.

        Args:
            error: is raised then.
            tables: name -> what should be in the run's folder under it, for the checkpoint.
        """
        self._failed, self._unwritten = error, tables

    def _ask_to_stop(self, signum: int, _: object) -> None:
        self._asked = signum
        self._give_signals_back()
        os.write(2, _NOTE)  # print and logging may be in the middle of a line

    def _give_signals_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Before any callback's `on_train_start`, so that all of them see the run's own step."""
        if self._to_load is None:
            return
        state, self._to_load = self._to_load, None
        if state.content["layout"] != self._layout():
            raise ResumeError(
                f"resume: in the run of {state.path} the weights lay in memory in another order, to which the "
                "optimizer's state belongs: give devices and channels_last the values that they had"
            )
        (optimizer,), schedules = trainer.optimizers, trainer.lr_scheduler_configs
        optimizer.load_state_dict(state.content["optimizer"])
        for schedule, saved in zip(schedules, state.content["schedules"], strict=True):
            schedule.scheduler.load_state_dict(saved)
        # Lightning counts the steps of this call; what is logged and said shall count those of the run.
        epoch_loop = trainer.fit_loop.epoch_loop
        epoch_loop._batches_that_stepped = self.step
        for progress in (
            epoch_loop.automatic_optimization.optim_progress.optimizer.step,
            epoch_loop.manual_optimization.optim_step_progress,
        ):
            progress.total.ready = progress.total.completed = self.step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        for signum in self._before:
            signal.signal(signum, self._ask_to_stop)  # over Lightning's own
        if self.step == self.total_steps:  # the run stopped between its last step and its files
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step += 1
        # The end of a run that was worth checkpoints: after it, large files are written.
        last = self.step == self.total_steps and bool(self.checkpoints.paths)
        due = self.checkpoints.is_due(self.step) or last
        # Signals and clocks do not reach all processes between the same two steps.
        told = ranks.gathered((self._asked, due, self._failed is not None))
        asked = next((number for number, *_ in told if number is not None), None)
        due, failed = told[0][1:]
        if asked is not None or due or failed:
            ranks.on_main(lambda: self._save(self._content(trainer)))
        if asked is not None:
            raise KeyboardInterrupt if asked == signal.SIGINT else Terminated

    def _save(self, content: Mapping[str, Any]) -> None:
        try:
            self.checkpoints.save(self.step, content)
        except CheckpointError as error:
            if self._failed is not None:
                raise WriteError(f"{self._failed}. Nor could a checkpoint: {error}") from error
            raise
        if self._failed is not None:
            raise self._failed

    def _content(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {
            "weights": self.model.selected_values(),
            "layout": self._layout(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedules": [schedule.scheduler.state_dict() for schedule in trainer.lr_scheduler_configs],
            "tables": {
                path.name: _as_bytes(path.read_bytes())
                for path in self.folder.path.glob("*.csv")
                if path.name not in self._unwritten
            }
            | {name: _as_bytes(content) for name, content in self._unwritten.items()},
        }

    def _layout(self) -> str:
        """How the weights that move lie in memory: the optimizer's vectors are in that order."""
        strides = [parameter.stride() for _, parameter in self.model.parameters_to_train()]
        return hashlib.sha256(repr(strides).encode()).hexdigest()


def _as_bytes(content: bytes) -> torch.Tensor:
    """(n,) uint8."""
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())
