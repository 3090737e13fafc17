"""One file over HTTP: resumed where it stopped, checked, and never anything but the file under its final name.

While it grows, the file is `<name>.part`, with what is known of it in `<name>.part.json`; afterwards
`<name>.fetched.json` says what it is, so that a later call knows it without asking the server. Who calls holds a lock.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mu import __version__
from mu.atomic import write_atomically
from mu.commands.files import (
    QUOTA_ADVICE,
    DownloadError,
    DownloadQuotaError,
    looks_like_page,
    page_error,
    progress_bar,
    require_disk,
    says_quota,
    sha256_of,
    shown_url,
    url_key,
)

_ATTEMPTS, _LONGEST_WAIT_S, _CHUNK_BYTES, _PAGE_BYTES = 5, 60.0, 1 << 18, 1 << 16
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


class _CutError(Exception):
    """Worth another attempt, after `wait_s` at least."""

    def __init__(self, why: str, *, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    attempts: int = _ATTEMPTS,
    backoff_s: float = 1.0,
    timeout_s: float = 30.0,
    progress: bool = True,
) -> str:
    """Fetches `url` (http or https) into the file `target`, or finds it there from before; returns its SHA-256 in hex.

    Args:
        sha256: what the file's SHA-256 must be, in hex; None takes what comes.
        headers: sent to the URL's own host, but not to one that it redirects to.
        attempts: in a row that bring nothing, before it gives up. Waits grow from `backoff_s` between them.
        timeout_s: without a byte, after which a connection counts as cut.

    Raises:
        DownloadError: no such file, no connection, another hash, no space, a web page instead of the file. What
            was received is kept for the next call if it can be continued; nothing stands at `target`.
    """
    # 1. Perhaps it came with an earlier call.
    fetched = target.with_name(f"{target.name}.fetched.json")
    known = _read_json(fetched)
    expected = {"url": url_key(url), "size": _size(target), "sha256": sha256 or known.get("sha256")}
    if target.is_file() and known == expected:
        return str(known["sha256"])

    # 2. Connection after connection, until the server has nothing more to send.
    part, notes = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    failures, most, resumed = 0, 0, _size(part) > 0
    while True:
        try:
            _transfer(url, part, notes, sha256, headers, timeout_s=timeout_s, progress=progress)
        except _CutError as error:
            failures = 1 if _size(part) > most else failures + 1
            most, resumed = max(most, _size(part)), resumed or _size(part) > 0
            if failures >= attempts:
                kept = "What came is kept: run the command again to go on." if _size(part) else ""
                raise DownloadError(
                    f"{shown_url(url)}: {error}, {failures} times in a row. {kept}"
                ) from error
            time.sleep(max(error.wait_s, min(backoff_s * 2 ** (failures - 1), _LONGEST_WAIT_S)))
            continue

        # 3. Is it the right file?
        found = sha256_of(part)
        if sha256 in (None, found):
            break
        part.unlink()
        if not resumed:
            notes.unlink()
            raise DownloadError(
                f"{shown_url(url)}: the SHA-256 is {found}, and should be {sha256}. Nothing was kept. "
                "Try again; if it stays so, the file there has been replaced or damaged."
            )
        resumed = False  # Perhaps only the two halves did not belong together: once more, from the start.

    # 4. It gets its name only now.
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    notes.unlink(missing_ok=True)
    _write_json(fetched, {"url": url_key(url), "sha256": found, "size": _size(target)})
    return found


def discard(target: Path) -> None:
    """Removes a fetched file that turned out to be worth nothing, so that the next call fetches it again."""
    target.unlink(missing_ok=True)
    target.with_name(f"{target.name}.fetched.json").unlink(missing_ok=True)


def _transfer(
    url: str, part: Path, notes: Path, sha256: str | None, headers: Mapping[str, str] | None, *,
    timeout_s: float, progress: bool,
) -> None:  # fmt: skip
    """One connection: returns when `part` is whole, by what the server says. Raises _CutError and DownloadError."""
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
            if error.code == 416:
                part.unlink(missing_ok=True)
            raise _refusal(error, url) from error
    except (OSError, http.client.HTTPException) as error:
        raise _connection_error(getattr(error, "reason", error), url) from error


def _receive(
    response: Any, url: str, part: Path, notes: Path, *, have: int, known: Mapping[str, Any], progress: bool
) -> None:
    """Appends the answer to `part`, which holds `have` bytes; or writes it anew when the server sends all of it."""
    # 1. Is it the file, and which part of it?
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise page_error(response.read(_PAGE_BYTES), shown_url(url))
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(
            f"{shown_url(url)}: the server sends the file compressed on the way; use another source."
        )
    etag, length = response.headers.get("ETag"), response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(?:\*|(\d+))", response.headers.get("Content-Range", ""))
        total = int(span[2]) if span and span[2] else None
        changed = known.get("total") not in (None, total) or known.get("etag") not in (None, etag)
        if span is None or int(span[1]) != have or changed:
            part.unlink(missing_ok=True)
            raise _CutError("the file changed on the server")
    elif response.status == 200:
        have = 0
    else:
        raise DownloadError(f"{shown_url(url)}: the server answered {response.status} {response.reason}")
    if total is not None:
        require_disk(part.parent, total - have, what=shown_url(url))
    chunk = response.read1(_CHUNK_BYTES)
    if have == 0 and looks_like_page(chunk):
        raise page_error(chunk, shown_url(url))

    # 2. Write down what tells the file from another one, then the bytes as they come.
    # Only a strong ETag, or a date, may stand in If-Range (RFC 9110, section 13.1.5).
    strong = etag if etag and not etag.startswith("W/") else None
    validator = strong or (response.headers.get("Last-Modified") if not etag else None)
    with (
        open(part, "r+b" if have else "wb") as file,
        progress_bar(part.stem, total, progress, initial=have) as bar,
    ):
        _write_json(notes, {"url": url_key(url), "validator": validator, "etag": etag, "total": total})
        file.seek(have)
        file.truncate()
        while chunk:
            file.write(chunk)
            file.flush()
            bar.update(len(chunk))
            chunk = response.read1(_CHUNK_BYTES)
        if total is not None and file.tell() != total:
            raise _CutError(f"the server announced {total:,} bytes and closed after {file.tell():,}")


def _refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    if error.code == 416:
        return _CutError("the server does not go on where the file stopped")
    if error.code in _PASSING_STATUS:
        wait = error.headers.get("Retry-After", "")
        wait_s = min(float(wait), _LONGEST_WAIT_S) if wait.isdecimal() else 0.0
        return _CutError(f"the server answered {error.code} {error.reason}", wait_s=wait_s)
    if says_quota(error.read(_PAGE_BYTES).decode("utf-8", errors="replace")):
        return DownloadQuotaError(f"{shown_url(url)}: {QUOTA_ADVICE}")
    return DownloadError(
        f"{shown_url(url)}: the server answered {error.code} {error.reason}. Public links die: take another source "
        "with --url, which may also be a file on this machine."
    )


def _connection_error(reason: object, url: str) -> Exception:
    if isinstance(reason, socket.gaierror):
        return DownloadError(
            f"{shown_url(url)}: its host cannot be found ({reason.strerror}). Is there a network?"
        )
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DownloadError(f"{shown_url(url)}: its certificate is not trusted ({reason.verify_message})")
    if isinstance(reason, OSError) and reason.filename is not None:
        return reason  # a file of ours, to which there is no permission
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DownloadError(f"{shown_url(url)}: cannot be written ({reason.strerror})")
    return _CutError(f"the connection failed ({reason or type(reason).__name__})")


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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value).encode())
