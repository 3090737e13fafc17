"""Commands killed at random moments and given again: they come to what they come to without a kill, to the byte."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.forked_commands import SIGNALS, Commands

RUN = re.compile(r"-\d{8}-\d{6}(-\d+)?(?=/|$)")
"""What two folders of the same run differ in."""

Found = Mapping[str, object]
"""Name -> content of what stands under final names."""


def assert_kills_change_nothing(
    commands: Commands,
    script: str,
    argv: Callable[[], Sequence[str]],
    *,
    folder: Path,
    found: Callable[[Path], Found],
    kills: int,
    seed: int,
) -> None:
    """Kill `script` so many times in all, each time it is done beginning anew in an empty folder.

    After each kill its exit code is the signal's, and what stands under final names is what stands there in the end.

    Args:
        argv: the arguments of the next try, which writes into `folder` alone.
        found: raises for what cannot be read.
    """
    log = folder.with_name(f"{folder.name}.log")
    started = time.monotonic()
    assert commands.run(script, log, *argv()) == 0, log.read_text()
    longest_s = time.monotonic() - started
    whole = found(folder)
    assert whole
    rng = random.Random(seed)
    signals: Counter[str] = Counter()
    stood: Counter[int] = Counter()  # how much stood there after a kill
    while signals.total() < kills:
        shutil.rmtree(folder)
        is_whole = False
        while not is_whole:
            command = commands.start(script, log, *argv())
            signum, after_s = rng.choice(SIGNALS), rng.uniform(0, longest_s)
            code = command.kill_after(signum, after_s) if signals.total() < kills else command.wait()
            told = f"seed {seed}, kill {signals.total()}: {signum.name} after {after_s:.3f} s of {longest_s:.3f} s\n"
            told += f"exit code {code}\n{command.output()}"
            now = found(folder) if folder.exists() else {}
            assert now.items() <= whole.items(), f"{_differences(now, whole)}\n{told}"
            is_whole = now == whole  # also when the signal came after that
            if code != 0:
                assert code in (-signum, 128 + signum), told
                assert "Traceback" not in command.output(), told
                signals[signum.name] += 1
                stood[len(now)] += 1
                print(f"{signals.total()}: {signum.name}, {len(now)} of {len(whole)} files", flush=True)
            else:
                assert is_whole, f"{_differences(whole, now)}\n{told}"
    print(f"{script}: {dict(signals)}; of {len(whole)} there stood {dict(sorted(stood.items()))}")


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Of the files that are not hidden; runs are taken together, and must agree."""
    files: dict[str, bytes] = {}
    for pattern in patterns:
        for path in folder.rglob(pattern):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not name.startswith(".") and "/." not in name:
                content = path.read_bytes()
                assert files.setdefault(RUN.sub("", name), content) == content, name
    return files


def _differences(one: Found, other: Found) -> list[str]:
    return [name for name in one if name not in other or one[name] != other[name]]
