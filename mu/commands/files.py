"""What everything that downloads needs: its errors, web pages in place of files, hashes, disk space, bare URLs."""

from __future__ import annotations

import hashlib
import html
import re
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mu.errors import MuError

SPARE_BYTES = 64 << 20
"""Left free on the disk beside what is written."""
QUOTA_ADVICE = (
    "quota exceeded: the file was downloaded too often there. Try again in a day; or open the link in a browser "
    "while logged in, save the file, and give its path with --url; or take another source with --url."
)
_QUOTA = (
    "quota exceeded",
    "quota for this file has been exceeded",
    "download quota",
    "too many users have viewed or downloaded",
    "have had many accesses",
)


class DownloadError(MuError, RuntimeError):
    """Something could not be fetched: the message says what, why and what to do."""


class DownloadQuotaError(DownloadError):
    """The server hands the file out no more for a while."""


def looks_like_page(start: bytes) -> bool:
    """Whether a file's first bytes are those of a web page."""
    text = start[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype html", b"<html", b"<head"))


def says_quota(text: str) -> bool:
    """Whether a page or a message speaks of a used-up download quota."""
    plain = " ".join(text.lower().split())
    return any(words in plain for words in _QUOTA)


def page_error(body: bytes, what: str) -> DownloadError:
    """The error for a web page that came instead of the file `what`; `body` is the first part of the page."""
    text = body.decode("utf-8", errors="replace")
    if says_quota(text):
        return DownloadQuotaError(f"{what}: {QUOTA_ADVICE}")
    found = re.search(r"<title[^>]*>(.*?)</title>", text, flags=re.I | re.S)
    title = f" ({' '.join(html.unescape(found[1]).split())[:80]!r})" if found else ""
    return DownloadError(
        f"{what}: a web page{title} came instead of the file, and was not kept. Open the link in a browser, save the "
        "file, and give its path with --url; or give a direct link."
    )


def require_disk(folder: Path, size: int, *, what: str) -> None:
    """Raises DownloadError when `size` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise DownloadError(
            f"the disk of {folder} is too full for {what}: {size:,} bytes are needed, {free:,} are free. "
            "Free some, or give another folder with --output_dir."
        )


def progress_bar(name: str, total: int | None, shown: bool, initial: int = 0) -> Any:
    """A bar that counts bytes."""
    return tqdm(
        desc=name, total=total, initial=initial, disable=not shown, unit="B", unit_scale=True, unit_divisor=1024
    )  # fmt: skip


def shown_url(url: str) -> str:
    """The URL as it may be printed and written down: what may hold a secret is left out, a hash tells two apart."""
    parts = urllib.parse.urlsplit(url)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return f"{plain}?#{url_key(url)[:12]}" if parts.query or "@" in parts.netloc else plain


def url_key(url: str) -> str:
    """A hash that stands for the whole URL where the URL itself may hold a secret."""
    return hashlib.sha256(url.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
