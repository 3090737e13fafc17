"""The plan of a run: what it will read and write, and what stands in its way.

A run and `--dry_run` come to it by one function of the method, which gathers it with `mu.unlearning.inspection`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mu.config import ConfigError
from mu.datasets.index import ForgetRetain
from mu.errors import MuError


@dataclass(frozen=True, kw_only=True)
class PlannedFiles:
    """Files of one kind."""

    what: str
    """Name or pattern, as it will stand in `folder`."""
    folder: Path
    key: str
    """The key of the config that leads to `folder`."""
    bytes: int
    """About, of all of them together."""
    certain: bool = True
    """Whether all of it will be on the disk at once; else so much at most, and it stops no run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do. Sizes are in bytes."""

    stage: str
    """mask, training, ...: what is planned."""
    device: str
    processes: int
    """That share the work."""
    checkpoint: str
    """What it is: kind, weights, types."""
    images: Mapping[str, int]
    """forget, retain: images that are read; to_sample: those that are sampled first. Empty where there are none."""
    steps: int
    """Training steps, or batches of the mask; 0 where nothing is trained."""
    weights: Mapping[str, int]
    """Of the UNet: total; selected, those that will be marked, or may move; and what else the method counts."""
    files: Sequence[PlannedFiles]
    inputs: Mapping[str, Path]
    """Key of the config -> the file that was found for it, such as the mask."""
    problems: Sequence[MuError] = ()
    """What stops the run before it begins."""
    later_problems: Sequence[MuError] = ()
    """What would stop it after it has begun, in values that a run reads only then; empty before `examined`."""
    warnings: Sequence[str] = ()
    rows: ForgetRetain | None = None
    """All images to forget and to retain; None where they are sampled, or something is wrong."""
    unet_fingerprint: str | None = None
    """Of the UNet as it is in the checkpoint, where the method had to know it."""
    examine: Callable[[], Sequence[MuError]] | None = None
    """Gives `later_problems`."""

    @property
    def can_run(self) -> bool:
        return not self.problems and not self.later_problems

    @property
    def exit_code(self) -> int:
        """Of the command that does this: 2 where it stops before anything has begun, 1 later, 0 not at all."""
        return 2 if self.problems else 1 if self.later_problems else 0

    def examined(self) -> Plan:
        """The plan with all that a run would refuse: also what it sees only when it reads all weights and pixels.

        That takes as long as reading them, so a run does not do it beforehand.
        """
        if self.examine is None:
            return self
        # Of a checkpoint or data that are wrong as it is, the values tell no more.
        later = () if self.problems else self.examine()
        return replace(self, later_problems=later, examine=None)

    def require(self) -> Plan:
        """Raises the only problem, or a ConfigError with all of them; else gives the plan itself.

        Nothing has begun then: the error's `exit_code` is 2, as of any mistake in the settings.
        """
        if len(self.problems) == 1:
            (problem,) = self.problems
            problem.exit_code = 2
            raise problem
        if self.problems:
            raise ConfigError([mistake for problem in self.problems for mistake in mistakes_of(problem)])
        return self

    def say_warnings(self, logger: logging.Logger) -> None:
        """Log each of them."""
        for warning in self.warnings:
            logger.warning("%s", warning)

    def as_json(self) -> dict[str, object]:
        """What `--dry_run --json` prints."""
        problems = [
            mistake for each in (*self.problems, *self.later_problems) for mistake in mistakes_of(each)
        ]
        return {
            "can_run": self.can_run,
            "stage": self.stage,
            "device": self.device,
            "processes": self.processes,
            "checkpoint": self.checkpoint,
            "inputs": self.inputs,
            "images": self.images,
            "steps": self.steps,
            "weights": self.weights,
            "files": [vars(planned) for planned in self.files],
            "warnings": self.warnings,
            "problems": problems,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def disk_problems(files: Sequence[PlannedFiles]) -> tuple[list[str], list[str]]:
    """(what does not fit on its disk, what may not fit), each beginning with the keys.

    Only what is `certain` stops a run: of the rest, some may be there already, come out smaller, or never be written.
    Folders on one disk share what is free there.
    """
    problems, warnings = [], []
    disks: dict[int, list[PlannedFiles]] = {}
    for planned in files:
        disks.setdefault(os.stat(_existing(planned.folder)).st_dev, []).append(planned)
    for there in disks.values():
        free = shutil.disk_usage(_existing(there[0].folder)).free
        keys = ", ".join(dict.fromkeys(planned.key for planned in there))
        certain = sum(planned.bytes for planned in there if planned.certain)
        every = sum(planned.bytes for planned in there)
        room = f"{size(free)} are free there: make room, or choose folders on another disk"
        if certain > free:
            problems.append(f"{keys}: this run writes {size(certain)}; {room}")
        elif every > free:
            optional = ", ".join(planned.what for planned in there if not planned.certain)
            warnings.append(f"{keys}: with {optional}, {size(every)} may be needed; {room}")
    return problems, warnings


def size(count: float) -> str:
    """`5.2 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def _lines(plan: Plan) -> Iterator[str]:
    several = f", {plan.processes} processes" if plan.processes > 1 else ""
    yield f"# plan: {plan.stage} on {plan.device}{several}"
    yield f"checkpoint  {plan.checkpoint}"
    for key, path in plan.inputs.items():
        yield f"{key:<12}{path}"
    if plan.images:
        counts = {part: count for part, count in plan.images.items() if count and part != "to_sample"}
        read = ", ".join(f"{count:,} to {part}" for part, count in counts.items())
        sampled = plan.images.get("to_sample", 0)
        yield f"images      {read}" + (f"; of them to be sampled first: {sampled:,}" if sampled else "")
    if plan.steps:
        yield f"{'batches' if plan.stage == 'mask' else 'steps':<12}{plan.steps:,}"
    weights = (f"{name.replace('_', ' ')} {count:,}" for name, count in plan.weights.items())
    yield f"weights     {', '.join(weights)}"
    yield "files"
    width = max((len(planned.what) for planned in plan.files), default=0)
    for planned in plan.files:
        sign = "about" if planned.certain else "at most"
        yield f"  {planned.what:<{width}}  {sign} {size(planned.bytes)} in {planned.folder}"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for problem in (*plan.problems, *plan.later_problems):
        for mistake in mistakes_of(problem):
            yield f"problem: {mistake}"
    yield "this plan can be carried out" if plan.can_run else "this plan cannot be carried out"


def mistakes_of(problem: MuError) -> tuple[str, ...]:
    """A problem as one message, or several."""
    return problem.mistakes if isinstance(problem, ConfigError) else (str(problem),)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
