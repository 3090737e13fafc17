"""A logger of Lightning's that may fail: the run that it tells of does not end with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import Logger

from mu.algorithms.saliency_unlearning.runs import first_line

_log = logging.getLogger(__name__)
_METHODS = ("log_metrics", "log_image", "log_hyperparams", "log_graph", "save", "finalize")


class GuardedLogger:
    """Lets one of Lightning's loggers fail without ending its run: a warning, and from then on nothing is sent to it.

    Its methods are replaced on the object itself: a wrapper would be no `WandbLogger` to those who look for one.

    Args:
        logger: with `log_image` and a run to finish (`experiment.finish`), if it has them.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self._failed = False
        for name in ("log_metrics", "log_image", "log_hyperparams", "log_graph", "save", "finalize"):
            if (method := getattr(logger, name, None)) is not None:
                setattr(logger, name, self._guarded(method))

    def finish(self) -> None:
        """End the logger's run: the next one of this process would go on in it."""
        self._guarded(lambda: getattr(self.logger.experiment, "finish", lambda: None)(), always=True)()

    def _guarded(self, method: Callable[..., Any], *, always: bool = False) -> Callable[..., None]:
        def guarded(*args: Any, **options: Any) -> None:
            if self._failed and not always:
                return
            warned, self._failed = self._failed, True
            try:
                method(*args, **options)
                self._failed = warned
            except (OSError, *_wandb_errors()) as error:
                if not warned:
                    name = type(self.logger).__name__
                    _log.warning("%s failed (%s); nothing more is logged to it", name, first_line(error))

        return guarded


def _wandb_errors() -> tuple[type[Exception], ...]:
    """The root of the errors of Weights & Biases, where it is in use."""
    module = sys.modules.get("wandb.errors")
    return () if module is None else (module.Error,)
