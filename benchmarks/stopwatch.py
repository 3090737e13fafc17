"""Time and memory of unlearning, by this library and by two other ways, all in one run (docs/results.md).

python -m benchmarks.stopwatch --scale emoji --device cpu         # writes benchmarks/speed_emoji_cpu.json
python -m benchmarks.stopwatch --scale sd1-narrow --device cpu --parts mask,threshold --arms plain,ours
python -m benchmarks.stopwatch --scale sd1 --device cuda --train_method xattn --output speed_sd1_cuda_xattn.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.stopwatch_spec import SCALES, Spec

# Nothing heavy is imported here: a process starts with the peak memory of the one that it comes from.

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("plain", "careful", "ours")
PARTS = ("mask", "threshold", "step", "job")
SUMS = {"mask_and_threshold": ("mask", "threshold"), "job": ("job_mask", "job_train")}
"""What consists of two measurements."""

_LOOK_S = 0.05
"""Seconds between two looks at the memory of a part."""

Result = dict[str, Any]


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is stopped too
    output = given.output or ROOT / "benchmarks" / f"speed_{given.scale}_{given.device}.json"
    with tempfile.TemporaryDirectory(dir=given.work_dir, prefix="benchmark-") as name:
        spec = spec_of(given, Path(name))
        limit = None
        if given.device == "cpu":
            limit = _memory_limit() if given.memory_limit_gb is None else int(given.memory_limit_gb * 1e9)
        head = {"scale": given.scale, "settings": {**settings(spec), "memory_limit": limit}, **machine()}

        def run(part: str, arm: str | None) -> Result:
            one = replace(spec, part=part, arm=arm)
            result = run_part(asdict(one), timeout_s=given.timeout_s, memory_limit=limit)
            if part == "job_train":  # room for the next arm's
                shutil.rmtree(Path(name) / f"job-{arm}", ignore_errors=True)
            return result

        def save(report: Result) -> None:
            output.parent.mkdir(parents=True, exist_ok=True)
            beside = output.with_suffix(".tmp")
            beside.write_text(json.dumps({**head, **report}, indent=2) + "\n", encoding="utf-8")
            beside.replace(output)

        report = benchmark(run, arms=given.arms, parts=given.parts, save=save)
    print(output)
    statuses = [result["status"] for results in report["arms"].values() for result in results.values()]
    return int("failed" in statuses)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # The scale "tiny", which the tests use, is not named.
    parser.add_argument("--scale", required=True, choices=SCALES, metavar="{emoji,sd1,sd1-narrow}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: its device 0")
    parser.add_argument("--parts", type=_names(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--arms", type=_names(ARMS), default=ARMS, help=f"some of {','.join(ARMS)}")
    parser.add_argument("--output", type=Path, help="default: benchmarks/speed_<scale>_<device>.json")
    parser.add_argument(
        "--work_dir", type=Path, help="for models and images, three times the checkpoint's size"
    )
    whole = {"image_size": "px", "images": "to forget, and as many to retain", "epochs": "of the whole job"}
    whole |= dict.fromkeys(("mask_batch_size", "batch_size", "retain_batch_size"), "images")
    whole |= {"repeats": "runs that count, after one that does not", "threads": "default: torch's own"}
    for name, text in whole.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--width", type=int, help="model_channels of the UNet; SD v1 has 320")
    parser.add_argument("--train_method", help="which weights move, as in the config of training")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                        help="of careful and ours; weights are fp32 in all arms")  # fmt: skip
    parser.add_argument("--budget_s", type=float,
                        help="of one measurement, after which no repeat begins; default: 20")  # fmt: skip
    parser.add_argument("--timeout_s", type=float, default=3600.0, help="of one part of one arm")
    parser.add_argument("--memory_limit_gb", type=float, help="on the CPU; default: what is free, less 1 GiB")
    return parser


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
        return [name for name in allowed if name in chosen]

    return names


def spec_of(given: argparse.Namespace, folder: Path) -> Spec:
    """What the flags ask for; `part` and `arm` are still open."""
    fields = {**SCALES[given.scale][given.device], "folder": str(folder)}
    fields |= {key: value for key, value in vars(given).items() if hasattr(Spec, key) and value is not None}
    if given.width is not None:
        fields["overrides"] = {**fields.get("overrides", {}), "model_channels": given.width}
    fields["device"] = "cpu" if given.device == "cpu" else "cuda:0"
    return Spec(**fields, autocast=given.precision == "bf16")


def settings(spec: Spec) -> Result:
    """What all parts and arms have in common."""
    return {key: value for key, value in asdict(spec).items() if key not in ("part", "arm", "folder")}


def machine() -> Result:
    """What measures: processor, cores, memory, and which state of this repository."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": kilobytes("/proc/meminfo").get("MemTotal"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def kilobytes(path: str) -> dict[str, int]:
    """The bytes that a file of Linux gives in kB, by name; nothing where there is no such file."""
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}


def _memory_limit() -> int | None:
    """What is free now, less 1 GiB for the rest of the machine; None where the system does not say."""
    free = kilobytes("/proc/meminfo").get("MemAvailable")
    if free is None:
        return None
    cgroup = Path("/sys/fs/cgroup/memory.max")
    allowed = cgroup.read_text().strip() if cgroup.exists() else "max"
    return min(free, int(allowed) if allowed.isdigit() else free) - 2**30


# ---- one part, in a process of its own


def run_part(spec: Result, *, timeout_s: float, memory_limit: int | None) -> Result:
    """One part in a fresh process. What stops it is a result too: `status` says what happened.

    Args:
        spec: fields of `Spec`.
        memory_limit: bytes of memory that is not a copy of a file; a process that takes more is stopped, before a full
            machine would. None: no limit.
    """
    spec_path, result_path = (Path(spec["folder"]) / name for name in ("spec.json", "result.json"))
    spec_path.write_text(json.dumps(spec), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    script = Path(__file__).with_name("stopwatch_parts.py")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started, largest, stopped = time.monotonic(), 0, None
    with subprocess.Popen(
        [sys.executable, str(script), str(spec_path), str(result_path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=_LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    # Memory that is no copy of a file, which the system could drop; where the system says it.
                    largest = max(largest, kilobytes(f"/proc/{process.pid}/status").get("RssAnon", 0))
                if memory_limit and largest > memory_limit:
                    stopped = {"status": "out of memory", "message": f"more than {memory_limit / 1e9:.1f} GB"}
                elif time.monotonic() - started > timeout_s:
                    stopped = {"status": "timed out", "message": f"stopped after {timeout_s:g} s"}
                if stopped:
                    process.kill()
        except BaseException:
            process.kill()
            raise
    if stopped:
        return stopped
    if process.returncode == -signal.SIGKILL or "bad_alloc" in errors[-2000:]:
        return {"status": "out of memory", "message": f"exit code {process.returncode}"}
    if process.returncode or not result_path.exists():
        last = (errors.strip().splitlines() or ["no message"])[-1]
        print(errors[-4000:], file=sys.stderr)
        return {"status": "failed", "message": f"exit code {process.returncode}: {last}"}
    result: Result = json.loads(result_path.read_text(encoding="utf-8"))
    if largest:
        result["peak"]["anonymous_bytes"] = largest
    return result


# ---- all parts, and what follows from them


def benchmark(
    run: Callable[[str, str | None], Result],
    *,
    arms: Sequence[str],
    parts: Sequence[str],
    save: Callable[[Result], None],
) -> Result:
    """All parts of all arms, arm after arm within a part; `save` is given what there is after each.

    Args:
        run: (part, arm) -> its result, see `run_part`.
    """
    stages = {part: SUMS["job"] if part == "job" else (part,) for part in parts}
    total = 2 + len(arms) * sum(map(len, stages.values()))
    started, done = time.monotonic(), 0

    def measured(part: str, arm: str | None = None) -> Result:
        nonlocal done
        done += 1
        print(f"[{done:2}/{total}] {part:9} {arm or '':7} ", end="", flush=True)
        begun = time.monotonic()
        result = run(part, arm)
        now = time.monotonic()
        print(f"{described(result)}  [{now - begun:.0f} s, {now - started:.0f} s in all]", flush=True)
        if arm is None and result["status"] != "measured":
            raise SystemExit(f"nothing can be measured: {result.get('message')}")
        return result

    report: Result = {
        "device": measured("device"),
        "model": measured("prepare"),
        "arms": {arm: {} for arm in arms},
    }
    for part in parts:
        for arm in arms:
            for stage in stages[part]:
                result = report["arms"][arm][stage] = measured(stage, arm)
                if result["status"] != "measured":
                    break  # without a mask nothing can be trained
            report |= conclusions(report)
            save(report)
    return report


def described(result: Result) -> str:
    """One line for whoever waits."""
    if result["status"] != "measured":
        return f"{result['status']}: {result.get('message', '')}"
    seconds = f"{result['seconds']:9.3f} s" if "seconds" in result else " " * 11
    return f"{seconds} {peak_bytes(result) / 1e9:6.2f} GB"


def peak_bytes(result: Result) -> int:
    """Of the GPU's memory; or of this machine's, where possible without copies of files, which take no room."""
    peak = result["peak"]
    return int(peak.get("device_bytes", peak.get("anonymous_bytes", peak["host_bytes"])))


def conclusions(report: Result) -> Result:
    """What follows from the results so far.

    `achieved`: arm -> part -> TFLOP/s of the counted operations, and their shares of the measured matmul rates.
    `summary`: arm -> seconds and bytes, less is better; those not measured are absent.
    `ratios`: `plain/ours` and `careful/ours` -> how many times as much time or memory the other arm takes.
    """
    measured = {
        arm: {stage: result for stage, result in results.items() if result["status"] == "measured"}
        for arm, results in report["arms"].items()
    }
    rates, flops = report["device"]["matmul"], report["device"]["flops"]
    achieved: Result = {arm: {} for arm in measured}
    for arm, results in measured.items():
        for part, count in (("mask", flops["image_gradient"]), ("step", flops["training_step"])):
            if part in results:
                images = results[part]["images"] if part == "mask" else 1
                rate = count * images / results[part]["seconds"] / 1e12
                shares = {f"of_{kind}": rate / rates[f"{kind}_tflops"] for kind in ("bf16", "fp32")}
                achieved[arm][part] = {"tflops": rate, **shares}
    summaries = {arm: _summary(results) for arm, results in measured.items()}
    ours = summaries.get("ours", {})
    ratios = {
        f"{arm}/ours": {key: value / ours[key] for key, value in numbers.items() if ours.get(key)}
        for arm, numbers in summaries.items()
        if arm != "ours"
    }
    return {"achieved": achieved, "summary": summaries, "ratios": ratios}


def _summary(results: dict[str, Result]) -> dict[str, float]:
    """The numbers of an arm that are compared."""
    numbers: dict[str, float] = {}
    for stage, result in results.items():
        numbers[f"{stage}_s"] = result["seconds"]
        numbers[f"{stage}_peak_bytes"] = peak_bytes(result)
        numbers[f"{stage}_host_bytes"] = result["peak"]["host_bytes"]
        numbers |= {
            key: result[key] for key in ("mask_bytes", "checkpoint_bytes", "patch_bytes") if key in result
        }
    if "mask" in results:
        numbers["mask_s"] += results["mask"]["encode_s"]  # plain encodes within the loop
    for whole, both in SUMS.items():
        if set(both) <= results.keys():
            numbers[f"{whole}_s"] = sum(numbers[f"{stage}_s"] for stage in both)
            for kind in ("peak_bytes", "host_bytes"):
                numbers[f"{whole}_{kind}"] = max(numbers[f"{stage}_{kind}"] for stage in both)
    return numbers


if __name__ == "__main__":
    raise SystemExit(main())
