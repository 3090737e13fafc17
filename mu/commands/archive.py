"""Archives from strangers: looked through before a byte is written, then unpacked into a new folder.

An archive with one bad entry is refused whole. Modes, owners and dates of its entries are not taken over.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import lzma
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from mu.commands.files import progress_bar, require_disk
from mu.errors import MuError

_RATIO_FLOOR_BYTES = 64 << 20
_LONGEST_READ_BYTES = 16 << 20
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    struct.error,
    EOFError,
    UnicodeError,
    NotImplementedError,
)
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_COMPRESSED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\x00": lzma}
"""How a compressed tar begins -> the library that reads it."""
_JUNK = re.compile(r"(^|/)(__MACOSX(/|$)|\.DS_Store$|Thumbs\.db$|\._[^/]*$)")


class ArchiveError(MuError, ValueError):
    """An archive that is not unpacked: the message names the entry, or the limit and how to raise it."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold before it counts as a bomb."""

    max_files: int = 500_000
    max_bytes: int = 500 << 30
    """Of all entries, unpacked."""
    max_ratio: float = 200.0
    """Unpacked bytes for each byte of the archive; not asked below 64 MiB unpacked."""


@dataclass(frozen=True)
class _Entry:
    name: str
    """Relative, with plain slashes."""
    size: int
    folder: bool
    open: Callable[[], Any]
    """Its content as a file; only while the archive is open, and for a tar, until the next entry."""


def archive_kind(path: Path) -> str | None:
    """`zip`, `tar`, or None for what is neither. A torch checkpoint, which is a zip file too, is None."""
    with open(path, "rb") as file:
        start = file.read(262)
    if start.startswith(_ZIP):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except _DAMAGE:
            return "zip"  # cut off: whoever unpacks it says so
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        return None if pickles and f"{pickles[0].partition('/')[0]}/version" in names else "zip"
    return "tar" if start.startswith(tuple(_COMPRESSED)) or start[257:262] == b"ustar" else None


def unpack(path: Path, folder: Path, *, limits: Limits, progress: bool = True) -> list[str]:
    """Unpacks an archive into `folder`, which must not exist yet; returns the files, relative to it.

    Leftovers of file managers (`__MACOSX`, `.DS_Store`) are skipped.

    Raises:
        ArchiveError: an entry that leaves the folder, a link, a device, a name that comes twice, more than
            `limits` allow, encryption, damage. Nothing is left of `folder` then.
        DownloadError: the disk is too full.
    """
    with _damage_told(path):
        # 1. Every entry is looked at before the first byte is written.
        total = _check(path, limits)
        require_disk(folder.parent, total, what=f"the content of {path.name}")

        # 2. Unpack, entry by entry.
        folder.mkdir()
        written = []
        try:
            with _opened(path) as entries, progress_bar("unpacking", total, progress) as bar:
                for entry in entries:
                    if _JUNK.search(entry.name):
                        continue
                    target = folder / entry.name
                    (target if entry.folder else target.parent).mkdir(parents=True, exist_ok=True)
                    if not entry.folder:
                        _write(entry, target)
                        written.append(entry.name)
                    bar.update(entry.size)
        except FileExistsError as error:
            shutil.rmtree(folder)
            raise ArchiveError(
                f"{path.name}: {error.filename} would be written twice (does this disk tell capital letters apart?)"
            ) from error
        except BaseException:
            shutil.rmtree(folder)
            raise
    return written


def _write(entry: _Entry, target: Path) -> None:
    with entry.open() as source, open(target, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        if file.tell() != entry.size:
            raise ArchiveError(f"{entry.name}: {entry.size:,} bytes were announced, {file.tell():,} came")


def _check(path: Path, limits: Limits) -> int:
    """The bytes of all entries, unpacked. Raises ArchiveError for the first entry that is not proper."""
    files: set[str] = set()
    folders: set[str] = set()
    total, packed = 0, max(1, path.stat().st_size)
    with _opened(path) as entries:
        for count, entry in enumerate(entries, 1):
            total += entry.size
            for found, allowed, what, option in (
                (count, limits.max_files, "entries", "--max_files"),
                (total, limits.max_bytes, "bytes unpacked", "--max_bytes"),
            ):
                if found > allowed:
                    raise ArchiveError(
                        f"{path.name} holds more than {allowed:,} {what}. If you trust it, raise {option}."
                    )
            if total > max(_RATIO_FLOOR_BYTES, limits.max_ratio * packed):
                raise ArchiveError(
                    f"{path.name}: {packed:,} bytes unpack to {total:,} or more, over {limits.max_ratio:g} times as "
                    "many. If you trust it, raise --max_ratio."
                )
            parents = {parent.as_posix() for parent in PurePosixPath(entry.name).parents} - {"."}
            twice = entry.name in files or (not entry.folder and entry.name in folders)
            if twice or parents & files:
                raise ArchiveError(f"{path.name}: {entry.name!r} stands in it twice")
            folders |= parents
            (folders if entry.folder else files).add(entry.name)
    if not files:
        raise ArchiveError(f"{path.name} is empty")
    return total


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise ArchiveError(f"{path.name} is damaged or cut off ({error})") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Iterator[_Entry]]:
    """The entries in their order; a name, link or device that is not allowed raises ArchiveError."""
    with contextlib.ExitStack() as stack:
        if archive_kind(path) == "zip":
            yield _zip_entries(path, stack.enter_context(zipfile.ZipFile(path)))
        else:
            # Not tarfile's own mode "r:*": a header that claims gigabytes would be read into memory.
            limited = cast("IO[bytes]", _Limited(stack.enter_context(_decompressed(path))))
            yield _tar_entries(path, stack.enter_context(tarfile.open(fileobj=limited, mode="r:")), limited)


def _zip_entries(path: Path, archive: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in archive.infolist():
        # Unix modes stand in the upper half; archives from elsewhere have none.
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _not_a_file(path, info.filename)
        if info.flag_bits & 0x1:
            raise ArchiveError(
                f"{path.name}: {info.filename!r} is encrypted; unpack it yourself, then pack it anew"
            )
        name, folder = proper_name(path.name, info.orig_filename), info.is_dir()
        yield _Entry(name, 0 if folder else info.file_size, folder, functools.partial(archive.open, info))


def _tar_entries(path: Path, archive: tarfile.TarFile, stream: IO[bytes]) -> Iterator[_Entry]:
    while (info := archive.next()) is not None:
        cast(Any, archive).members.clear()  # else it keeps every header of a large archive
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise _not_a_file(path, info.name)
        if info.isdir() and info.name in (".", "./"):
            continue
        name, folder = proper_name(path.name, info.name), info.isdir()
        yield _Entry(name, 0 if folder else info.size, folder, functools.partial(archive.extractfile, info))
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        raise tarfile.ReadError("a header in the middle cannot be read")


def _not_a_file(path: Path, name: str) -> ArchiveError:
    return ArchiveError(f"{path.name}: {name!r} is a link or device, not a file. Nothing was unpacked.")


def proper_name(archive: str, name: str) -> str:
    """The name with plain slashes. Raises ArchiveError when it could lead out of the folder."""
    plain = unicodedata.normalize("NFC", name).replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    outside = plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in parts
    unusable = not parts or any(len(part.encode(errors="replace")) > 255 for part in parts)
    if outside or unusable or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in plain):
        why = "leads out of its folder" if outside else "is no proper file name"
        raise ArchiveError(f"{archive}: {name[:200]!r} {why}. Nothing was unpacked.")
    return "/".join(parts)


def _decompressed(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(6)
    opener: Any = next((library for sign, library in _COMPRESSED.items() if start.startswith(sign)), None)
    return opener.open(path, "rb") if opener is not None else open(path, "rb")


class _Limited:
    """A stream whose single reads are short: a tar header that claims gigabytes would be read into memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _LONGEST_READ_BYTES:
            raise tarfile.ReadError("a header of more than 16 MiB")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
