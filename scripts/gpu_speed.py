"""How fast, as parts of scripts/gpu_check.py: the benchmark's arms, the whole job, layouts, compile, a profile."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gpu_model import benchmark_spec
from gpu_parts import Record, Spec

from benchmarks import stopwatch
from benchmarks.stopwatch_setup import (
    Result,
    begin_training,
    build_model,
    make_arm,
    read_examples,
    repeated,
    timed,
)
from benchmarks.stopwatch_spec import Spec as BenchmarkSpec

GOAL_JOB_S = 30.0
GOAL_BYTES = {"xattn": 8e9, "full": 14e9}
# Most valuable first. What plain takes for the threshold is known: two argsorts on the CPU, minutes for SD v1.
_MEASURED = (
    ("step", "ours"), ("step", "careful"), ("mask", "ours"), ("mask", "careful"), ("threshold", "ours"),
    ("step", "plain"), ("mask", "plain"), ("threshold", "careful"),
)  # fmt: skip


def arms(spec: Spec, record: Record) -> None:
    """The benchmark's parts of the three arms, each in a process of its own."""
    bench = benchmark_spec(spec)
    report: Result = {
        "device": _of_device(spec),
        "arms": {arm: {} for arm in stopwatch.ARMS},
    }
    for part, arm in _MEASURED:
        result = _measured(replace(bench, part=part, arm=arm), limit_s=120)
        report["arms"][arm][part] = result
        report |= stopwatch.conclusions(report)
        rate = report["achieved"][arm].get(part)
        share = f", {rate['tflops']:.0f} TFLOP/s, {rate['of_bf16']:.0%} of bf16" if rate else ""
        record.add(f"{part:9} {arm:7} {stopwatch.described(result)}{share}", **report)
    for name, numbers in report["ratios"].items():
        chosen = [f"{key} {value:.2f}" for key, value in numbers.items() if not key.endswith("host_bytes")]
        record.add(f"{name}: {', '.join(chosen)}")


def job(spec: Spec, record: Record) -> None:
    """Mask and training as a user's two commands: load, encode, compute, write, compare; xattn and full."""
    bench = benchmark_spec(spec)
    for method in ("xattn", "full"):
        shutil.rmtree(Path(spec.folder) / "job-ours", ignore_errors=True)
        stages = {}
        for stage in ("job_mask", "job_train"):
            result = stages[stage] = _measured(
                replace(bench, train_method=method, part=stage, arm="ours"), limit_s=120
            )
            record.add(f"{method:6} {stage:9} {stopwatch.described(result)}", **{f"{stage}_{method}": result})
            if result["status"] != "measured":
                record.check(f"the whole job runs, {method}", False)
                break
        else:
            seconds = sum(result["seconds"] for result in stages.values())
            peak = max(map(stopwatch.peak_bytes, stages.values()))
            record.add(
                f"{method:6} whole job {seconds:9.3f} s {peak / 1e9:6.2f} GB", **{f"job_{method}_s": seconds}
            )
            if not spec.toy:
                record.check(f"{method}: at most {GOAL_JOB_S:.0f} s a concept", seconds <= GOAL_JOB_S)
                goal = GOAL_BYTES[method]
                record.check(f"{method}: at most {goal / 1e9:.0f} GB", peak <= goal)
    shutil.rmtree(Path(spec.folder) / "job-ours", ignore_errors=True)


def channels_last(spec: Spec, record: Record) -> None:
    """Our step and mask with the channels together in memory, and not."""
    seconds: dict[str, dict[bool, float]] = {"step": {}, "mask": {}}
    for chosen in (True, False):
        with _training(spec, channels_last=chosen) as (step, bench, _):
            seconds["step"][chosen] = repeated(step, bench)["seconds"]
        seconds["mask"][chosen] = _mask_seconds(spec, chosen)
        record.add(
            f"channels_last {chosen}: step {seconds['step'][chosen]:.3f} s, mask {seconds['mask'][chosen]:.3f} s",
            **{f"channels_last_{chosen}": {name: both[chosen] for name, both in seconds.items()}},
        )
    gains = {name: both[False] / both[True] for name, both in seconds.items()}
    record.add(f"gain: step {gains['step']:.2f}, mask {gains['mask']:.2f} times as fast", gains=gains)


def compile(spec: Spec, record: Record) -> None:
    """Our step translated by torch.compile, and not: what the first one takes, and the later ones."""
    numbers = {}
    for chosen in (False, True):
        with _training(spec, compile=chosen) as (step, bench, _):
            first, _ = timed(step, bench.device)
            numbers[chosen] = {"first_s": first, "step_s": repeated(step, bench)["seconds"]}
        record.add(
            f"compile {chosen}: first step {first:.1f} s, later ones {numbers[chosen]['step_s']:.3f} s",
            **{f"compile_{chosen}": numbers[chosen]},
        )
    gained = numbers[False]["step_s"] - numbers[True]["step_s"]
    cost = numbers[True]["first_s"] - numbers[False]["first_s"]
    record.add(f"it pays after {cost / gained:.0f} steps" if gained > 0 else "it does not pay")


def profile(spec: Spec, record: Record) -> None:
    """Five of our steps: how much is the optimizer, how often the CPU waits for the GPU, which kernels are large."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if spec.on_cuda else [])]
    with _training(spec) as (step, bench, arm):
        for _ in range(2):
            step()
        whole, _ = timed(lambda: [step() for _ in range(5)], bench.device)
        record.add(f"five steps {whole:.3f} s", five_steps_s=whole)
        optimizing = _seconds_of(arm.optimizer, step, bench.device)
        share = optimizing / whole
        record.add(f"optimizer: {optimizing:.3f} s of them, {share:.1%}", optimizer_share=share)
        if spec.on_cuda:
            places = _waits(step)
            record.add(f"the CPU waits for the GPU {sum(places.values())} times a step", waits=dict(places))
            for place, count in places.most_common(8):
                record.add(f"    {count} x {place}")
        with torch.profiler.profile(activities=kinds) as found:
            timed(lambda: [step() for _ in range(5)], bench.device)
    seconds = {event.key: (_own_seconds(event, spec), event.count) for event in found.key_averages()}
    total = sum(own for own, _ in seconds.values()) or 1.0
    largest = sorted(seconds.items(), key=lambda one: -one[1][0])[:12]
    record.add(f"{total:.3f} s in kernels, the largest:", kernels_s=total, largest=dict(largest))
    for name, (own, count) in largest:
        record.add(f"    {own / total:6.1%} {count:6} x {name[:90]}")


def _own_seconds(event: Any, spec: Spec) -> float:
    """Of a kernel on the GPU, or of an operation on the CPU without those that it calls; 0 for what is neither."""
    if not spec.on_cuda:
        return float(event.self_cpu_time_total) / 1e6
    if event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False):
        return 0.0
    return float(event.self_device_time_total) / 1e6


def _seconds_of(optimizer: torch.optim.Optimizer, step: Callable[[], None], device: str) -> float:
    """Of the optimizer in five steps."""
    spent = []
    update = optimizer.step

    def timed_update() -> None:
        spent.append(timed(update, device)[0])

    optimizer.step = timed_update  # type: ignore[method-assign,assignment]
    try:
        for _ in range(5):
            step()
    finally:
        del optimizer.step  # the class' own again
    return sum(spent)


def _waits(step: Callable[[], None]) -> Counter[str]:
    """Places in the code at which one step waits for the GPU -> how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [one for one in caught if "synchroniz" in str(one.message).lower()]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in told)


def _of_device(spec: Spec) -> Result:
    """What the part `device` measured."""
    found: Result = json.loads((Path(spec.folder) / "device.json").read_text(encoding="utf-8"))["measured"]
    return found


def _measured(one: BenchmarkSpec, *, limit_s: float) -> Result:
    """A measurement of the benchmark, with the seconds of its whole process."""
    started = time.monotonic()
    result = stopwatch.run_part(asdict(one), timeout_s=limit_s, memory_limit=None)
    return {**result, "process_s": time.monotonic() - started}


@contextmanager
def _training(spec: Spec, **computing: Any) -> Iterator[tuple[Callable[[], None], BenchmarkSpec, Any]]:
    """A function that makes our next training step under a random mask, what it computes, and our arm.

    Args:
        computing: fields of `Compute` with other values than ours.
    """
    bench = benchmark_spec(spec, arm="ours")
    arm: Any = make_arm(bench, build_model(bench))
    arm.compute = replace(arm.compute, **computing)
    step = begin_training(bench, arm)
    with arm.training:
        yield step, bench, arm


def _mask_seconds(spec: Spec, channels_last: bool) -> float:
    bench = benchmark_spec(spec, arm="ours")
    model = build_model(bench)
    arm: Any = make_arm(bench, model)
    arm.compute = replace(arm.compute, channels_last=channels_last)
    forget = read_examples(bench, "forget", model)
    arm.encode(forget)
    seconds: float = repeated(lambda: arm.saliency(forget.batches(bench.mask_batch_size)), bench)["seconds"]
    return seconds
