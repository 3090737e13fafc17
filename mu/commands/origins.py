"""What a command was asked for, and where it is fetched from: the hub, Drive, a URL, a mirror, or this machine."""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from mu.commands.archive import Limits
from mu.commands.drive import drive_link, fetch_drive, fetch_drive_file
from mu.commands.fetch import fetch
from mu.commands.files import DownloadError, sha256_of, shown_url
from mu.commands.hub import fetch_hub
from mu.commands.record import Pin
from mu.commands.sources import MIRROR_VARIABLE, Drive, Hub, Source


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a command was asked for. `folder` None is the source's own; `url` None its own origin, or the mirror."""

    source: Source
    folder: Path | None = None
    url: str | None = None
    revision: str | None = None
    sha256: str | None = None
    force: bool = False
    limits: Limits = field(default_factory=Limits)
    progress: bool = True


@dataclass(frozen=True)
class Payload:
    """Files that have been fetched, with their names, and what they are known by."""

    files: list[tuple[Path, str]]
    pin: Pin
    listing: bool = False
    """A whole folder of files, which keep their names; otherwise one archive, or one checkpoint."""
    keep: bool = False
    """The file is the user's own: it is copied, and stays when it is damaged."""


def place_of(source: Source, url: str | None) -> tuple[str | None, str]:
    """(URL or path that replaces the source's own origin, what the record calls the place). Raises DownloadError."""
    mirror = os.environ.get(MIRROR_VARIABLE, "").strip()
    if url is None and mirror:
        url = f"{mirror.rstrip('/')}/{source.mirror_name}"
    if url is None:
        return None, source.origin.text
    path = local_file(url)
    return url, shown_url(url) if path is None else f"file:{path.absolute()}"


def local_file(url: str) -> Path | None:
    """The path that a `file:` URL or a plain path means; None for http and https. Raises DownloadError."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise DownloadError(f"--url: {url!r} is no URL ({error})") from error
    if parts.scheme in ("http", "https"):
        if not parts.hostname or not url.isprintable() or " " in url:
            raise DownloadError(
                f"--url: {url!r} is no URL: a host is missing, or a space is to be written as %20"
            )
        return None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise DownloadError(f"--url: {url} names another machine; write file:///path")
        return Path(urllib.request.url2pathname(parts.path))
    if "://" in url:
        raise DownloadError(f"--url: {parts.scheme}: is not supported; give http, https, file or a path")
    return Path(os.path.expanduser(url))


def fetch_payload(wish: Wish, staging: Path, url: str | None, pin: Pin) -> Payload:
    """Gets the files, from wherever they are to come, and holds them to the hashes that were asked for or seen before.

    Args:
        staging: the folder that receives them.
        url: replaces the source's own origin.
        pin: what this origin was the first time.

    Raises:
        DownloadError: nothing came, or something else than the first time.
    """
    origin = wish.source.origin
    if url is None and isinstance(origin, Hub):
        commit, files = fetch_hub(origin, wish.revision or pin.revision, staging, progress=wish.progress)
        hashes = _hashes(files) if origin.file else {}  # of a whole repository, the commit says enough
        payload = Payload(files, Pin(commit, hashes), listing=not origin.file)
        pin = Pin()  # the hub's own hashes have been compared
    elif url is None and isinstance(origin, Drive):
        payload = _from_drive(origin, wish, staging)
    else:
        assert url is not None
        payload = _from_url(wish, staging, url)

    found, expected = payload.pin.sha256, pin.sha256
    seen, advice = "seen the first time", "If the new one is meant, give it with --sha256."
    if payload.listing:
        advice = "If the new files are meant, delete the record (.download.json) beside the folder."
    if wish.sha256 is not None:
        if len(found) != 1 or payload.listing:
            raise DownloadError(f"--sha256 belongs to one file; {wish.source.name} comes as several there")
        expected, seen, advice = {name: wish.sha256.lower() for name in found}, "asked for", ""
    for name, sha256 in expected.items():
        if found.get(name, sha256) != sha256:
            raise DownloadError(
                f"{name}: its SHA-256 is {found[name]}; {seen} was {sha256}. Nothing was changed. {advice}".rstrip()
            )
    return payload


def _from_url(wish: Wish, staging: Path, url: str) -> Payload:
    if wish.revision is not None:
        raise DownloadError(
            "--revision belongs to sources on the Hugging Face hub; with --url, give --sha256"
        )
    path, link = local_file(url), drive_link(url)
    if path is not None:
        if not path.is_file():
            raise DownloadError(
                f"--url: {path} is not a file on this machine; give an archive, or an http(s) URL"
            )
        files = [(path, path.name)]
    elif link is not None and link[1]:
        return _from_drive(Drive(link[0]), wish, staging)
    elif link is not None:
        files = [fetch_drive_file(link[0], staging, progress=wish.progress)]
    else:
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
        if not name or name.startswith("."):
            name = f"{wish.source.folder.name}.download"
        sha256 = wish.sha256.lower() if wish.sha256 is not None else None
        fetched = fetch(url, staging / name, sha256=sha256, progress=wish.progress)
        return Payload([(staging / name, name)], Pin(None, {name: fetched}))
    return Payload(files, Pin(None, _hashes(files)), keep=path is not None)


def _from_drive(drive: Drive, wish: Wish, staging: Path) -> Payload:
    files = fetch_drive(drive, staging, progress=wish.progress)
    return Payload(files, Pin(None, _hashes(files)), listing=True)


def _hashes(files: list[tuple[Path, str]]) -> dict[str, str]:
    return {name: sha256_of(path) for path, name in files}
