"""What a forgetting will do and write, and in about how long, in words. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mu.console import duration, quoted
from mu.forgetting.answer import in_words
from mu.forgetting.recipes import Recipe
from mu.unlearning.find_checkpoint import PATCH_NAME
from mu.unlearning.plan import Plan, mistakes_of, size

PICTURE_NAME, REPORT_NAME = "before_after.png", "report.html"
"""What lies at the top of the result's folder, where one looks first."""
_WIDTH = len(f"train/*/{PATCH_NAME}")


@dataclass(frozen=True)
class Work:
    """One stage: what it does, and about how long that takes."""

    stage: str
    does: str
    seconds: float
    """NaN: it was not timed."""


@dataclass(frozen=True)
class ForgetPlan:
    """What is left to do, and what will be written. `str` of it is what is shown before anything begins."""

    recipe: Recipe
    work: tuple[Work, ...] = ()
    plans: Mapping[str, Plan] = field(default_factory=dict)
    """Stage -> its own plan; of stages that are done, none."""

    @property
    def exit_code(self) -> int:
        """Of the command that does this, see `Plan.exit_code`."""
        return max((plan.exit_code for plan in self.plans.values()), default=0)

    @property
    def seconds(self) -> float:
        """Of all that is left; NaN: it was not timed."""
        return sum(work.seconds for work in self.work)

    def require(self) -> ForgetPlan:
        """Raises what stops a stage before it begins; else gives the plan itself."""
        for plan in self.plans.values():
            plan.require()
        return self

    def as_json(self) -> dict[str, object]:
        """What `--dry_run --json` prints: all that the stages' own plans say too."""
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


def _lines(plan: ForgetPlan) -> Iterator[str]:
    recipe, asked, plans = plan.recipe, plan.recipe.asked, plan.plans.values()
    folder = quoted(recipe.folder)

    # 1. What is forgotten, what is kept, and by what.
    yield f"To forget  {in_words(recipe)}"
    if asked.kind != "prompt":
        yield f"           in {len(recipe.prompts)} prompts, such as {recipe.prompts[0]!r}"
    yield f"Instead    {', '.join(dict.fromkeys(map(repr, asked.instead)))}"
    yield f"To keep    {recipe.kept_in_words}"
    for note in recipe.notes:
        yield f"Note       {note}"
    yield f"Method     {recipe.method}"
    for described in dict.fromkeys(each.checkpoint for each in plans):
        yield f"Model      {described}"
    for device in dict.fromkeys(each.device for each in plans):
        yield f"Device     {device}"
    for warning in dict.fromkeys(warning for each in plans for warning in each.warnings):
        yield f"Warning    {warning}"
    problems = [problem for each in plans for problem in (*each.problems, *each.later_problems)]
    for mistake in dict.fromkeys(mistake for problem in problems for mistake in mistakes_of(problem)):
        yield f"Problem    {mistake}"
    if problems:
        yield "This cannot be carried out."
        return
    if not plan.work:
        yield f"All of it is done already, in {folder}"
        return

    # 2. What will be written: what one looks at. All files are in `as_json`.
    yield ""
    yield f"It will write, into {folder}:"
    for name, what in _most_important(plan):
        yield f"  {name:<{_WIDTH}}  {what}"
    drawn = {file.what: file for each in plans for file in each.files if file.key == "processed_dataset_dir"}
    if count := sum(file.bytes for file in drawn.values()):
        (shared, *_) = (quoted(file.folder) for file in drawn.values())
        yield f"and images and their latents, about {size(count)}, into {shared}, for this and other runs"
    if recipe.scores is not None:
        yield f"and the pictures that are scored, into {quoted(recipe.scores.output_dir)}"

    # 3. How long it will take.
    yield ""
    if math.isnan(plan.seconds):
        yield "How long it will take was not timed; --timing true times one step of each kind."
    else:
        yield f"It will take about {_about(plan.seconds)}, by the time that one step takes here:"
    for work in plan.work:
        yield f"  {work.stage:<9}{work.does:<48}{'' if math.isnan(work.seconds) else _about(work.seconds)}".rstrip()


def _most_important(plan: ForgetPlan) -> Iterator[tuple[str, str]]:
    """(path in the result's folder, what it is)."""
    yield PICTURE_NAME, "the same prompts and noise, before and after"
    yield REPORT_NAME, "numbers, curves and pictures, in one file"
    if (train := plan.plans.get("train")) is not None:
        model = next(file for file in train.files if file.certain)
        yield f"train/*/{model.what}", f"the model that has forgotten, {size(model.bytes)}"
        for patch in train.files:
            if patch.what == PATCH_NAME:
                yield f"train/*/{patch.what}", f"only what changed, at most {size(patch.bytes)}"


def _about(seconds: float) -> str:
    """A duration, no finer than it is known."""
    return duration(seconds if seconds < 99.5 else 60 * round(seconds / 60))
