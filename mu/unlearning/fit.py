"""Lightning's loop around the trainer: device, loggers, and the losses of each step on disk."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mu import ranks
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer
from mu.atomic import WriteError
from mu.config import as_dict
from mu.errors import Terminated
from mu.run_folder import RunFolder, csv_bytes
from mu.unlearning.checkpoints import Checkpoints
from mu.unlearning.guarded_logger import (
    GuardedLogger,
    is_logging_error,
)
from mu.unlearning.rank_strategy import loop_devices
from mu.unlearning.run_state import RunState
from mu.unlearning.runs import first_line
from mu.unlearning.step_boundary import StepBoundary
from mu.unlearning.training_config import TrainingKeys
from mu.verbosity import bars_off

_TERMS = ("loss", "forget", "retain")
_WANDB_MODES = {
    "offline": "offline",
    "dryrun": "offline",
    "online": "online",
    "run": "online",
    "disabled": "off",
}
"""What WANDB_MODE may say, as the key wandb says it."""

_log = logging.getLogger(__name__)


def fit(
    trainer: SaliencyUnlearnTrainer,
    data: SaliencyUnlearnDataHandler,
    config: TrainingKeys,
    folder: RunFolder,
    *,
    callbacks: Sequence[pl.Callback] = (),
    checkpoints: Checkpoints,
    resumed: RunState | None = None,
) -> dict[str, float]:
    """Run all steps of a config; of a run that is resumed, those that it still has to do.

    Args:
        callbacks: called after the losses of a step are on disk; in the main process alone.

    Returns:
        `loss`, `forget_loss` and `retain_loss`, each the mean over the last epoch.

    Raises:
        TrainingError: a loss or gradient was not finite; no weight was changed by it.
        WriteError: the losses of a step could not be written; a checkpoint that has them was, if that could.
        KeyboardInterrupt, Terminated: SIGINT or SIGTERM, after the step, its checkpoint and the loggers are done.
    """
    boundary = StepBoundary(trainer.model, folder, checkpoints, total_steps=data.total_steps)
    if resumed is not None:
        boundary.restore(resumed)
    history = LossHistory(folder, boundary)
    # A run that has done all its steps still ends as others do, with a loader that is not read.
    loader = data.train_loader(start_step=min(boundary.step, data.total_steps - 1))
    guards = [GuardedLogger(logger) for logger in run_loggers(config, folder.path)] if ranks.is_main() else []
    loggers = [guard.logger for guard in guards if guard.begin()]
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The loader cuts the steps itself and serves tensors that are in memory: workers would only copy them.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Unlearning runs without dropout: eval mode is meant.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # between Lightning and torch
        loop = pl.Trainer(
            **loop_devices(config.devices),
            max_epochs=1,  # all epochs of the config are one pass of the loader
            logger=loggers or False,
            callbacks=[
                history,
                *(callbacks if ranks.is_main() else ()),
                TQDMProgressBar(refresh_rate=0 if bars_off() else 1),
                boundary,
            ],
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        if (
            ranks.world_size() > 1
        ):  # Lightning's own would meet the other processes, which may not know of a signal
            loop._signal_connector._sigterm_notifier_fn = _end_at_once  # type: ignore[method-assign,assignment]
        at_ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            with boundary.taking_signals():
                loop.fit(trainer, loader)
        except SIGTERMException:  # Lightning's, of a signal that came before the first step
            raise Terminated from None
        except SystemExit as stopped:  # what Lightning makes of Ctrl-C, which it also switches off for good
            if not isinstance(stopped.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, at_ctrl_c)
            raise KeyboardInterrupt from None
        finally:
            for guard in guards:
                guard.finish()
    last = history.rows[-data.steps_per_epoch :]
    means = [sum(row[i] for row in last) / len(last) for i in range(len(_TERMS))]
    return dict(zip(("loss", "forget_loss", "retain_loss"), means, strict=True))


def _end_at_once(*_: object) -> None:
    """What SIGTERM does between Lightning's preparations and the first step."""
    raise Terminated


class LossHistory(pl.Callback):
    """Both terms of every step, in memory, in `metrics.csv`, and with the same count of steps in the run's loggers.

    Goes on after the rows that are there.

    Args:
        boundary: is told where a row cannot be written: the run then stops after this step, with a checkpoint.
    """

    def __init__(self, folder: RunFolder, boundary: StepBoundary) -> None:
        self.folder = folder
        self.boundary = boundary
        self.rows = [tuple(float(row[name]) for name in _TERMS) for row in folder.metrics_csv.read()]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        row = tuple(float(trainer.callback_metrics[name]) for name in _TERMS)
        self.rows.append(row)
        terms = dict(zip(_TERMS, row, strict=True))
        try:
            self.folder.metrics_csv.append(trainer.global_step, **terms)
        except WriteError as error:
            content = csv_bytes([("step", *_TERMS), *((step, *row) for step, row in enumerate(self.rows, 1))])
            self.boundary.fail(error, {self.folder.metrics_csv.path.name: content})
        for logger in trainer.loggers:
            logger.log_metrics(terms, step=trainer.global_step)


def run_loggers(config: TrainingKeys, folder: Path) -> list[Logger]:
    """Lightning's loggers that the keys `logger` and `wandb`, and the variable WANDB_MODE, ask for."""
    if config.logger == "tensorboard":
        return [TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)]
    logger = wandb_logger(config, folder)
    return [] if logger is None else [logger]


def wandb_mode(config: TrainingKeys) -> str:
    """`off`, `offline` or `online`: the key `wandb`, or else WANDB_MODE, or else what `logger` means.

    WANDB_MODE may also bring less than the keys ask for: WANDB_MODE=offline makes `online` offline,
    WANDB_MODE=disabled turns it off.
    """
    variable = _WANDB_MODES.get(os.environ.get("WANDB_MODE", "").strip().lower())
    if config.logger in ("none", "tensorboard") or variable == "off":
        return "off"
    asked = config.wandb or variable or ("online" if config.logger == "wandb" else "off")
    return "offline" if asked == "online" and variable == "offline" else asked


def wandb_logger(config: TrainingKeys, folder: Path) -> WandbLogger | None:
    """Lightning's Weights & Biases logger, or None where `wandb_mode` says off.

    `online` without a key is offline, with one warning; so is a run whose connection cannot be made.
    """
    mode = wandb_mode(config)
    if mode == "off":
        return None
    import wandb

    settings: dict[str, Any] = {
        "project": config.wandb_project,
        "save_dir": str(folder),
        "name": folder.name,
        "config": as_dict(config),
    }
    online = mode == "online"
    if online and not wandb.api.api_key:
        _log.warning("wandb: no API key on this machine; this run is kept offline in %s", folder / "wandb")
        online = False
    if online:
        try:
            logger = WandbLogger(**settings, settings=wandb.Settings(init_timeout=30))
            _ = logger.experiment
            return logger
        except Exception as error:
            if not is_logging_error(error):
                raise
            _log.warning("wandb: %s; this run is kept offline in %s", first_line(error), folder / "wandb")
    # The mode is said twice: once wandb has looked for a key, it no longer heeds the variable that Lightning sets.
    return WandbLogger(**settings, offline=True, mode="offline")
