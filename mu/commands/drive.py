"""Files of Google Drive that anyone with the link may have. Drive gives no hashes; who calls keeps the first-seen."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mu.commands.archive import proper_name
from mu.commands.files import (
    QUOTA_ADVICE,
    DownloadError,
    DownloadQuotaError,
    looks_like_page,
    page_error,
    says_quota,
)
from mu.commands.sources import OTHER_SOURCE, Drive
from mu.errors import first_line


def drive_link(url: str) -> tuple[str, bool] | None:
    """(id, whether of a folder) of a link to Google Drive; None for any other URL."""
    parts = urllib.parse.urlsplit(url)
    if parts.hostname not in ("drive.google.com", "docs.google.com", "drive.usercontent.google.com"):
        return None
    folder = re.search(r"/folders/([-\w]+)", parts.path)
    file = re.search(r"/d/([-\w]+)", parts.path)
    query = urllib.parse.parse_qs(parts.query).get("id", [])
    if folder:
        return folder[1], True
    found = file[1] if file else query[0] if query else None
    return None if found is None else (found, False)


def fetch_drive_file(file_id: str, folder: Path, *, progress: bool) -> tuple[Path, str]:
    """Fetches one file into `folder`, under the name that Drive gives it. Raises DownloadError."""
    own = folder / file_id
    own.mkdir(exist_ok=True)
    found = _fetch(file_id, f"{own}{os.sep}", f"drive:{file_id}", progress=progress)
    return found, proper_name(f"drive:{file_id}", found.name)


def fetch_drive(drive: Drive, folder: Path, *, progress: bool) -> list[tuple[Path, str]]:
    """Fetches the files of a public folder: [(path, name in the folder)]. Raises DownloadError."""
    import gdown

    with _errors_told(drive.text):
        listed: Any = gdown.download_folder(
            id=drive.folder, quiet=True, use_cookies=False, skip_download=True
        )
    if not listed:
        raise DownloadError(f"{drive.text}: the folder is empty or not public. {OTHER_SOURCE}")
    files = []
    for number, file in enumerate(listed, 1):
        name, what = proper_name(drive.text, file.path), f"{drive.text}: {file.path}"
        target = folder / drive.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{what} ({number} of {len(listed)})", flush=True)
        files.append((_fetch(file.id, str(target), what, progress=progress), name))
    return files


def _fetch(file_id: str, output: str, what: str, *, progress: bool) -> Path:
    """One file, to the path or into the folder `output`; a web page in its place is removed."""
    import gdown

    with _errors_told(what):
        path = Path(
            str(gdown.download(id=file_id, output=output, quiet=not progress, use_cookies=False, resume=True))
        )
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    if looks_like_page(start):
        path.unlink()
        raise page_error(start, what)
    return path


@contextmanager
def _errors_told(what: str) -> Iterator[None]:
    import gdown
    import requests

    try:
        yield
    except (gdown.exceptions.DownloadError, requests.RequestException, OSError) as error:
        if says_quota(str(error)):
            raise DownloadQuotaError(f"{what}: {QUOTA_ADVICE}") from error
        raise DownloadError(
            f"{what}: Google Drive does not give it ({first_line(error)}). {OTHER_SOURCE}"
        ) from error
