"""One part of scripts/gpu_check.py, in a process of its own.

python scripts/gpu_parts.py spec.json result.json      # what gpu_check.py runs
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_plan import PARTS

from mu.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one part is asked, and where."""

    part: str
    device: str
    """cpu or cuda:0."""
    toy: bool
    folder: str
    """Of the model and the images, shared by all parts; see `gpu_model`."""
    limit_s: float
    """The part is ended after so many seconds."""

    @property
    def on_cuda(self) -> bool:
        return self.device != "cpu"


class Record:
    """What a part has found so far, on disk after each finding.

    `lines` are for people; `checks` are sentences that hold or do not; other names are numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"status": "begun", "lines": [], "checks": {}}

    def add(self, line: str | None = None, **numbers: Any) -> None:
        """Keep numbers, and a line that says them."""
        self.found |= numbers
        if line is not None:
            self.found["lines"].append(line)
        self._write()

    def check(self, sentence: str, held: bool) -> None:
        """Keep whether a sentence holds."""
        self.found["checks"][sentence] = bool(held)
        self._write()

    def done(self) -> None:
        self.add(status="done")

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.found, indent=2).encode())


def main() -> int:
    spec_path, result_path = (Path(argument) for argument in sys.argv[1:])
    spec = Spec(**json.loads(spec_path.read_text(encoding="utf-8")))
    record = Record(result_path)
    (part,) = (part for part in PARTS if part.name == spec.part)
    answer = getattr(importlib.import_module(part.module), part.name.partition("_at_")[0])
    answer(spec, record)
    record.done()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
