"""Everything that only a GPU can answer, in one run: correctness, speed, memory (docs/results.md, "On a GPU").

python scripts/gpu_check.py --minutes 8                       # writes benchmarks/gpu_<device>.json
python scripts/gpu_check.py --list                            # the parts, and which of them fit
python scripts/gpu_check.py --only tests,threshold
python scripts/gpu_check.py --device cpu --toy                # the same code on a tiny model, without a GPU

Each part runs in a process of its own, with a time limit, the most valuable first. The JSON is written anew after
each part, and a part writes down what it finds as it goes: a run that is cut off still tells. Nothing is downloaded.
The exit code is 0 when every part that ran did what it should, 1 when one did not, and 128 and more after a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_plan import PARTS, Part, asked_for, expected_s, fitting, names

# Nothing heavy is imported here: the memory that a part reports shall be its own.

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]


class Stopped(SystemExit):
    """SIGTERM or SIGINT: the part that runs is ended, and the table is printed."""


def run_part(part: Part, spec: Result, folder: Path, *, limit_s: float) -> Result:
    """One part in a fresh process, ended with all that it started when the limit is over.

    Returns:
        what the part has written down, and `status` (done, failed, stopped, needs CUDA), `seconds`, and `message` where
        it did not come to its end.
    """
    if not part.toy and spec["device"] == "cpu":
        return {"status": "needs CUDA", "seconds": 0.0}
    spec_path, result_path = folder / f"{part.name}-spec.json", folder / f"{part.name}.json"
    log_path = folder / f"{part.name}.log"
    spec_path.write_text(json.dumps({**spec, "part": part.name, "limit_s": limit_s}), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(Path(__file__).with_name("gpu_parts.py")),
        str(spec_path),
        str(result_path),
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started, message = time.monotonic(), ""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            message = f"stopped after {limit_s:.0f} s"
        finally:
            _end_group(process)
    seconds = time.monotonic() - started
    found = _read(result_path)
    if message:
        return {**found, "status": "stopped", "message": message, "seconds": seconds}
    if process.returncode or found.get("status") != "done":
        lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        message = f"exit code {process.returncode}: {lines[-1] if lines else 'no message'}"
        return {**found, "status": "failed", "message": message, "log": lines[-40:], "seconds": seconds}
    return {**found, "seconds": seconds}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> Result:
    """What a part has written down so far; nothing where it had not begun to."""
    if not path.exists():
        return {}
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    return found


def check(
    parts: Sequence[Part], spec: Result, folder: Path, output: Path | None, *, seconds: float
) -> tuple[Result, Path | None]:
    """Run the parts that fit, and keep their results; see `run_part`.

    Args:
        output: where the JSON goes; None: `benchmarks/gpu_<device>.json`, once the device is known.
        seconds: of the whole run.

    Returns:
        The report, and where it is.
    """
    started = time.monotonic()
    report: Result = {"device": None, **_head(), "minutes": seconds / 60, "parts": {}}
    lacking = False
    for number, part in enumerate(parts, start=1):
        left = seconds - (time.monotonic() - started)
        expected = expected_s(part, toy=spec["toy"])
        print(f"[{number:2}/{len(parts)}] {part.name:14} ", end="", flush=True)
        if part.needs_model and lacking:
            result: Result = {"status": "left out", "message": "there is no model"}
        elif left < expected and part.name not in ("device", "model"):
            result = {
                "status": "left out",
                "message": f"takes about {expected:.0f} s, {left:.0f} s were left",
            }
        else:
            try:
                result = run_part(part, spec, folder, limit_s=max(5.0, min(part.limit_s, left)))
            except Stopped as stopped:
                report["parts"][part.name] = {**_read(folder / f"{part.name}.json"), "status": "stopped"}
                report["stopped"] = stopped.code
                print("stopped", flush=True)
                break
        report["parts"][part.name] = result
        lacking |= part.name == "model" and result["status"] != "done"
        if part.name == "device":
            report["device"] = result.get("device")
            output = output or _output(result, toy=spec["toy"])
        report["seconds"] = time.monotonic() - started
        _write(output, report)
        print(_short(result), flush=True)
    _write(output, report)
    return report, output


def _head() -> Result:
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "commit": commit or None}


def _output(result: Result, *, toy: bool) -> Path:
    name = re.sub(r"[^a-z0-9]+", "_", str(result.get("device") or "unknown").lower()).strip("_")
    if toy:
        return ROOT / "outputs" / "gpu_check_toy.json"
    return ROOT / "benchmarks" / f"gpu_{name}.json"


def _write(output: Path | None, report: Result) -> None:
    """Whole or not at all, so that whoever is cut off has the last one."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(output.name + ".tmp")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    beside.replace(output)


def _short(result: Result) -> str:
    seconds = f"{result['seconds']:.0f} s  " if result.get("seconds") else ""
    wrong = [name for name, held in result.get("checks", {}).items() if not held]
    return seconds + result["status"] + (f"; NOT: {', '.join(wrong)}" if wrong else "")


def table(report: Result) -> str:
    """All that was found, a part after the other."""
    device = report["device"] or "device unknown"
    lines = ["", f"{device}, {report['date']}, commit {(report['commit'] or 'unknown')[:12]}"]
    for name, result in report["parts"].items():
        lines += ["", f"{name}: {_short(result)}"]
        if "message" in result:
            lines.append(f"    {result['message']}")
        lines += [f"    {line}" for line in result.get("lines", [])]
        for checked, held in result.get("checks", {}).items():
            lines.append(f"    {'holds' if held else 'DOES NOT HOLD'}: {checked}")
    return "\n".join(lines)


def is_good(report: Result) -> bool:
    """Whether every part that ran came to its end and found what it should."""
    results = report["parts"].values()
    return not report.get("stopped") and all(
        result["status"] in ("done", "left out", "needs CUDA") and all(result.get("checks", {}).values())
        for result in results
    )


def _names(text: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",")]
    unknown = [name for name in chosen if name not in names()]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(names())}")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda: its device 0")
    parser.add_argument(
        "--toy", action="store_true", help="a tiny model and few images; all that the CPU can do"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of the whole run; default: %(default)g")
    parser.add_argument(
        "--only", type=_names, default=[], metavar="PART[,PART...]", help="and what they need"
    )
    parser.add_argument("--list", action="store_true", help="show the parts and which of them fit, and end")
    parser.add_argument("--output", type=Path, help="default: benchmarks/gpu_<device>.json")
    parser.add_argument(
        "--work_dir", type=Path, help="for the model and the runs: about 25 GB, removed afterwards"
    )
    return parser


def _stop(signum: int, _: FrameType | None) -> None:
    raise Stopped(128 + signum)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.toy:
        parser.error("without --toy it needs CUDA: SD v1 on a CPU takes hours")
    parts = asked_for(given.only)
    if given.list:
        fit = fitting(parts, given.minutes * 60, toy=given.toy)
        for part in PARTS:
            where = "fits" if part in fit else "left out" if part in parts else ""
            print(f"{part.name:14} {expected_s(part, toy=given.toy):4.0f} s  {where:9} {part.what}")
        return 0
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _stop)
    with tempfile.TemporaryDirectory(dir=given.work_dir, prefix="gpu-check-") as name:
        spec = {"device": "cpu" if given.device == "cpu" else "cuda:0", "toy": given.toy, "folder": name}
        report, output = check(parts, spec, Path(name), given.output, seconds=given.minutes * 60)
    print(table(report))
    print(f"\n{output}")
    return report.get("stopped") or (0 if is_good(report) else 1)


if __name__ == "__main__":
    raise SystemExit(main())
