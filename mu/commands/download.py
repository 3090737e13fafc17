"""A source into its folder: once, whole or not at all, and only what its archive is allowed to hold."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mu.commands.archive import ArchiveError, archive_kind, unpack
from mu.commands.fetch import forget
from mu.commands.files import DownloadError, require_disk
from mu.commands.origins import Payload, Wish, fetch_payload, mirrored, source_text
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
    url = wish.url or mirrored(wish.source)
    text = source_text(wish.source, url)
    done = _done(wish, folder, text)
    if done is not None:
        return done
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"{folder.parent}: cannot be made ({error.strerror}); see --output_dir"
        ) from error
    lock = folder.with_name(f".{folder.name}.download.lock")
    with exclusive(lock, f"{wish.source.name}: another download into {folder} is running; waiting for it"):
        done = _done(wish, folder, text)  # perhaps the other one has filled it
        if done is not None:
            return done
        return _fill(wish, folder, url, text)


def _done(wish: Wish, folder: Path, text: str) -> Result | None:
    record = read_record(folder)
    if wish.force or record is None or record.problems(folder):
        return None
    pin = record.pin
    asked = [
        ("--url", wish.url is None or record.source == text, record.source),
        ("--revision", wish.revision in (None, pin.revision), f"revision {pin.revision}"),
        (
            "--sha256",
            wish.sha256 is None or wish.sha256.lower() in pin.sha256.values(),
            "a file of another hash",
        ),
    ]
    for option, same, what in asked:
        if not same:
            raise DownloadError(
                f"{folder} has been filled from {what}. To replace that, give --force with {option}."
            )
    return Result(
        folder, tuple(record.files), f"complete already, from {record.source}; nothing was downloaded"
    )


def _fill(wish: Wish, folder: Path, url: str | None, text: str) -> Result:
    record = read_record(folder)
    problems = record.problems(folder) if record else []
    if record is None and not wish.force and folder.is_dir() and any(folder.iterdir()):
        raise DownloadError(
            f"{folder} is not empty, and was not filled by this command. Give another folder with --output_dir; or "
            "--force: files of the same name are replaced, the others stay."
        )
    if folder.exists() and not folder.is_dir():
        raise DownloadError(f"{folder} is a file; give a folder with --output_dir")
    if problems:
        print(f"{folder} is incomplete: {some(problems)}", flush=True)
    pin = record.pins.get(text, Pin()) if record else Pin()
    staging = folder.with_name(f".{folder.name}.download")
    staging.mkdir(exist_ok=True)
    try:
        payload = fetch_payload(wish, staging, url, pin)
        files = _arranged(wish, payload, staging)
    except (DownloadError, ArchiveError) as error:
        with contextlib.suppress(OSError):
            staging.rmdir()  # it stays when it holds what the next call goes on with
        if problems:
            raise type(error)(f"{folder} is incomplete: {some(problems)}. {error}") from error
        raise
    sizes = {name: (staging / "ready" / name).stat().st_size for name in files}
    pins = {**(record.pins if record else {}), text: payload.pin}
    # Said before and after: a run that is killed in between leaves a folder that counts as incomplete.
    write_record(folder, Record(text, sizes, pins, whole=False))
    _install(staging / "ready", folder, files, stale=set(record.files if record else ()) - set(sizes))
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
        kind = None if name.lower().endswith(CHECKPOINT_SUFFIXES) else archive_kind(path)
        if kind is None:
            names = {_single_name(wish, payload, path, name): path}
        else:
            folder = staging / f"unpacked-{number}"
            try:
                unpacked = unpack(path, folder, limits=wish.limits, progress=wish.progress)
            except ArchiveError:
                if not payload.keep:
                    forget(path)  # else the next call would find it and fail again
                raise
            names = {inner: folder / inner for inner in unpacked}
        for inner, source in names.items():
            if inner in found:
                raise ArchiveError(f"{wish.source.name}: {inner} comes twice, in {name} and in another file")
            found[inner] = source
    prefix = _prefix(wish.source, list(found))
    files = [inner.removeprefix(prefix) for inner in found]
    for inner, source in found.items():
        target = ready / inner.removeprefix(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        if payload.keep and source == payload.files[0][0]:
            require_disk(ready, source.stat().st_size, what=source.name)
            shutil.copyfile(source, target)
        else:
            os.replace(source, target)
    return files


def _single_name(wish: Wish, payload: Payload, path: Path, name: str) -> str:
    """Where a file that is no archive goes in the folder."""
    if payload.listing:
        return name
    suffix = Path(name).suffix.lower()
    if wish.source.single is None or suffix not in CHECKPOINT_SUFFIXES:
        if not payload.keep:
            forget(path)
        allowed = f" or a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)})" if wish.source.single else ""
        raise ArchiveError(
            f"{name} is no archive; {wish.source.name} comes as .zip, .tar or .tar.gz{allowed}"
        )
    return wish.source.single.format(stem=Path(name).stem, suffix=suffix)


def _prefix(source: Source, names: list[str]) -> str:
    """The folders around the content, which are left out, with a closing slash."""
    prefix = ""
    while True:
        if any(source.fits(name.removeprefix(prefix)) for name in names):
            return prefix
        tops = {"".join(name.removeprefix(prefix).partition("/")[:2]) for name in names}
        if len(tops) != 1 or not (top := tops.pop()).endswith("/"):
            break
        prefix += top
    print(f"note: {source.name} is not laid out as usual; its files are kept as they came", flush=True)
    return ""


def _install(ready: Path, folder: Path, files: list[str], *, stale: set[str]) -> None:
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
    for name in stale:
        (folder / name).unlink(missing_ok=True)
