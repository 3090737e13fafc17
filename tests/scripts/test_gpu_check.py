"""The check of a GPU: its parts are known to work before a GPU sees them; one that is cut off still tells."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    """These scripts import each other, as Python lets them when they are run."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    import gpu_plan

    return gpu_plan


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    import gpu_check

    return gpu_check


def command(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--output", str(output), *arguments]


def checked(output: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and the JSON."""
    done = subprocess.run(
        command(output, *arguments), capture_output=True, text=True, check=False, cwd=output.parent
    )
    assert output.exists(), done.stderr
    return done.returncode, done.stdout, json.loads(output.read_text(encoding="utf-8"))


# ---- what fits


def test_the_most_valuable_parts_fit_into_eight_minutes(plan: ModuleType) -> None:
    fit = [part.name for part in plan.fitting(plan.PARTS, 8 * 60)]
    assert fit[:7] == ["device", "tests", "model", "arms", "job", "threshold", "saliency"]
    assert sum(part.seconds for part in plan.PARTS if part.name in fit) <= 8 * 60 - plan.START_S
    assert plan.fitting(plan.PARTS, 3600) == list(plan.PARTS)
    assert plan.fitting(plan.PARTS, 0) == []


def test_a_part_brings_what_it_needs(plan: ModuleType) -> None:
    assert [part.name for part in plan.asked_for(["threshold"])] == ["device", "threshold"]
    assert [part.name for part in plan.asked_for(["profile"])] == ["device", "model", "profile"]
    assert plan.asked_for([]) == list(plan.PARTS)


def test_every_part_has_its_function_and_time_to_spare(plan: ModuleType) -> None:
    names = plan.names()
    assert len(set(names)) == len(names)
    for part in plan.PARTS:
        source = (ROOT / "scripts" / f"{part.module}.py").read_text(encoding="utf-8")
        assert re.search(
            rf"^def {part.name.partition('_at_')[0]}\(spec: Spec, record: Record\)", source, re.M
        )
        assert part.limit_s >= 1.5 * part.seconds


def test_the_list_says_what_is_left_out() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--list", "--minutes", "2"], capture_output=True, text=True, check=True
    )
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "fits" in rows["tests"]
    assert "left out" in rows["arms"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "without --toy it needs CUDA"),
        (["--only", "tests,fast"], "'fast' is not one of device, tests, model"),
    ],
)
def test_what_cannot_be_is_refused(
    gpu_check: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_it_starts_without_torch() -> None:
    """A part's peak memory is its own only if the process that starts it is small."""
    code = "import sys; sys.path.insert(0, 'scripts'); import gpu_check; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


# ---- parts


def test_a_part_is_measured_and_written_down(tmp_path: Path) -> None:
    code, printed, report = checked(tmp_path / "gpu.json", "--only", "threshold,tests")
    assert code == 0
    assert list(report["parts"]) == ["device", "tests", "threshold"]
    threshold = report["parts"]["threshold"]
    assert threshold["status"] == "done"
    assert threshold["weights"] == 1066308
    assert threshold["checks"] == {
        "it marks exactly half": True,
        "it is the mask of a stable sort, to the bit": True,
    }
    assert report["parts"]["tests"]["status"] == "needs CUDA"
    assert report["device"]
    assert report["parts"]["device"]["environment"]["torch"]["version"]
    assert "holds: it marks exactly half" in printed
    assert not list(tmp_path.glob("*.tmp"))


def test_a_part_that_takes_too_long_is_ended_and_the_next_ones_run(tmp_path: Path) -> None:
    """Of 12 seconds, `device` gets 5 or more: it is at work with torch, and may be ended; the rest is left out."""
    begun = time.monotonic()
    _, _, report = checked(tmp_path / "gpu.json", "--minutes", "0.02", "--only", "threshold")
    assert time.monotonic() - begun < 60
    assert report["parts"]["device"]["status"] in ("stopped", "done")
    if report["parts"]["device"]["status"] == "stopped":
        assert report["parts"]["device"]["message"] == "stopped after 5 s"
    left_out = report["parts"]["threshold"]
    assert left_out["status"] == "left out"
    assert re.search(r"takes about 20 s, -?\d+ s were left", left_out["message"])


def test_a_run_that_is_stopped_has_written_what_it_had(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    started = command(output, "--only", "threshold", "--work_dir", str(tmp_path))
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not output.exists() or "device" not in json.loads(output.read_text())["parts"]:
                assert process.poll() is None
                time.sleep(0.1)
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 143
    report = json.loads(output.read_text())
    assert report["stopped"] == 143
    assert report["parts"]["device"]["status"] == "done"
    assert report["parts"]["threshold"]["status"] == "stopped"
    assert "matmul: " in printed
    (left,) = re.findall(r"(?m)^\[ ?\d/\d\] threshold +(.*)$", printed)
    assert left == "stopped"
    assert list(tmp_path.iterdir()) == [output]
    if sys.platform == "linux":  # nothing that it had started is left at work
        assert [line for line in command_lines() if str(tmp_path) in line] == []


def command_lines() -> list[str]:
    """Of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_bytes().decode(errors="replace").replace("\0", " "))
    return found


def test_tests_that_fail_are_named(tmp_path: Path) -> None:
    import gpu_parts
    import gpu_tests

    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 + 1 == 3\n"
        "@pytest.mark.skip\n"
        "def test_absent(): pass\n"
    )
    record = gpu_parts.Record(tmp_path / "record.json")
    gpu_tests.run_tests([str(file)], tmp_path / "tests.xml", record)
    found = json.loads((tmp_path / "record.json").read_text())
    assert (found["passed"], found["failures"], found["errors"], found["skipped"]) == (1, 1, 0, 1)
    (wrong,) = found["wrong"]
    assert wrong.endswith("test_three::test_wrong")
    assert found["lines"][0] == "1 of 3 tests passed, 1 skipped"
    assert "assert (1 + 1) == 3" in found["lines"][1]
    assert found["checks"] == {"all tests marked gpu pass": False}


def test_what_does_not_hold_is_said_and_is_the_exit_code(gpu_check: ModuleType) -> None:
    report = {
        "device": "A GPU",
        "date": "2026-01-01",
        "commit": "0123456789abcdef",
        "parts": {
            "tests": {
                "status": "done",
                "seconds": 61.2,
                "lines": ["9 of 10 tests passed"],
                "checks": {"all pass": False},
            },
            "arms": {
                "status": "stopped",
                "message": "stopped after 90 s",
                "seconds": 90.0,
                "lines": ["step 0.5 s"],
            },
            "profile": {"status": "left out", "message": "takes about 30 s, 4 s were left"},
        },
    }
    lines = [line.strip() for line in gpu_check.table(report).splitlines()]
    assert "A GPU, 2026-01-01, commit 0123456789ab" in lines
    assert "tests: 61 s  done; NOT: all pass" in lines
    assert "DOES NOT HOLD: all pass" in lines
    assert lines[lines.index("arms: 90 s  stopped") + 1 :][:2] == ["stopped after 90 s", "step 0.5 s"]
    assert not gpu_check.is_good(report)
    del report["parts"]["arms"]
    assert not gpu_check.is_good(report)
    report["parts"]["tests"]["checks"]["all pass"] = True
    assert gpu_check.is_good(report)


@pytest.mark.slow
def test_all_parts_run_at_toy_size(tmp_path: Path, plan: ModuleType) -> None:
    code, printed, report = checked(tmp_path / "gpu.json", "--minutes", "60")
    assert list(report["parts"]) == plan.names()
    statuses = {name: result["status"] for name, result in report["parts"].items()}
    assert statuses == {part.name: "done" if part.toy else "needs CUDA" for part in plan.PARTS}, printed
    wrong = [
        sentence
        for result in report["parts"].values()
        for sentence, held in result.get("checks", {}).items()
        if not held
    ]
    assert wrong == []
    assert code == 0
