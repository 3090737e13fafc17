"""The parts of scripts/gpu_check.py: what each one asks, how long it takes, and where it can run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

START_S = 15.0
"""Of a run's minutes, kept for the end: writing the last result, and the table."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question to a GPU, answered in a process of its own."""

    name: str
    what: str
    module: str
    """Script beside this one whose function `name` (without the number after `_at_`) answers it."""
    seconds: float
    """Expected on a data-centre GPU with SD v1; a part begins only if so much time is left."""
    limit_s: float
    """It is stopped after so many seconds, and what it had found is kept."""
    toy: bool = True
    """Whether it can run at toy size without CUDA."""
    needs_model: bool = True
    """Whether it reads the model that the part `model` makes."""


PARTS: Sequence[Part] = (
    Part(
        name="device",
        what="name, versions, matmul rates",
        module="gpu_model",
        seconds=15,
        limit_s=60,
        needs_model=False,
    ),
    Part(
        name="tests",
        what="the tests marked gpu",
        module="gpu_tests",
        seconds=75,
        limit_s=180,
        toy=False,
        needs_model=False,
    ),
    Part(
        name="model",
        what="SD v1's structure with random weights, made and written; images of noise",
        module="gpu_model",
        seconds=25,
        limit_s=120,
        needs_model=False,
    ),
    Part(
        name="arms",
        what="training step, mask and threshold by ours, careful and plain",
        module="gpu_speed",
        seconds=150,
        limit_s=300,
    ),
    Part(
        name="job",
        what="the whole job of 60 + 60 images at 512 px, xattn and full, with loading and writing",
        module="gpu_speed",
        seconds=120,
        limit_s=240,
    ),
    Part(
        name="threshold",
        what="the mask of all weights from their saliencies, against a stable sort",
        module="gpu_numbers",
        seconds=20,
        limit_s=60,
        needs_model=False,
    ),
    Part(
        name="saliency",
        what="fp32, TF32 and bf16-mixed against the CPU's fp32, guidance 7.5 and 0",
        module="gpu_numbers",
        seconds=60,
        limit_s=150,
    ),
    Part(
        name="same_bits",
        what="mask and training twice from one seed, with and without deterministic",
        module="gpu_runs",
        seconds=110,
        limit_s=240,
    ),
    Part(
        name="memory_at_8",
        what="training, generated, sample and evaluate on what is left of a card of 8 GB",
        module="gpu_memory",
        seconds=80,
        limit_s=180,
    ),
    Part(
        name="memory_at_16",
        what="the same, 16 GB",
        module="gpu_memory",
        seconds=80,
        limit_s=180,
        toy=False,
    ),
    Part(
        name="memory_at_12",
        what="the same, 12 GB",
        module="gpu_memory",
        seconds=80,
        limit_s=180,
        toy=False,
    ),
    Part(
        name="channels_last",
        what="training step and mask with channels_last on and off",
        module="gpu_speed",
        seconds=35,
        limit_s=90,
    ),
    Part(
        name="compile",
        what="training step with compile on",
        module="gpu_speed",
        seconds=90,
        limit_s=240,
        toy=False,
    ),
    Part(
        name="out_of_memory",
        what="memory that runs out in the middle of a step: the weights are right afterwards",
        module="gpu_runs",
        seconds=50,
        limit_s=120,
    ),
    Part(
        name="profile",
        what="five training steps: shares of time, waits for the GPU, the largest kernels",
        module="gpu_speed",
        seconds=30,
        limit_s=90,
    ),
)
"""The most valuable first."""


def names() -> list[str]:
    return [part.name for part in PARTS]


def asked_for(only: Collection[str]) -> list[Part]:
    """The parts of these names, all where there are none, with what they need."""
    wanted = [part for part in PARTS if not only or part.name in only]
    needed = {"device"} | ({"model"} if any(part.needs_model for part in wanted) else set())
    return [part for part in PARTS if part in wanted or part.name in needed]


def expected_s(part: Part, *, toy: bool) -> float:
    """Seconds that have to be left for a part to begin."""
    return min(part.seconds, 20.0) if toy else part.seconds


def fitting(parts: Sequence[Part], seconds: float, *, toy: bool = False) -> list[Part]:
    """Those that a run of so many seconds is going to reach, if each takes what is expected."""
    left, found = seconds - START_S, []
    for part in parts:
        if expected_s(part, toy=toy) <= left:
            left -= expected_s(part, toy=toy)
            found.append(part)
    return found
