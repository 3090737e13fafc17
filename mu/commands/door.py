"""What the command lines here share: the options of downloads, verbosity, exit codes and closing summary."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import logging
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mu.commands.archive import Limits
from mu.commands.download import Result, download
from mu.commands.origins import Wish
from mu.commands.sources import MIRROR_VARIABLE, Source
from mu.errors import MuError
from mu.verbosity import LEVELS, console_level, is_quiet, verbosity

_LISTED = 20
EPILOG = f"""\
environment variables:
  {MIRROR_VARIABLE}  a URL or folder that holds every archive under its default folder's name,
                       such as <mirror>/data/quick-canvas-dataset/sample.zip
  HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE   as everywhere with the Hugging Face hub

exit codes: 0 the folder is whole, 1 an error with its message, 2 a mistake in the arguments, 130 interrupted"""


def one_of(names: Sequence[str], aliases: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """An argument's type: one of `names`, or another name for one. A mistake is told with the nearest name."""

    def checked(text: str) -> str:
        name = (aliases or {}).get(text, text)
        if name in names:
            return name
        allowed = [*names, *(aliases or ())]
        near = difflib.get_close_matches(text.replace("-", "_").lower(), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not one of: {', '.join(allowed)}.{hint}")

    return checked


def path(text: str) -> Path:
    """An argument's type: a path, in which `~` is the home folder."""
    return Path(os.path.expanduser(text))  # pathlib's own raises for a user who is not there


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a download."""
    default = Limits()
    parser.add_argument("--output_dir", type=path, metavar="DIR", help="folder that receives the files")
    parser.add_argument(
        "--url",
        help="instead of the usual source: an http(s) or file URL, or a path, of an archive or a checkpoint",
    )
    parser.add_argument("--sha256", type=_sha256, help="what the SHA-256 of the downloaded file must be")
    parser.add_argument(
        "--revision",
        help="branch, tag or commit on the Hugging Face hub; default: the commit of the first time",
    )
    parser.add_argument(
        "--force", action="store_true", help="download again, and replace files of the same name"
    )
    parser.add_argument("--no_progress", action="store_true", help="no progress bar")
    add_verbosity(parser)
    limits = parser.add_argument_group("limits of an archive, above which it is refused as a bomb")
    limits.add_argument(
        "--max_files", type=_positive, default=default.max_files, help="entries (%(default)s)"
    )
    limits.add_argument(
        "--max_bytes", type=_positive, default=default.max_bytes, help="unpacked (%(default)s)"
    )
    limits.add_argument(
        "--max_ratio", type=_positive, default=int(default.max_ratio), help="unpacked to packed (%(default)s)"
    )


def run(source: Source, arguments: argparse.Namespace) -> int:
    """Downloads, prints the summary; returns the exit code."""
    wish = Wish(
        source=source,
        folder=arguments.output_dir,
        url=arguments.url,
        revision=arguments.revision,
        sha256=arguments.sha256,
        force=arguments.force,
        limits=Limits(arguments.max_files, arguments.max_bytes, arguments.max_ratio),
        progress=not (arguments.no_progress or arguments.quiet),
    )

    def action() -> None:
        with notes_as_asked():
            result = download(wish)
        if not is_quiet():
            print(summary(result), flush=True)

    with verbosity(arguments.log_level, quiet=arguments.quiet):
        return guarded(action)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """The options `--log_level` and `--quiet`, as every command has them."""
    parser.add_argument(
        "--log_level",
        choices=LEVELS,
        default="info",
        help="notes are printed up to info; debug also gives errors their traceback",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


@contextlib.contextmanager
def notes_as_asked() -> Iterator[None]:
    """What is printed meanwhile goes nowhere where it is not asked for."""
    with contextlib.ExitStack() as stack:
        if console_level() > logging.INFO:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def guarded(
    action: Callable[[], object],
    *,
    interrupted: str = "interrupted; what was downloaded is kept for the next time",
) -> int:
    """Runs `action`; returns 0, or 1 for an error that its message explains, or 130 when interrupted."""
    try:
        action()
    except (MuError, OSError) as error:
        if console_level() <= logging.DEBUG:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


def summary(result: Result) -> str:
    """What is in the folder now: a line for each entry at its top, with its files and bytes."""
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name in result.files:
        top, slash, _ = name.partition("/")
        files[f"{top}{slash}"] += 1
        sizes[f"{top}{slash}"] += (result.folder / name).stat().st_size
    lines = [f"{result.folder}: {files.total():,} files, {_bytes(sizes.total())} ({result.note})"]
    width = max(map(len, sorted(files)[:_LISTED]))
    for top in sorted(files)[:_LISTED]:
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


def _sha256(text: str) -> str:
    if not re.fullmatch(r"(sha256:)?[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no SHA-256: 64 hexadecimal digits")
    return text.removeprefix("sha256:").lower()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
