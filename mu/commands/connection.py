"""What went wrong with a connection: worth another attempt, or an error that says what to do."""

from __future__ import annotations

import errno
import socket
import ssl
import urllib.error

from mu.commands.files import DownloadError, DownloadQuotaError, shown_url
from mu.commands.pages import QuotaError, page_error

LONGEST_WAIT_S = 60.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TransientError(Exception):
    """Worth another attempt."""

    def __init__(self, why: str, *, wait_s: float = 0.0, restart: bool = False) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.restart = restart


def http_error(error: urllib.error.HTTPError, url: str, *, have: int) -> Exception:
    """The error for an answer of 4xx or 5xx; `have` bytes of the file are there already."""
    if error.code == 416:
        return TransientError("the server does not go on where the file stopped", restart=have > 0)
    if error.code in _TRANSIENT:
        wait = error.headers.get("Retry-After", "")
        seconds = min(float(wait), LONGEST_WAIT_S) if wait.isdecimal() else 0.0
        return TransientError(f"the server answered {error.code} {error.reason}", wait_s=seconds)
    body = error.read(1 << 16)
    quota = page_error(body)
    if isinstance(quota, QuotaError):
        return refused_page(body, url)
    return DownloadError(
        f"{shown_url(url)}: the server answered {error.code} {error.reason}. Public links die: take another source "
        "with --url, which may also be a file on this machine."
    )


def connection_error(reason: object, url: str) -> Exception:
    """The error for a connection that broke, or was never made, or could not be written down."""
    if isinstance(reason, socket.gaierror):
        return DownloadError(
            f"{shown_url(url)}: its host cannot be found ({reason.strerror}). Is there a network?"
        )
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DownloadError(f"{shown_url(url)}: its certificate is not trusted ({reason.verify_message})")
    if isinstance(reason, OSError) and reason.filename is not None:
        return reason  # a file of ours: a full disk, or no permission
    if isinstance(reason, OSError) and reason.errno in _DISK_ERRORS:
        return DownloadError(f"{shown_url(url)}: cannot be written ({reason.strerror})")
    return TransientError(f"the connection failed ({reason or type(reason).__name__})")


def refused_page(body: bytes, url: str) -> DownloadError:
    """The error for a page that came instead of the file."""
    error = page_error(body)
    kind = DownloadQuotaError if isinstance(error, QuotaError) else DownloadError
    return kind(f"{shown_url(url)}: {error}")


def content_range(text: str) -> tuple[int, int | None]:
    """(first byte, bytes of the whole file or None) of a Content-Range header. Raises TransientError."""
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    start = span.partition("-")[0]
    if unit != "bytes" or not start.isdecimal() or not (total == "*" or total.isdecimal()):
        raise TransientError("the server sent a part of the file without saying which", restart=True)
    return int(start), None if total == "*" else int(total)
