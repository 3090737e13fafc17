"""Small things that everything which downloads needs: its errors, hashes, free disk space, URLs without secrets."""

from __future__ import annotations

import hashlib
import shutil
import urllib.parse
from pathlib import Path

from mu.commands.pages import QuotaError
from mu.errors import MuError

SPARE_BYTES = 64 << 20
"""Left free on the disk beside what is written."""


class DownloadError(MuError, RuntimeError):
    """Something could not be fetched: the message says what, why and what to do."""


class DownloadQuotaError(QuotaError, DownloadError):
    """The server hands the file out no more for a while."""


def shown_url(url: str) -> str:
    """The URL as it may be printed and written down: what may hold a secret is left out, a hash tells two apart."""
    parts = urllib.parse.urlsplit(url)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return f"{plain}?#{url_key(url)[:12]}" if parts.query or "@" in parts.netloc else plain


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def require_disk(folder: Path, size: int, *, what: str) -> None:
    """Raises DownloadError when `size` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise DownloadError(
            f"the disk of {folder} is too full for {what}: {size:,} bytes are needed, {free:,} are free. "
            "Free some, or give another folder with --output_dir."
        )


def url_key(url: str) -> str:
    """A hash that stands for the whole URL where the URL itself may hold a secret."""
    return hashlib.sha256(url.encode()).hexdigest()
