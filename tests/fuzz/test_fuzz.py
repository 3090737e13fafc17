"""Mutated checkpoints, masks and patches: read, or refused with the reader's own error; see read_mutated.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("read_mutated.py")


@pytest.mark.parametrize(
    ("first", "count"), [(1_000_000, 250), pytest.param(0, 10_000, marks=pytest.mark.slow)]
)
def test_promise_04_mutated_files_are_read_or_refused_cleanly(tmp_path: Path, first: int, count: int) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    case = (tmp_path / "case").read_text() if (tmp_path / "case").exists() else "none"
    assert done.returncode == 0, f"the process died at case {case}: {done.stderr[-3000:]}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["faults"] == []
    outcomes = told["outcomes"]
    print(outcomes)
    # Neither so damaged that nothing is looked at, nor so little that nothing is found.
    assert sum(outcomes.values()) == 5 * count
    assert min(outcomes[name] for name in ("read", "CheckpointError", "MaskError", "PatchError")) > count / 4
