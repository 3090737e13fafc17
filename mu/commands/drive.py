"""Files of Google Drive that anyone with the link may have. Drive gives no hashes; who calls keeps the first-seen."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path
from typing import Any

from mu.commands.archive import proper_name
from mu.commands.files import DownloadError, DownloadQuotaError
from mu.commands.hub import first_line
from mu.commands.pages import QUOTA_ADVICE, looks_like_page, page_error, says_quota
from mu.commands.sources import OTHER_SOURCE, Drive


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
    import gdown

    own = folder / file_id
    own.mkdir(exist_ok=True)
    what = f"drive:{file_id}"
    try:
        path = gdown.download(
            id=file_id, output=f"{own}{os.sep}", quiet=not progress, use_cookies=False, resume=True
        )
    except _failures() as error:
        raise _drive_error(what, error) from error
    found = Path(str(path))
    _refuse_page(found, what)
    return found, proper_name(what, found.name)


def fetch_drive(drive: Drive, folder: Path, *, progress: bool) -> list[tuple[Path, str]]:
    """Fetches the files of a public folder: [(path, name in the folder)]. Raises DownloadError."""
    import gdown

    try:
        listed: Any = gdown.download_folder(
            id=drive.folder, quiet=True, use_cookies=False, skip_download=True
        )
    except _failures() as error:
        raise _drive_error(drive.text, error) from error
    if not listed:
        raise DownloadError(f"{drive.text}: the folder is empty or not public. {OTHER_SOURCE}")
    files = []
    for number, file in enumerate(listed, 1):
        name, what = proper_name(drive.text, file.path), f"{drive.text}: {file.path}"
        target = folder / drive.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{what} ({number} of {len(listed)})", flush=True)
        try:
            gdown.download(id=file.id, output=str(target), quiet=not progress, use_cookies=False, resume=True)
        except _failures() as error:
            raise _drive_error(what, error) from error
        _refuse_page(target, what)
        files.append((target, name))
    return files


def _refuse_page(path: Path, what: str) -> None:
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    if looks_like_page(start):
        path.unlink()
        raise _drive_error(what, page_error(start))


def _failures() -> tuple[type[Exception], ...]:
    import gdown
    import requests

    return gdown.exceptions.DownloadError, requests.RequestException, OSError


def _drive_error(what: str, error: Exception) -> DownloadError:
    if says_quota(str(error)):
        return DownloadQuotaError(f"{what}: {QUOTA_ADVICE}")
    return DownloadError(f"{what}: Google Drive does not give it ({first_line(error)}). {OTHER_SOURCE}")
