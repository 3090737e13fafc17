"""A plan of a run: what it reads and writes, what it takes, and what stands in its way."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mu.config import ConfigError
from mu.errors import MuError


@dataclass(frozen=True, kw_only=True)
class PlannedFiles:
    """Files of one kind."""

    what: str
    """Name or pattern, as it will stand in `folder`."""
    folder: Path
    key: str
    """The key of the config that leads to `folder`."""
    count: int
    bytes: int
    """Of all of them together."""
    how: str = "exactly"
    """How well the size is known: exactly (to 1 %), about, or at most (what is there already is not made again)."""
    certain: bool = True
    """Whether all of it will be on the disk at once if the run goes as planned."""

    @property
    def needed(self) -> bool:
        """Whether a run that lacks the room for this must fail: all of it will be there, and of just this size."""
        return self.certain and self.how == "exactly"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do. Numbers are bytes and seconds."""

    stage: str
    """mask or training."""
    device: str
    processes: int
    """That share the work; memory is that of each of them."""
    checkpoint: str
    """What it is: kind, weights, types."""
    images: Mapping[str, int]
    """forget, retain: images that are read; to_sample: those that are sampled first."""
    steps: int
    """Training steps, or batches of the mask."""
    weights: Mapping[str, int]
    """Of the UNet: total; train_method, those that it covers; selected, those that will be marked, or will move."""
    files: Sequence[PlannedFiles]
    compute: str
    """Precision, and what is computed again."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Phase of the run -> bytes of this machine's memory that the process holds at most in it.

    Empty before `examined`.
    """
    device_memory: Mapping[str, int] = field(default_factory=dict)
    """The same of the GPU's memory; empty on the CPU."""
    memory_free: int = 0
    """What the process could still take, of this machine's memory, beside what it holds already (`memory_held`)."""
    memory_held: int = 0
    device_memory_free: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase -> seconds; empty before `examined`."""
    examine: Callable[[], Plan] | None = None
    """Gives the plan with what no run needs to know."""
    problems: Sequence[MuError] = ()
    """What the run would fail of."""
    warnings: Sequence[str] = ()

    @property
    def peak_memory_bytes(self) -> int:
        """Of the process, in this machine's memory."""
        return max(self.memory.values(), default=0)

    @property
    def peak_device_memory_bytes(self) -> int:
        """Of the GPU's memory; 0 on the CPU."""
        return max(self.device_memory.values(), default=0)

    @property
    def can_run(self) -> bool:
        return not self.problems

    def examined(self) -> Plan:
        """The plan with what takes a moment to find out, and does not stop a run before its model loads.

        That is its memory, its time, and whether the mask is of this very checkpoint.
        """
        return self if self.examine is None else self.examine()

    def require(self) -> Plan:
        """Raises the only problem, or a ConfigError with all of them; else gives the plan itself."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            raise ConfigError([mistake for problem in self.problems for mistake in mistakes_of(problem)])
        return self

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def say_warnings(warnings: Sequence[str], logger: logging.Logger) -> None:
    """Log each of them."""
    for warning in warnings:
        logger.warning("%s", warning)


def mistakes_of(problem: MuError) -> tuple[str, ...]:
    """A problem as one message, or several."""
    return problem.mistakes if isinstance(problem, ConfigError) else (str(problem),)


def disk_problems(files: Sequence[PlannedFiles]) -> tuple[list[str], list[str]]:
    """(what does not fit on its disk for certain, what may not fit), each beginning with the keys.

    Only what is `needed` stops a run: of the rest, some may be there already, come out smaller, or never be written.
    Folders on one disk share what is free there.
    """
    problems, warnings = [], []
    disks: dict[int, list[PlannedFiles]] = {}
    for planned in files:
        disks.setdefault(os.stat(_existing(planned.folder)).st_dev, []).append(planned)
    for there in disks.values():
        free = shutil.disk_usage(_existing(there[0].folder)).free
        keys = ", ".join(dict.fromkeys(planned.key for planned in there))
        needed = sum(planned.bytes for planned in there if planned.needed)
        every = sum(planned.bytes for planned in there)
        room = f"{size(free)} are free there: make room, or choose folders on another disk"
        if needed > free:
            problems.append(f"{keys}: this run writes {size(needed)}; {room}")
        elif every > free:
            optional = ", ".join(planned.what for planned in there if not planned.needed)
            warnings.append(f"{keys}: with {optional}, {size(every)} may be needed; {room}")
    return problems, warnings


def size(count: float) -> str:
    """`5.2 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """`1 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _lines(plan: Plan) -> Iterator[str]:
    several = f", {plan.processes} processes" if plan.processes > 1 else ""
    yield f"# plan: {plan.stage} on {plan.device}{several}"
    yield f"checkpoint  {plan.checkpoint}"
    read = ", ".join(f"{count:,} to {part}" for part, count in plan.images.items() if part != "to_sample")
    sampled = plan.images.get("to_sample", 0)
    yield f"images      {read}" + (f"; of them to be sampled first: {sampled:,}" if sampled else "")
    yield f"{'batches' if plan.stage == 'mask' else 'steps':<12}{plan.steps:,}"
    yield "weights     " + ", ".join(
        f"{name.replace('_', ' ')} {count:,}" for name, count in plan.weights.items()
    )
    yield f"computing   {plan.compute}"
    yield "files"
    signs = {"exactly": "", "about": "about ", "at most": "at most "}
    width = max((len(planned.what) for planned in plan.files), default=0)
    for planned in plan.files:
        many = f"{planned.count:,} files, " if planned.count > 1 else ""
        some = "" if planned.certain else ", if it comes to that"
        yield f"  {planned.what:<{width}}  {many}{signs[planned.how]}{size(planned.bytes)} in {planned.folder}{some}"
    each = " of each process" if plan.processes > 1 else ""
    if plan.memory:
        yield from _table(f"memory{each}", plan.memory, plan.memory_held + plan.memory_free)
    if plan.device_memory:
        yield from _table("memory of the GPU", plan.device_memory, plan.device_memory_free)
    if plan.seconds:
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in plan.seconds.items())
        yield f"time        about {duration(sum(plan.seconds.values()))}: {parts}"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for problem in plan.problems:
        for mistake in mistakes_of(problem):
            yield f"problem: {mistake}"
    yield "this plan can be carried out" if plan.can_run else "this plan cannot be carried out"


def _table(title: str, phases: Mapping[str, int], available: int) -> Iterator[str]:
    highest = max(phases, key=lambda name: phases[name])
    yield f"{title}: at most {size(phases[highest])} ({highest}), of {size(available)} that there are"
    yield "  " + ", ".join(f"{name} {size(count)}" for name, count in phases.items())


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
