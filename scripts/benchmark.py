"""Time and memory of unlearning: `python -m benchmarks.stopwatch` under the name that docs/results.md gives."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
runpy.run_module("benchmarks.stopwatch", run_name="__main__", alter_sys=True)
