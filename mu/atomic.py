"""Files that are always whole: at a path there is the old file or the whole new one, also after a kill.

What is written goes to a temporary file beside its place (`.<name>.<random>.tmp`, a long name cut), is synced, and is
renamed over it. Imports nothing heavy, so that every module may use it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mu.errors import MuError

_TOGETHER = ".together"


class WriteError(MuError):
    """A file could not be written; what was there before is unchanged.

    No OSError, which a download would take for a connection that broke.
    """


@contextmanager
def written_beside(path: str | Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary path to write to; afterwards sync it and rename it over `path`, or remove it on any failure.

    Missing folders are made. A symbolic link is followed, not replaced. The file keeps the permissions of the one that
    it replaces; a new one gets what the umask leaves.

    Args:
        needed_bytes: for the message.

    Raises:
        WriteError: an OSError while writing; names the path, the bytes needed and those that are free.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = staged_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _set_mode(temporary, target)
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise WriteError(
            f"{path} could not be written ({error.strerror or error}): {needed_bytes:,} bytes are needed, "
            f"{_free_bytes(target)} are free there; free some space or choose another folder. A file that was there "
            "before is unchanged"
        ) from error
    finally:
        if os.path.lexists(temporary):
            temporary.unlink()


def staged_beside(target: Path) -> Path:
    """A new hidden name beside `target`: a long one is cut, as file systems take 255 bytes."""
    stem = target.name.encode()[:200].decode(errors="ignore")
    return target.with_name(f".{stem}.{secrets.token_hex(6)}.tmp")


def write_atomically(path: str | Path, content: bytes) -> Path:
    """Write a whole file, see `written_beside`. Returns `path`. Raises WriteError."""
    path = Path(path)
    with written_beside(path, len(content)) as temporary, open(temporary, "wb") as file:
        file.write(content)
    return path


def write_together(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Write files below `folder`, of which `finish_writes` leaves all or none, whenever the process is killed.

    A file that is there already stays: another process may have made it, and gone on with it.

    Args:
        contents: path relative to `folder` -> content.

    Raises:
        WriteError: see `written_beside`; none of the files is written.
    """
    staged = Path(folder) / f".{secrets.token_hex(6)}.tmp"
    ready = staged.with_suffix(_TOGETHER)
    try:
        for name, content in contents.items():
            write_atomically(staged / name, content)
        os.rename(staged, ready)
        _sync(ready.parent)
    finally:
        if staged.exists():
            shutil.rmtree(staged)
    _put_in_place(ready)


def finish_writes(folder: str | Path) -> None:
    """Put in place what a `write_together` into `folder` had written when its process was killed."""
    for ready in Path(folder).glob(f".*{_TOGETHER}"):
        _put_in_place(ready)


def _put_in_place(ready: Path) -> None:
    """Another process may be doing the same, and be faster."""
    for inside, _, names in os.walk(ready):
        target = ready.parent / Path(inside).relative_to(ready)
        target.mkdir(exist_ok=True)
        for name in names:
            with suppress(FileNotFoundError):
                if not (target / name).exists():
                    os.replace(Path(inside, name), target / name)
        _sync(target)
    shutil.rmtree(ready, ignore_errors=True)


def _set_mode(temporary: Path, target: Path) -> None:
    """Some libraries write with permissions of their own."""
    if target.exists():
        mode = target.stat().st_mode & 0o7777
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    temporary.chmod(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(target: Path) -> str:
    folder = next((parent for parent in target.parents if parent.is_dir()), target.parent)
    return f"{shutil.disk_usage(folder).free:,}"
