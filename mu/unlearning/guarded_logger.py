"""A logger of Lightning's that may fail: the run that it tells of does not end with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import Logger

from mu.unlearning.runs import first_line

_log = logging.getLogger(__name__)
_METHODS = ("log_metrics", "log_image", "log_hyperparams", "log_graph", "save", "finalize")


class GuardedLogger:
    """Lets one of Lightning's loggers fail without ending its run: a warning, and from then on nothing is sent to it.

    Its methods are replaced on the object itself: a wrapper would be no `WandbLogger` to those who look for one.
    `begin` comes first, `finish` last.

    Args:
        logger: with `experiment`; and with `log_image` and a run to finish (`experiment.finish`), if it has them.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger: Any = logger
        self._begun = self._failed = False
        for name in _METHODS:
            if (method := getattr(logger, name, None)) is not None:
                setattr(logger, name, self._guarded(method))

    def begin(self) -> bool:
        """Begin the logger's run, as Lightning will; False where that failed: then Lightning must not have it."""
        mode = os.environ.get("WANDB_MODE")
        self._try(lambda: self.logger.experiment)
        # Lightning sets the variable for good where a run is offline: it would decide over the next run here.
        os.environ.pop("WANDB_MODE", None)
        if mode is not None:
            os.environ["WANDB_MODE"] = mode
        self._begun = not self._failed
        return self._begun

    def finish(self) -> None:
        """End the logger's run, also one that has failed: the next one of this process would go on in it."""
        if self._begun:
            self._try(lambda: getattr(self.logger.experiment, "finish", lambda: None)())

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., None]:
        def guarded(*args: Any, **options: Any) -> None:
            if not self._failed:
                self._try(lambda: method(*args, **options))

        return guarded

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            if not is_logging_error(error):
                raise
            if not self._failed:
                name = type(self.logger).__name__
                _log.warning("%s failed (%s); nothing more is logged to it", name, first_line(error))
            self._failed = True


def is_logging_error(error: Exception) -> bool:
    """Whether an error is one that a logger may meet: of a disk, a connection, or of Weights & Biases itself.

    Those of wandb have no class in common: some are of `wandb.errors`, others, of its service, plain exceptions. What
    was raised from such an error counts too: Lightning's TensorBoardLogger makes a ValueError of all that it meets.
    """
    of_wandb = any(kind.__module__.partition(".")[0] == "wandb" for kind in type(error).__mro__)
    if isinstance(error, OSError) or of_wandb:
        return True
    return isinstance(error.__cause__, Exception) and is_logging_error(error.__cause__)
