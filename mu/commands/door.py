"""What the command lines of downloads and environments share: options, verbosity and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.commands.archive import Limits
from mu.commands.download import Result, download
from mu.commands.origins import Wish
from mu.commands.sources import MIRROR_VARIABLE, Source
from mu.config_file import path_problem
from mu.config_names import nearest
from mu.console import ArgumentParser, as_json, called
from mu.errors import MuError
from mu.verbosity import LEVELS, console_level, is_json, is_quiet, verbosity

_LISTED = 20
_EPILOG = f"""\
environment variables:
  {MIRROR_VARIABLE}  a URL or folder that holds every archive under its default folder's name,
                       such as <mirror>/data/quick-canvas-dataset/sample.zip
  HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE   as everywhere with the Hugging Face hub

exit codes: 0 the folder is whole, 1 an error with its message, 2 a mistake in the arguments, 130 interrupted"""


def download_parser(
    command: str, description: str, sources: Sequence[Source], *, example: str, note: str = ""
) -> ArgumentParser:
    """The parser of a download command with all its options; the caller adds what names the source."""
    folders = "\n".join(["folders:", *(f"  {source.name:<22}{source.folder}" for source in sources)])
    parser = ArgumentParser(
        prog=program(command),
        example=example,
        description=f"{description}: resumed, checked, and only once.",
        epilog=f"{folders}\n{note}\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_dir", type=path, metavar="DIR", help="folder that receives the files")
    add(
        "--url",
        help="instead of the usual source: an http(s) or file URL, or a path, of an archive or a checkpoint",
    )
    add("--sha256", type=_sha256, help="what the SHA-256 of the downloaded file must be")
    add(
        "--revision",
        help="branch, tag or commit on the Hugging Face hub; default: the commit of the first time",
    )
    add("--force", action="store_true", help="download again, and replace files of the same name")
    add("--no_progress", action="store_true", help="no progress bar")
    add_verbosity(parser)
    limits = parser.add_argument_group("limits of an archive, above which it is refused as a bomb")
    for name, what in (
        ("max_files", "entries"),
        ("max_bytes", "unpacked"),
        ("max_ratio", "unpacked to packed"),
    ):
        default = int(getattr(Limits, name))
        limits.add_argument(f"--{name}", type=_positive, default=default, help=f"{what} (%(default)s)")
    return parser


def program(command: str) -> str:
    """What a user types for a command of this folder that is a console script too."""
    return called(f"mu.commands.{command}").replace(f"python -m mu.commands.{command}", command)


def run_download(source: Source, arguments: argparse.Namespace) -> int:
    """Downloads, prints the summary; returns the exit code."""
    wish = Wish(
        source=source,
        folder=arguments.output_dir,
        url=arguments.url,
        revision=arguments.revision,
        sha256=arguments.sha256,
        force=arguments.force,
        limits=Limits(arguments.max_files, arguments.max_bytes, arguments.max_ratio),
        progress=not (arguments.no_progress or arguments.quiet or arguments.json),
    )

    def action() -> Outcome:
        result = download(wish)
        files = {name: (result.folder / name).stat().st_size for name in result.files}
        about = {"folder": result.folder, "note": result.note, "bytes": sum(files.values()), "files": files}
        return Outcome(summary(result), about, [result.folder])

    return guarded(
        action, arguments, interrupted="interrupted; what was downloaded is kept for the next time"
    )


def summary(result: Result) -> str:
    """What is in the folder now: a line for each entry at its top, with its files and bytes."""
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name in result.files:
        top = "".join(name.partition("/")[:2])
        files[top] += 1
        sizes[top] += (result.folder / name).stat().st_size
    lines = [f"{result.folder}: {files.total():,} files, {_bytes(sizes.total())} ({result.note})"]
    shown = sorted(files)[:_LISTED]
    width = max(map(len, shown))
    for top in shown:
        count = f"{files[top]:,} files" if top.endswith("/") else ""
        lines.append(f"  {top:<{width}}  {_bytes(sizes[top]):>10}  {count}".rstrip())
    if len(files) > _LISTED:
        lines.append(f"  and {len(files) - _LISTED} more")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def one_of(names: Sequence[str], aliases: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """An argument's type: one of `names`, or another name for one. A mistake is told with the nearest name."""

    def checked(text: str) -> str:
        name = (aliases or {}).get(text, text)
        if name in names:
            return name
        allowed = [*names, *(aliases or ())]
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of: {', '.join(allowed)}.{nearest(text, allowed)}"
        )

    return checked


def path(text: str) -> Path:
    """An argument's type: a path, in which `~` is the home folder."""
    if (problem := path_problem(text)) is not None:
        raise argparse.ArgumentTypeError(problem)
    return Path(os.path.expanduser(text))  # pathlib's own raises for a user who is not there


def _sha256(text: str) -> str:
    if not re.fullmatch(r"(sha256:)?[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no SHA-256: 64 hexadecimal digits")
    return text.removeprefix("sha256:").lower()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """The options `--log_level` and `--quiet`, as every command has them."""
    parser.add_argument(
        "--log_level",
        choices=LEVELS,
        default="info",
        help="notes are printed up to info; debug also gives errors their traceback",
    )
    parser.add_argument("--quiet", action="store_true", help="print paths of what was made alone, and errors")
    parser.add_argument(
        "--json", action="store_true", help="on stdout nothing but the result, as one JSON object"
    )


@dataclass(frozen=True)
class Outcome:
    """What a command found or made: in words, in all its details, and where it is."""

    text: str
    details: Mapping[str, object]
    paths: Sequence[object] = ()


@contextlib.contextmanager
def notes_as_asked() -> Iterator[None]:
    """What is printed meanwhile goes nowhere where it is not asked for, and to stderr where stdout is for JSON."""
    with contextlib.ExitStack() as stack:
        if console_level() > logging.INFO:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        elif is_json():
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def guarded(
    action: Callable[[], Outcome], arguments: argparse.Namespace, *, interrupted: str = "interrupted"
) -> int:
    """Runs `action` and prints what it gives, as loud as asked.

    Returns 0, or 1 for an error that its message explains, 130 when interrupted.
    """
    with verbosity(arguments.log_level, quiet=arguments.quiet, json=arguments.json):
        try:
            with notes_as_asked():
                outcome = action()
            if is_json():
                print(as_json(outcome.details), flush=True)
            elif not is_quiet():
                print(outcome.text, flush=True)
            elif outcome.paths:
                print(*outcome.paths, sep="\n", flush=True)
        except (MuError, OSError) as error:
            if console_level() <= logging.DEBUG:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130
        return 0
