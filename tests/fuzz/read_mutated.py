"""Reads mutated files in a process of its own: python tests/fuzz/read_mutated.py FOLDER FIRST COUNT

Case `n` is always the same file. What a reader may do with it is return, or raise its own error. Everything else is a
fault, told as JSON in the last line: another exception, more than some seconds, a write, a new process, an import that
the file asked for, much memory. The number of the case being read stands in FOLDER/case, should the process be killed.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz_corpus import write_corpus
from fuzz_mutations import CANARY, mutated

from mu.algorithms.saliency_unlearning.mask_file import MaskError, load_mask, load_mask_metadata
from mu.errors import MuError
from mu.ldm.checkpoint import describe_checkpoint
from mu.ldm.patch import PatchError, load_patch
from mu.ldm.tensor_file import CheckpointError, read_state_dict

SECONDS = 20
MEGABYTES = 300
READERS: list[tuple[Callable[[Path], object], type[MuError]]] = [
    (read_state_dict, CheckpointError),
    (describe_checkpoint, CheckpointError),
    (load_mask, MaskError),
    (load_mask_metadata, MaskError),
    (load_patch, PatchError),
]
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "os.rename",
)
FORBIDDEN += (
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
    "webbrowser.open",
)


class Watch:
    """Notes, while it is on, what a harmless read never does."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        imports = event == "import" and CANARY in str(arguments[0])
        if writes or imports or event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}"[:200])


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(folder: Path, first: int, count: int) -> dict[str, Any]:
    corpus = write_corpus(folder / "corpus")
    contents = [path.read_bytes() for path in corpus]
    for path in corpus:  # what is loaded late is loaded now
        for read, error in READERS:
            outcome(read, path, error)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    watch, outcomes, faults = Watch(), Counter[str](), []
    for case in range(first, first + count):
        random = Random(case)
        at = random.randrange(len(corpus))
        suffix = random.choice([corpus[at].suffix] * 4 + [".pt", ".safetensors"])
        path = folder / f"case{suffix}"
        path.write_bytes(mutated(contents[at], random.choice(contents), random))
        (folder / "case").write_text(str(case))
        for read, error in READERS:
            before = peak_mb(reset=True)
            signal.alarm(SECONDS)
            watch.on = True
            result = outcome(read, path, error)
            watch.on = False
            signal.alarm(0)
            outcomes[result.partition(":")[0]] += 1
            if (grown := peak_mb() - before) > MEGABYTES:
                watch.seen.append(f"{grown:.0f} MB")
            if watch.seen or result.startswith("fault"):
                fault = {"case": case, "reader": read.__name__, "result": result, "seen": watch.seen[:3]}
                print(json.dumps(fault), file=sys.stderr, flush=True)
                faults.append(fault)
                watch.seen.clear()
    return {"outcomes": outcomes, "faults": faults}


def outcome(read: Callable[[Path], object], path: Path, error: type[MuError]) -> str:
    try:
        read(path)
    except error as clean:
        return f"{type(clean).__name__}: {clean}"[:300]
    except Exception:  # noqa: BLE001 - what a reader must not raise is what is looked for
        return f"fault: {traceback.format_exc(limit=-4)}"
    return "read"


def peak_mb(*, reset: bool = False) -> float:
    """The most memory that the process has had, since the last reset where the system can tell."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    if status.exists():
        return float(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
