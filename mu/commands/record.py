"""What a folder was filled from, in a small JSON file beside it: the pin of its source, and every file's size."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mu.atomic import write_atomically
from mu.commands.files import DownloadError

_LISTED = 5


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

    @property
    def pin(self) -> Pin:
        return self.pins.get(self.source, Pin())

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


def record_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.download.json")


def read_record(folder: Path) -> Record | None:
    """The folder's record, None when it has none. Raises DownloadError for a file that is not one."""
    path = record_path(folder)
    try:
        value: Any = json.loads(path.read_bytes())
        return Record(
            source=str(value["source"]),
            files={str(name): int(size) for name, size in value["files"].items()},
            pins={
                str(source): Pin(
                    pin["revision"], {str(name): str(sha) for name, sha in pin["sha256"].items()}
                )
                for source, pin in value["pins"].items()
            },
            whole=value["whole"] is True,
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DownloadError(
            f"{path} is no record of a download; delete it and run the command again"
        ) from error


def write_record(folder: Path, record: Record) -> None:
    write_atomically(record_path(folder), f"{json.dumps(asdict(record), indent=1)}\n".encode())


def some(problems: list[str]) -> str:
    """The first few, and how many more."""
    more = len(problems) - _LISTED
    return "; ".join(problems[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


@contextmanager
def exclusive(path: Path, waiting: str) -> Iterator[None]:
    """Holds the lock file `path`; while another process holds it, prints `waiting` once and waits.

    The file goes when the block ends, however it ends; only a killed process leaves it, for the next one.

    Raises DownloadError when the file cannot be made or this file system has no locks.
    """
    with _locked(path, waiting):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # who waits for it sees that, see below


def _locked(path: Path, waiting: str) -> IO[str]:
    """The open file of a lock that is held until it is closed."""
    while True:
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
            # The one that was waited for has taken this file away; another may have made a new one meanwhile.
            if _is_at(path, file):
                return file
            file.close()
        except OSError as error:
            file.close()
            raise DownloadError(f"{path}: cannot be locked ({error.strerror}); see --output_dir") from error


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
