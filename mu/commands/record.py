"""What a folder was filled from, in a small JSON file beside it; and the lock that lets one command fill it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError

from mu.atomic import write_atomically
from mu.commands.files import DownloadError


@dataclass(frozen=True)
class Pin:
    """What a source was when it was first seen: a commit of the hub, or hashes of what came from elsewhere."""

    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Name of a fetched file -> its SHA-256."""


@dataclass(frozen=True)
class Record:
    """The content of `<folder>.download.json`."""

    source: str
    files: Mapping[str, int]
    """Path relative to the folder -> size in bytes."""
    pins: Mapping[str, Pin]
    """Source -> its pin. Another source's pin stays when the folder is filled from this one."""
    whole: bool = True
    """False while the files are being put in place."""

    def problems(self, folder: Path) -> list[str]:
        """Files that are missing, or have another size, each in words."""
        found = [] if self.whole else ["the last download stopped while its files were put in place"]
        for name, size in self.files.items():
            path = folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != size:
                found.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
        return found


_JSON = TypeAdapter(Record)


def _path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.download.json")


def read_record(folder: Path) -> Record | None:
    """The folder's record, None when it has none. Raises DownloadError for a file that is not one."""
    try:
        return _JSON.validate_json(_path(folder).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DownloadError(
            f"{_path(folder)} is no record of a download; delete it and run the command again"
        ) from error


def write_record(folder: Path, record: Record) -> None:
    write_atomically(_path(folder), _JSON.dump_json(record, indent=1) + b"\n")


def some(problems: list[str], most: int = 5) -> str:
    """The first few, and how many more."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


@contextmanager
def exclusive(path: Path, waiting: str) -> Iterator[None]:
    """Holds the lock file `path`; while another process holds it, prints `waiting` once and waits.

    The file goes when the block ends, however it ends; only a killed process leaves it, for the next one.

    Raises DownloadError when the file cannot be made or this file system has no locks.
    """
    file = _locked(path, waiting)
    # The one that was waited for has taken its file away; another may have made a new one meanwhile.
    while not _is_at(path, file):
        file.close()
        file = _locked(path, waiting)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, waiting: str) -> IO[str]:
    """The open file of a lock that is held until it is closed."""
    try:
        file = open(path, "a")  # noqa: SIM115 - closed by who holds it, which also lets go of the lock
    except OSError as error:
        raise DownloadError(
            f"{path.parent}: cannot be written ({error.strerror}); see --output_dir"
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        file.close()
        raise DownloadError(f"{path}: cannot be locked ({error.strerror}); see --output_dir") from error
    return file


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
