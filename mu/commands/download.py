"""A source into its folder: once, whole or not at all, and only what its archive is allowed to hold."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mu.commands.archive import ArchiveError, archive_kind, unpack
from mu.commands.fetch import discard
from mu.commands.files import DownloadError, require_disk
from mu.commands.origins import Payload, Wish, fetch_payload, place_of
from mu.commands.record import Pin, Record, exclusive, read_record, some, write_record
from mu.commands.sources import CHECKPOINT_SUFFIXES, Source


@dataclass(frozen=True)
class Result:
    """`note` says in a line what was done."""

    folder: Path
    files: tuple[str, ...]
    note: str


def download(wish: Wish) -> Result:
    """Fills the folder, unless it is whole already; then nothing is asked of any server.

    Raises:
        DownloadError: nothing could be fetched, or the folder holds something else.
        ArchiveError: what came is not what it should be. In both cases the folder is as it was.
    """
    folder = Path(os.path.realpath(os.path.expanduser(wish.folder or wish.source.folder)))
    url, text = place_of(wish.source, wish.url)
    if (done := _done(wish, folder, text)) is not None:
        return done
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"{folder.parent}: cannot be made ({error.strerror}); see --output_dir"
        ) from error
    lock = folder.with_name(f".{folder.name}.download.lock")
    with exclusive(lock, f"{wish.source.name}: another download into {folder} is running; waiting for it"):
        return _done(wish, folder, text) or _fill(wish, folder, url, text)  # the other one may have filled it


def _done(wish: Wish, folder: Path, text: str) -> Result | None:
    """The result when the folder is whole already. Raises DownloadError when it holds something else."""
    record = read_record(folder)
    if wish.force or record is None or record.problems(folder):
        return None
    pin = record.pins.get(record.source, Pin())
    sha256_known = wish.sha256 is None or wish.sha256.lower() in pin.sha256.values()
    for option, same, what in (
        ("--url", wish.url is None or record.source == text, record.source),
        ("--revision", wish.revision in (None, pin.revision), f"revision {pin.revision}"),
        ("--sha256", sha256_known, "a file of another hash"),
    ):
        if not same:
            raise DownloadError(
                f"{folder} has been filled from {what}. To replace that, give --force with {option}."
            )
    note = f"complete already, from {record.source}; nothing was downloaded"
    return Result(folder, tuple(record.files), note)


def _fill(wish: Wish, folder: Path, url: str | None, text: str) -> Result:
    """Fetches, unpacks beside the folder, and puts the files in place."""
    # 1. May the folder be filled?
    record = read_record(folder)
    problems = record.problems(folder) if record else []
    if folder.exists() and not folder.is_dir():
        raise DownloadError(f"{folder} is a file; give a folder with --output_dir")
    if record is None and not wish.force and folder.is_dir() and any(folder.iterdir()):
        raise DownloadError(
            f"{folder} is not empty, and was not filled by this command. Give another folder with --output_dir; or "
            "--force: files of the same name are replaced, the others stay."
        )
    if problems:
        print(f"{folder} is incomplete: {some(problems)}", flush=True)

    # 2. Fetch and unpack. What was fetched stays there when that fails, for the next call to go on with.
    pin = record.pins.get(text, Pin()) if record else Pin()
    staging = folder.with_name(f".{folder.name}.download")
    staging.mkdir(exist_ok=True)
    try:
        payload = fetch_payload(wish, staging, url, pin)
        files = _arranged(wish, payload, staging)
    except (DownloadError, ArchiveError) as error:
        with contextlib.suppress(OSError):
            staging.rmdir()
        if problems:
            raise type(error)(f"{folder} is incomplete: {some(problems)}. {error}") from error
        raise

    # 3. Put in place. The record is written before and after: killed in between, the folder counts as incomplete.
    sizes = {name: (staging / "ready" / name).stat().st_size for name in files}
    pins = {**(record.pins if record else {}), text: payload.pin}
    write_record(folder, Record(text, sizes, pins, whole=False))
    _install(staging / "ready", folder, files)
    for name in set(record.files if record else ()) - set(sizes):
        (folder / name).unlink(missing_ok=True)
    write_record(folder, Record(text, sizes, pins))
    shutil.rmtree(staging)
    return Result(folder, tuple(files), f"downloaded from {text}")


def _arranged(wish: Wish, payload: Payload, staging: Path) -> list[str]:
    """Puts the content into `ready`, as the folder wants it; returns the files, relative to it."""
    ready = staging / "ready"
    for leftover in (ready, *staging.glob("unpacked-*")):
        if leftover.exists():
            shutil.rmtree(leftover)
    found: dict[str, Path] = {}
    for number, (path, name) in enumerate(payload.files):
        try:
            content = _content(wish, payload, path, name, staging / f"unpacked-{number}")
        except ArchiveError:
            if not payload.keep:
                discard(path)  # else the next call would find it and fail again
            raise
        if twice := content.keys() & found.keys():
            raise ArchiveError(f"{wish.source.name}: {min(twice)} comes twice, in {name} and in another file")
        found.update(content)
    prefix = _prefix(wish.source, list(found))
    files = [inner.removeprefix(prefix) for inner in found]
    for file, source in zip(files, found.values(), strict=True):
        target = ready / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if payload.keep and source == payload.files[0][0]:
            require_disk(ready, source.stat().st_size, what=source.name)
            shutil.copyfile(source, target)
        else:
            os.replace(source, target)
    return files


def _content(wish: Wish, payload: Payload, path: Path, name: str, unpacked: Path) -> dict[str, Path]:
    """What a fetched file brings: {name: file}. An archive is unpacked into the folder `unpacked`."""
    suffix = Path(name).suffix.lower()
    if suffix not in CHECKPOINT_SUFFIXES and archive_kind(path) is not None:
        files = unpack(path, unpacked, limits=wish.limits, progress=wish.progress)
        return {inner: unpacked / inner for inner in files}
    if payload.listing:
        return {name: path}
    if wish.source.single is None or suffix not in CHECKPOINT_SUFFIXES:
        allowed = f" or a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)})" if wish.source.single else ""
        raise ArchiveError(
            f"{name} is no archive; {wish.source.name} comes as .zip, .tar or .tar.gz{allowed}"
        )
    return {wish.source.single.format(stem=Path(name).stem, suffix=suffix): path}


def _prefix(source: Source, names: list[str]) -> str:
    """The folders around the content, which are left out, with a closing slash."""
    prefix = ""
    while not any(source.fits(name.removeprefix(prefix)) for name in names):
        tops = {"".join(name.removeprefix(prefix).partition("/")[:2]) for name in names}
        if len(tops) != 1 or not (top := tops.pop()).endswith("/"):
            print(
                f"note: {source.name} is not laid out as usual; its files are kept as they came", flush=True
            )
            return ""
        prefix += top
    return prefix


def _install(ready: Path, folder: Path, files: list[str]) -> None:
    """One rename where the folder is new; else file by file, so that what others put there stays."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        os.rename(ready, folder)
        return
    for name in files:
        target = folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(ready / name, target)
        except OSError as error:
            raise DownloadError(
                f"{target}: cannot be written ({error.strerror}); move away what is there"
            ) from error
