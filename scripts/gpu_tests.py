"""The tests marked gpu, as a part of scripts/gpu_check.py."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from gpu_parts import Record, Spec

ROOT = Path(__file__).resolve().parent.parent


def tests(spec: Spec, record: Record) -> None:
    """Run them; what fails is named, with the line that says why."""
    report = Path(spec.folder) / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    # Before CUDA starts: cuBLAS sums in one order only with a workspace of this kind.
    variables = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, cwd=ROOT, env=variables, check=False, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    wrong = {}
    for case in suite.iter("testcase"):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            wrong[f"{case.get('classname')}::{case.get('name')}"] = (outcome.get("message") or "")[:500]
    record.add(
        f"{counts['tests'] - len(wrong) - counts['skipped']} of {counts['tests']} tests passed, "
        f"{counts['skipped']} skipped",
        **counts,
        wrong=wrong,
    )
    for name, message in wrong.items():
        record.add(f"{name}: {message.splitlines()[0] if message else ''}")
    record.check("all tests marked gpu pass", done.returncode == 0)
