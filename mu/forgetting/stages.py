"""The stages of a forgetting that are left to do: the method of each, its plan, and about how long it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mu.algorithms.esd.algorithm import ESDAlgorithm
from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.uce.algorithm import UCEAlgorithm
from mu.algorithms.uce.configs import UCEConfig
from mu.config import override
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.forgetting.answer import finished
from mu.forgetting.pictures import SEEDS, shown_prompts
from mu.forgetting.plan import ForgetPlan, Work
from mu.forgetting.recipes import Recipe
from mu.forgetting.timing import UNTIMED, Timed, timed
from mu.unlearning.checkpoints import steps_done
from mu.unlearning.inspection import SLOW_ON_A_CPU
from mu.unlearning.method import Method
from mu.unlearning.plan import Plan
from mu.unlearning.training_config import TrainingKeys


def plan_of(recipe: Recipe, *, examined: bool = False, timing: bool | None = True) -> ForgetPlan:
    """The plan of what is left to do.

    Args:
        examined: also look for what a stage would fail of after it has begun, as `--dry_run` does.
        timing: load the model, and time one step of each kind; None: where that takes seconds, and not minutes.

    Raises:
        ConfigError: a path is missing.
        MuError: the model cannot be loaded.
    """
    plans: dict[str, Plan] = {}
    for name, method in _stages(recipe).items():
        if finished(recipe, name) is None:
            plan = method.make_plan()
            plans[name] = plan.examined() if examined else plan
    if any(plan.problems for plan in plans.values()):
        return ForgetPlan(recipe, (), plans)
    if timing is None:
        timing = not any(
            plan.device == "cpu" and plan.weights["total"] >= SLOW_ON_A_CPU for plan in plans.values()
        )
    once = timed(recipe.train, recipe.mask, recipe.scores) if timing else UNTIMED
    return ForgetPlan(recipe, tuple(_work(recipe, plans, once)), plans)


def _stages(recipe: Recipe) -> dict[str, Method[Any]]:
    """Stage -> what does it; the training as it can be planned before there is a mask."""
    train = recipe.train
    if isinstance(train, ESDConfig):
        return {"train": ESDAlgorithm(train)}
    if isinstance(train, UCEConfig):
        return {"train": UCEAlgorithm(train)}
    if recipe.mask is None:
        return {"train": SaliencyUnlearningAlgorithm(train)}
    # A mask of the same size stands in for the one that is not there yet.
    fraction = train.threshold or max(recipe.mask.thresholds)
    planned = override(train, masking="random", random_fraction=fraction, threshold=None, mask_path=None)
    return {"mask": MaskingAlgorithm(recipe.mask), "train": SaliencyUnlearningAlgorithm(planned)}


def _work(recipe: Recipe, plans: Mapping[str, Plan], once: Timed) -> Iterator[Work]:
    """The stages that are left, a training that was stopped from where it goes on."""
    train, scores = recipe.train, recipe.scores
    drawn = once.drawing(1, steps=train.sample_steps, precision=train.sample_precision)

    # 1. Images.
    if "train" in plans and (images := plans["train"].images):
        forget, retain, count = (images[part] for part in ("forget", "retain", "to_sample"))
        does = f"{forget:,} to forget, {retain:,} to keep: {count:,} to draw"
        yield Work("images", does, count * drawn + (forget + retain) * once.encoding)

    # 2. The mask.
    if "mask" in plans:
        steps = plans["mask"].steps
        yield Work("mask", f"{steps:,} batches", once.loading + steps * once.mask_batch)

    # 3. The training.
    if "train" in plans:
        steps, does = plans["train"].steps, "one equation"
        if isinstance(train, TrainingKeys):
            done = steps_done(train)
            does = f"{steps - done:,} of {steps:,} steps are left" if done else f"{steps:,} steps"
            steps -= done
        yield Work("training", does, once.loading + steps * once.training_step)

    # 4. Pictures of the model before and of the written file.
    if scores is None:
        count = 2 * len(SEEDS) * sum(map(len, shown_prompts(recipe.prompts, recipe.kept)))
        seconds = count * drawn
        yield Work("pictures", f"{count:,} before and after", 2 * once.loading + seconds)
    else:
        every = 2 * len(STYLES) * len(OBJECTS) * len(scores.seeds)
        count = every - once.scored_before
        seconds = once.drawing(count, steps=scores.sample_steps, precision=scores.precision)
        yield Work(
            "scores", f"{every:,} pictures before and after: {count:,} to draw", 2 * once.loading + seconds
        )
