"""The losses of each step in memory, in `metrics.csv`, and in Weights & Biases or TensorBoard.

A logger may fail without ending its run: a warning says so once, and from then on nothing is sent to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mu import ranks
from mu.atomic import WriteError
from mu.config import as_dict
from mu.errors import first_line
from mu.run_folder import RunFolder, csv_bytes
from mu.unlearning.training_config import TrainingKeys

_WANDB_MODES = {
    "offline": "offline",
    "dryrun": "offline",
    "online": "online",
    "run": "online",
    "disabled": "off",
}
"""What WANDB_MODE may say, as the key wandb says it."""
_log = logging.getLogger(__name__)


class RunLogger:
    """Weights & Biases or TensorBoard, where the keys ask for one; in the main process alone.

    Args:
        config: `logger`, `wandb`, `wandb_project`; and `template`: pictures of i2p never leave this machine.
        folder: of the run.
    """

    def __init__(self, config: TrainingKeys, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._logger: Any = None
        self._failed = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Send to it while the block lasts."""
        begun, status = False, "failed"
        if ranks.is_main() and (logger := make_logger(self._config, self._folder)) is not None:
            self._logger = logger
            begun = self._begin()
        try:
            yield
            status = "success"
        finally:
            self._send(lambda logger: logger.finalize(status))
            if begun:  # also one that has failed: the next run of this process would go on in it
                self._try(lambda logger: getattr(logger.experiment, "finish", lambda: None)())
            self._logger = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._send(lambda logger: logger.log_metrics(dict(values), step=step))

    def picture(self, path: Path, step: int) -> None:
        """A picture of a step, from its file."""
        if self._config.logger == "tensorboard":
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB"))  # (H, W, 3)
            self._send(lambda it: it.experiment.add_image("pictures", pixels, step, dataformats="HWC"))
        elif self._config.template != "i2p":
            self._send(lambda logger: logger.log_image("pictures", [str(path)], step=step))

    def _begin(self) -> bool:
        """Begin the logger's own run; false where that failed."""
        mode = os.environ.get("WANDB_MODE")
        self._try(lambda logger: logger.experiment)
        # WandbLogger sets the variable for good where a run is offline: it would decide over the next run here.
        os.environ.pop("WANDB_MODE", None)
        if mode is not None:
            os.environ["WANDB_MODE"] = mode
        return not self._failed

    def _send(self, work: Callable[[Any], object]) -> None:
        if self._logger is not None and not self._failed:
            self._try(work)

    def _try(self, work: Callable[[Any], object]) -> None:
        try:
            work(self._logger)
        except Exception as error:
            if not is_logging_error(error):
                raise
            if not self._failed:
                name = type(self._logger).__name__
                _log.warning("%s failed (%s); nothing more is logged to it", name, first_line(error))
            self._failed = True


class LossLog:
    """`loss`, `forget` and `retain` of every step: in memory, in `metrics.csv`, and in the run's logger.

    Goes on after the rows that are there.
    """

    TERMS = ("loss", "forget", "retain")

    def __init__(self, folder: RunFolder, logger: RunLogger) -> None:
        self.logger = logger
        self.rows: list[tuple[float, ...]] = []
        self._csv = folder.metrics_csv

    @contextmanager
    def open(self) -> Iterator[None]:
        """Append while the block lasts."""
        self.rows = [tuple(float(row[name]) for name in self.TERMS) for row in self._csv.read()]
        with self.logger.open():
            yield

    def append(self, step: int, terms: Mapping[str, float]) -> WriteError | None:
        """Note the losses of a step; returns the error where they could not be written to `metrics.csv`."""
        self.rows.append(tuple(terms[name] for name in self.TERMS))
        unwritten = None
        try:
            self._csv.append(step, **terms)
        except WriteError as error:
            unwritten = error
        self.logger.metrics(terms, step)
        return unwritten

    def table(self) -> bytes:
        """What `metrics.csv` holds, or should."""
        numbered = [(step, *row) for step, row in enumerate(self.rows, start=1)]
        return csv_bytes([("step", *self.TERMS), *numbered])

    def means(self, *, last: int) -> dict[str, float]:
        """`loss`, `forget_loss` and `retain_loss`, each the mean of that many last steps."""
        rows = self.rows[-last:]
        loss, forget, retain = (sum(row[i] for row in rows) / len(rows) for i in range(len(self.TERMS)))
        return {"loss": loss, "forget_loss": forget, "retain_loss": retain}


def make_logger(config: TrainingKeys, folder: Path) -> Any:
    """The logger that the keys `logger` and `wandb`, and the variable WANDB_MODE, ask for; None: none."""
    if config.logger != "tensorboard":
        return wandb_logger(config, folder)
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)


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


def wandb_logger(config: TrainingKeys, folder: Path) -> Any:
    """Lightning's Weights & Biases logger, or None where `wandb_mode` says off.

    `online` without a key is offline, with one warning; so is a run whose connection cannot be made.
    """
    mode = wandb_mode(config)
    if mode == "off":
        return None
    import wandb
    from pytorch_lightning.loggers import WandbLogger

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


def is_logging_error(error: Exception) -> bool:
    """Whether an error is one that a logger may meet: of a disk, a connection, or of Weights & Biases itself.

    Those of wandb have no class in common: some are of `wandb.errors`, others, of its service, plain exceptions. What
    was raised from such an error counts too: TensorBoardLogger makes a ValueError of all that it meets.
    """
    of_wandb = any(kind.__module__.partition(".")[0] == "wandb" for kind in type(error).__mro__)
    if isinstance(error, OSError) or of_wandb:
        return True
    return isinstance(error.__cause__, Exception) and is_logging_error(error.__cause__)
