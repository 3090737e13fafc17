"""One file over HTTP: resumed where it stopped, checked, and never anything but the file under its final name.

While it grows, the file is `<name>.part`, with what is known of it in `<name>.part.json`; afterwards
`<name>.fetched.json` says what it is, so that a later call knows it without asking the server. Who calls holds a lock.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from mu import __version__
from mu.atomic import write_atomically
from mu.commands.connection import (
    LONGEST_WAIT_S,
    TransientError,
    connection_error,
    content_range,
    http_error,
    refused_page,
)
from mu.commands.files import (
    DownloadError,
    require_disk,
    sha256_of,
    shown_url,
    url_key,
)
from mu.commands.pages import looks_like_page

ATTEMPTS = 5
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Fetched:
    """A file that has been fetched, and checked."""

    path: Path
    sha256: str
    size: int
    transferred: bool
    """False: it was there already, and the server was not asked."""


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    attempts: int = ATTEMPTS,
    backoff_s: float = 1.0,
    timeout_s: float = 30.0,
    progress: bool = True,
) -> Fetched:
    """Fetches `url` (http or https) into the file `target`, or finds it there from before.

    Args:
        sha256: what the file's SHA-256 must be, in hex; None takes what comes.
        headers: sent to the URL's own host, but not to one that it redirects to.
        attempts: in a row that bring nothing, before it gives up. Waits grow from `backoff_s` between them.
        timeout_s: without a byte, after which a connection counts as cut.

    Raises:
        DownloadError: no such file, no connection, another hash, no space, a web page instead of the file. What
            was received is kept for the next call if it can be continued; nothing stands at `target`.
    """
    done = _done(url, target, sha256)
    if done is not None:
        return done
    part, notes = _beside(target, ".part"), _beside(target, ".part.json")
    failures, best, resumed = 0, 0, _size(part) > 0
    while True:
        try:
            _transfer(
                url, part, notes, sha256=sha256, headers=headers, timeout_s=timeout_s, progress=progress
            )
        except TransientError as error:
            if error.restart:
                _discard(part, notes)
            grown, best = _size(part) > best, max(best, _size(part))
            failures = 1 if grown else failures + 1
            if failures >= attempts:
                kept = "What came is kept: run the command again to go on." if _size(part) else ""
                raise DownloadError(
                    f"{shown_url(url)}: {error}, {failures} times in a row. {kept}"
                ) from error
            time.sleep(max(error.wait_s, min(backoff_s * 2 ** (failures - 1), LONGEST_WAIT_S)))
            resumed = resumed or _size(part) > 0
            continue
        found = sha256_of(part)
        if sha256 is None or found == sha256.lower():
            break
        _discard(part, notes)
        if not resumed:
            raise DownloadError(
                f"{shown_url(url)}: the SHA-256 is {found}, and should be {sha256}. Nothing was kept. "
                "Try again; if it stays so, the file there has been replaced or damaged."
            )
        resumed = False  # Perhaps only the two halves did not belong together: once more, from the start.
    size = _size(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    notes.unlink(missing_ok=True)
    _write_json(_beside(target, ".fetched.json"), {"url": url_key(url), "sha256": found, "size": size})
    return Fetched(target, found, size, transferred=True)


def forget(target: Path) -> None:
    """Removes a fetched file that turned out to be worth nothing, so that the next call fetches it again."""
    _discard(target, _beside(target, ".fetched.json"))


def _transfer(
    url: str,
    part: Path,
    notes: Path,
    *,
    sha256: str | None,
    headers: Mapping[str, str] | None,
    timeout_s: float,
    progress: bool,
) -> None:
    """One connection: returns when `part` is whole, by what the server says."""
    known = _read_json(notes)
    have, validator = _size(part), known.get("validator")
    if known.get("url") != url_key(url) or not (validator or known.get("etag") or sha256):
        have = 0  # Nothing could tell whether the file there is still the one that was begun.
    request = urllib.request.Request(url, headers={"User-Agent": f"unlearn_diff/{__version__}"})
    request.add_header("Accept-Encoding", "identity")
    for name, value in (headers or {}).items():
        request.add_unredirected_header(name, value)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            _receive(response, url, part, notes, have=have, known=known, progress=progress)
    except urllib.error.HTTPError as error:
        with error:
            whole = error.headers.get("Content-Range", "") == f"bytes */{have}"
            if error.code == 416 and have and whole and known.get("total") in (None, have):
                return
            raise http_error(error, url, have=have) from error
    except urllib.error.URLError as error:
        raise connection_error(error.reason, url) from error
    except (OSError, http.client.HTTPException) as error:
        raise connection_error(error, url) from error


def _receive(
    response: Any, url: str, part: Path, notes: Path, *, have: int, known: Mapping[str, Any], progress: bool
) -> None:
    kind = response.headers.get_content_type()
    if kind in ("text/html", "application/xhtml+xml"):
        raise refused_page(response.read(1 << 16), url)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(
            f"{shown_url(url)}: the server sends the file compressed on the way; use another source."
        )
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    etag = response.headers.get("ETag")
    if response.status == 206:
        start, total = content_range(response.headers.get("Content-Range", ""))
        changed = known.get("total") not in (None, total) or known.get("etag") not in (None, etag)
        if start != have or changed:
            raise TransientError("the file changed on the server", restart=True)
    elif response.status == 200:
        have = 0
    else:
        raise DownloadError(f"{shown_url(url)}: the server answered {response.status} {response.reason}")
    if total is not None:
        require_disk(part.parent, total - have, what=shown_url(url))
    # Only a strong ETag, or a date, may stand in If-Range (RFC 9110, section 13.1.5).
    strong = etag if etag and not etag.startswith("W/") else None
    validator = strong or (response.headers.get("Last-Modified") if not etag else None)
    first = response.read1(_CHUNK)
    if have == 0 and looks_like_page(first):
        raise refused_page(first, url)
    with open(part, "r+b" if have else "wb") as file:
        _write_json(notes, {"url": url_key(url), "validator": validator, "etag": etag, "total": total})
        file.seek(have)
        file.truncate()
        received = have + _copy(response, first, file, have=have, total=total, progress=progress)
    if total is not None and received != total:
        raise TransientError(f"the server announced {total:,} bytes and closed after {received:,}")


def _copy(
    response: Any, chunk: bytes, file: IO[bytes], *, have: int, total: int | None, progress: bool
) -> int:
    """Writes the body to `file`; returns how many bytes came."""
    came = 0
    with tqdm(
        desc=Path(file.name).name.removesuffix(".part"),
        initial=have,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
    ) as bar:
        while chunk:
            file.write(chunk)
            file.flush()
            came += len(chunk)
            bar.update(len(chunk))
            chunk = response.read1(_CHUNK)
    return came


def _done(url: str, target: Path, sha256: str | None) -> Fetched | None:
    known = _read_json(_beside(target, ".fetched.json"))
    if not target.is_file() or known.get("url") != url_key(url) or known.get("size") != _size(target):
        return None
    if sha256 is not None and known.get("sha256") != sha256.lower():
        return None
    return Fetched(target, str(known["sha256"]), int(known["size"]), transferred=False)


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f"{target.name}{ending}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _discard(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value).encode())


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DownloadError(
                f"{shown_url(req.full_url)} leads to {shown_url(newurl)}, which is not encrypted"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)
