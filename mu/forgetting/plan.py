"""What a forgetting will write, and about how long it will take; nothing is made for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mu.algorithms.esd.algorithm import ESDAlgorithm
from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.uce.algorithm import UCEAlgorithm
from mu.algorithms.uce.configs import UCEConfig
from mu.config import override
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.forgetting.pictures import SEEDS, shown_prompts
from mu.forgetting.recipes import Recipe
from mu.forgetting.timing import Timed, timed
from mu.run_folder import RESULT, is_finished
from mu.unlearning.method import Method
from mu.unlearning.plan import Plan, size
from mu.unlearning.training_config import TrainingKeys

RESULT_NAME = "result.json"
"""What is written last into the result's folder."""


@dataclass(frozen=True)
class Work:
    """One stage: what it does, and about how long that takes."""

    stage: str
    does: str
    seconds: float


@dataclass(frozen=True)
class ForgetPlan:
    """What will be done and written. `str` of it is what is shown before anything begins."""

    recipe: Recipe
    work: tuple[Work, ...]
    plans: Mapping[str, Plan]
    """Stage -> its own plan; of stages that are done, none."""

    @property
    def exit_code(self) -> int:
        """Of the command that does this, see `Plan.exit_code`."""
        return max((plan.exit_code for plan in self.plans.values()), default=0)

    @property
    def seconds(self) -> float:
        return sum(work.seconds for work in self.work)

    def require(self) -> ForgetPlan:
        """Raises what stops a stage before it begins; else gives the plan itself."""
        for plan in self.plans.values():
            plan.require()
        return self

    def as_json(self) -> dict[str, object]:
        """What `--dry_run --json` prints."""
        return {
            "can_run": self.exit_code == 0,
            "asked": vars(self.recipe.asked),
            "prompts": self.recipe.prompts,
            "kept": self.recipe.kept,
            "notes": self.recipe.notes,
            "folder": self.recipe.folder,
            "seconds": {work.stage: work.seconds for work in self.work},
            "plans": {stage: plan.as_json() for stage, plan in self.plans.items()},
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan_of(recipe: Recipe, *, examined: bool = False) -> ForgetPlan:
    """The plan of what is left to do. Loads the model, and times one step of each kind, where anything is left.

    Args:
        examined: also look for what a stage would fail of after it has begun, as `--dry_run` does.

    Raises:
        ConfigError: a path is missing.
        MuError: the model cannot be loaded.
    """
    plans: dict[str, Plan] = {}
    for name, method in _stages(recipe).items():
        if finished(recipe, name) is None:
            plan = method.make_plan()
            plans[name] = plan.examined() if examined else plan
    done = finished(recipe, "train") is not None and (recipe.folder / RESULT_NAME).is_file()
    if done or any(plan.problems for plan in plans.values()):
        return ForgetPlan(recipe, (), plans)
    precisions = () if recipe.scores is None else (recipe.scores.precision,)
    once = timed(recipe.train, recipe.mask, precisions)
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


def finished(recipe: Recipe, stage: str) -> Path | None:
    """The folder of the run in which a stage was done, and whose files are still there; None: there is none."""
    for run in sorted((recipe.folder / stage).glob("*"), reverse=True):
        if is_finished(run):
            result = json.loads((run / RESULT).read_text(encoding="utf-8"))
            made = [result["checkpoint"]] if stage == "train" else result["masks"].values()
            if all(Path(path).exists() for path in made):
                return run
    return None


def _work(recipe: Recipe, plans: Mapping[str, Plan], once: Timed) -> Iterator[Work]:
    """The stages that are left; a training that goes on is counted from its beginning."""
    train, scores = recipe.train, recipe.scores
    drawn = once.drawing(1, steps=train.sample_steps, precision=train.sample_precision)
    if "train" in plans and (images := plans["train"].images):
        count = images["to_sample"]
        read = images["forget"] + images["retain"]
        yield Work("images", f"{count:,} to draw of {read:,}", count * drawn + read * once.encoding)
    if "mask" in plans:
        steps = plans["mask"].steps
        yield Work("mask", f"{steps:,} batches", once.loading + steps * once.mask_batch)
    if "train" in plans:
        steps = plans["train"].steps
        does = f"{steps:,} steps" if isinstance(train, TrainingKeys) else "one equation"
        yield Work("training", does, once.loading + steps * once.training_step)
    if scores is not None:
        count = 2 * len(STYLES) * len(OBJECTS) * len(scores.seeds)
        seconds = once.drawing(count, steps=scores.sample_steps, precision=scores.precision)
        yield Work("scores", f"{count:,} pictures, before and after", 2 * once.loading + seconds)
    else:
        count = 2 * len(SEEDS) * sum(map(len, shown_prompts(recipe.prompts, recipe.kept)))
        yield Work("pictures", f"{count:,} pictures, before and after", 2 * once.loading + count * drawn)


def _lines(plan: ForgetPlan) -> Iterator[str]:
    recipe, asked = plan.recipe, plan.recipe.asked
    yield f"To forget  {named(recipe)}"
    if asked.kind != "prompt":
        yield f"           in {len(recipe.prompts)} prompts, such as {recipe.prompts[0]!r}"
    yield f"Instead    {', '.join(dict.fromkeys(map(repr, asked.instead)))}"
    yield f"To keep    {recipe.kept_in_words}"
    yield f"Method     {recipe.method}"
    for described in dict.fromkeys(each.checkpoint for each in plan.plans.values()):
        yield f"Model      {described}"
    for device in dict.fromkeys(each.device for each in plan.plans.values()):
        yield f"Device     {device}"
    yield f"Folder     {recipe.folder}"
    for note in recipe.notes:
        yield f"Note       {note}"
    for each in plan.plans.values():
        for warning in each.warnings:
            yield f"Warning    {warning}"
    problems = [problem for each in plan.plans.values() for problem in (*each.problems, *each.later_problems)]
    for problem in problems:
        yield f"Problem    {problem}"
    if problems:
        yield "This cannot be carried out."
        return
    if not plan.work:
        yield "All of it is done already."
        return
    yield ""
    yield f"It will take about {_about(plan.seconds)}, by the time that one step takes here:"
    for work in plan.work:
        yield f"  {work.stage:<9}{work.does:<36}{_about(work.seconds)}"
    files = {file.what: file for each in plan.plans.values() for file in each.files if file.bytes}
    yield f"It will write about {size(sum(file.bytes for file in files.values()))}:"
    width = max(map(len, files), default=0)
    for file in files.values():
        yield f"  {file.what:<{width}}  {size(file.bytes):>8}  in {file.folder}"


def named(recipe: Recipe) -> str:
    """`the style Noto`, `the prompts 'x' and 'y'`."""
    asked = recipe.asked
    names = [repr(name) if asked.kind == "prompt" else name.replace("_", " ") for name in asked.names]
    joined = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"the {asked.kind}{'s' if len(names) > 1 else ''} {joined}"


def _about(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 10 min`."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
