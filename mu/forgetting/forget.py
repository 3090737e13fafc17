"""`forget`, and its plan, for those who call them. PyTorch is loaded only where something is left to be done."""

from __future__ import annotations

import sys
import time

from mu.bars import loading
from mu.forgetting.answer import Forgotten, read_answer
from mu.forgetting.config import ForgetConfig
from mu.forgetting.plan import ForgetPlan
from mu.forgetting.recipes import recipe_of
from mu.verbosity import bars_off


def forget(config: ForgetConfig) -> Forgotten:
    """Make a model forget, and look at what it forgot and kept; what is done already is read from its files.

    Returns:
        Where everything is, and the numbers.

    Raises:
        ConfigError: a key is wrong, or a file is missing.
        MuError, KeyboardInterrupt, Terminated: see `mu.forgetting.run.run`.
    """
    started = time.monotonic()
    recipe = recipe_of(config)
    found = read_answer(recipe, seconds=0.0)
    if found is not None:
        if not bars_off():
            print("All of it is done already.", file=sys.stderr, flush=True)
        return found
    with loading():
        from mu.forgetting.run import run
    return run(config, recipe, started=started)


def plan(config: ForgetConfig) -> ForgetPlan:
    """What `--dry_run` prints: all that is left to do, with what would stop it; nothing is made.

    Raises:
        ConfigError: a key is wrong, or a file is missing.
        MuError: the model cannot be loaded.
    """
    recipe = recipe_of(config)
    if read_answer(recipe, seconds=0.0) is not None:
        return ForgetPlan(recipe=recipe)
    with loading():
        from mu.forgetting.stages import plan_of
    return plan_of(recipe, examined=True, timing=config.timing)
