"""The tests marked gpu, as a part of scripts/gpu_check.py."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from gpu_parts import Record, Spec

ROOT = Path(__file__).resolve().parent.parent


def tests(spec: Spec, record: Record) -> None:
    """Run those files that have some: others need not be imported, nor the packages that they need be there."""
    files = [
        path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    run_tests([*map(str, sorted(files)), "-m", "gpu"], Path(spec.folder) / "tests.xml", record)


def run_tests(arguments: Sequence[str], report: Path, record: Record) -> None:
    """Run pytest; what fails is named, with the line that says why.

    Args:
        report: where pytest writes its JUnit file.
    """
    options = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}")
    # Before CUDA starts: cuBLAS sums in one order only with a workspace of this kind.
    variables = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *options], cwd=ROOT, env=variables, check=False
    )
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    wrong = {}
    for case in suite.iter("testcase"):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            wrong[f"{case.get('classname')}::{case.get('name')}"] = (outcome.get("message") or "")[:500]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    record.add(
        f"{passed} of {counts['tests']} tests passed, {counts['skipped']} skipped",
        **counts,
        passed=passed,
        wrong=wrong,
    )
    for name, message in wrong.items():
        record.add(f"{name}: {message.splitlines()[0] if message else ''}")
    record.check("all tests marked gpu pass", done.returncode == 0 and passed > 0)
