"""What a bug report needs: versions, devices, and of a run folder its config, its files and the end of its log.

Nothing is sent anywhere. Environment variables are not shown; home folders, keys and tokens are taken out.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from mu.atomic import write_atomically
from mu.commands.door import Outcome, add_verbosity, guarded, path
from mu.commands.redaction import redacted
from mu.console import ArgumentParser, called
from mu.errors import MuError
from mu.run_folder import environment

_NAMES = ("config.yaml", "environment.json", "metrics.json")
_MOST_BYTES = 100_000
"""Of one file; a log's end, another's beginning."""


class ReportError(MuError, ValueError):
    """There is no such run folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = ArgumentParser(
        prog=called("mu.commands.debug_report"),
        description=" ".join(str(__doc__).split()),
        epilog="exit codes: 0 written, 1 an error with its message, 2 a mistake in the arguments, 130 interrupted",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", nargs="?", type=path, metavar="RUN", help="folder of a run; none: the machine alone"
    )
    parser.add_argument("--lines", type=int, default=60, help="of the end of the log (%(default)s)")
    parser.add_argument("--output", type=path, metavar="FILE", help="write it there instead of printing it")
    add_verbosity(parser)
    arguments = parser.parse_args(argv)
    if arguments.lines < 1:
        parser.error("--lines must be at least 1")

    def action() -> Outcome:
        text = report(arguments.run, lines=arguments.lines)
        if arguments.output is None:
            return Outcome(text, {"report": text}, [text])
        write_atomically(arguments.output, f"{text}\n".encode())
        return Outcome(f"Wrote {arguments.output}.", {"report": arguments.output}, [arguments.output])

    return guarded(action, arguments)


def report(run: Path | None = None, *, lines: int = 60) -> str:
    """The report as Markdown, with nothing in it that should stay on this machine.

    Args:
        run: the folder of a run.
        lines: how many of the log's last lines.

    Raises:
        ReportError: there is no such folder, or it is not that of a run.
    """
    sections = [("machine", _as_json(_machine()))]
    if run is not None:
        sections += _run_sections(run, lines)
    return redacted("\n\n".join(f"## {title}\n\n```\n{text.rstrip()}\n```" for title, text in sections))


def _machine() -> dict[str, object]:
    """`run_folder.environment` with torch loaded, every dependency's version, memory and free disk."""
    trouble = None
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a library of CUDA that does not fit
        trouble = f"torch cannot be imported: {error}"
    found = environment()
    found["packages"] = _versions()
    if trouble is not None:
        found["torch"] = trouble
    if hasattr(os, "sysconf"):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    found["free_disk_gb"] = round(shutil.disk_usage(Path.cwd()).free / 1e9, 1)
    return found


def _versions() -> dict[str, str | None]:
    """Every package that this one asks for, extras too; None: not installed."""
    try:
        wanted = metadata.requires("unlearn_diff") or []
    except metadata.PackageNotFoundError:
        wanted = []
    names = {"unlearn_diff"} | {found[0] for line in wanted if (found := re.match(r"[\w.-]+", line))}
    versions: dict[str, str | None] = {}
    for name in sorted(names, key=str.lower):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _run_sections(run: Path, lines: int) -> Iterator[tuple[str, str]]:
    if not run.is_dir():
        raise ReportError(
            f"{run}: there is no such folder; give the folder of a run, such as outputs/.../style-Noto-..."
        )
    if not any((run / name).is_file() for name in (*_NAMES, "log.txt")):
        raise ReportError(f"{run} is not the folder of a run: it has neither config.yaml nor log.txt")
    files = sorted(path for path in run.rglob("*") if path.is_file())
    listed = [f"{path.stat().st_size:>14,}  {path.relative_to(run)}" for path in files[:100]]
    more = [f"and {len(files) - 100:,} more"] if len(files) > 100 else []
    yield f"files of {run.name}", "\n".join([*listed, *more])
    for name in _NAMES:
        if (run / name).is_file():
            yield name, (run / name).read_bytes()[:_MOST_BYTES].decode("utf-8", errors="replace")
    if (run / "log.txt").is_file():
        log = (run / "log.txt").read_bytes()[-_MOST_BYTES:].decode("utf-8", errors="replace")
        yield f"log.txt, its last {lines} lines at most", "\n".join(log.splitlines()[-lines:])


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
