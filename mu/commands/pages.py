"""What a web page that comes instead of a file says: a quota, a question, or only that the link is wrong."""

from __future__ import annotations

import html
import re

from mu.errors import MuError

_QUOTA = (
    "quota exceeded",
    "quota for this file has been exceeded",
    "download quota",
    "too many users have viewed or downloaded",
    "have had many accesses",
)
QUOTA_ADVICE = (
    "quota exceeded: the file was downloaded too often there. Try again in a day; or open the link in a browser "
    "while logged in, save the file, and give its path with --url; or take another source with --url."
)


class QuotaError(MuError):
    """A page that says the file's quota is used up."""


class PageError(MuError):
    """Any other page."""


def says_quota(text: str) -> bool:
    """Whether a page or a message speaks of a used-up download quota."""
    plain = " ".join(text.lower().split())
    return any(words in plain for words in _QUOTA)


def looks_like_page(start: bytes) -> bool:
    """Whether a file's first bytes are those of a web page."""
    text = start[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype html", b"<html", b"<head"))


def page_error(body: bytes) -> QuotaError | PageError:
    """The error for a page that was sent in place of a file. `body` is its first part."""
    text = body.decode("utf-8", errors="replace")
    if says_quota(text):
        return QuotaError(QUOTA_ADVICE)
    found = re.search(r"<title[^>]*>(.*?)</title>", text, flags=re.I | re.S)
    title = " ".join(html.unescape(found[1]).split())[:80] if found else ""
    return PageError(
        f"a web page{f' ({title!r})' if title else ''} came instead of the file, and was not kept. Open the link in "
        "a browser, save the file, and give its path with --url; or give a direct link."
    )
