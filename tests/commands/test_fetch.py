"""One file over HTTP, from a server on the loopback interface that really fails."""

from __future__ import annotations

import hashlib
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from mu.commands.fetch import fetch
from mu.commands.files import DownloadError, DownloadQuotaError, shown_url

BODY = b"".join(hashlib.sha256(str(index).encode()).digest() for index in range(4000))
SHA256 = hashlib.sha256(BODY).hexdigest()
QUICK: dict[str, Any] = {"backoff_s": 0.001, "timeout_s": 5.0, "progress": False}


def test_a_file_comes_whole_and_the_second_call_asks_nobody(server: Any, tmp_path: Path) -> None:
    url = server.put("a.zip", BODY)
    first = fetch(url, tmp_path / "a.zip", **QUICK)
    second = fetch(url, tmp_path / "a.zip", **QUICK)
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert (first, second) == (SHA256, SHA256)
    assert len(server.requests) == 1


def test_promise_08_a_cut_connection_is_resumed_by_the_next_run(server: Any, tmp_path: Path) -> None:
    url, target = server.put("a.zip", BODY), tmp_path / "a.zip"
    server.faults.cut_after = [50_000]
    with pytest.raises(DownloadError, match=r"announced 128,000 bytes and closed after 50,000.*kept"):
        fetch(url, target, attempts=1, **QUICK)
    assert not target.exists()
    assert fetch(url, target, **QUICK) == SHA256
    assert [asked for _, asked in server.requests] == [None, "bytes=50000-"]
    assert target.read_bytes() == BODY


def test_a_connection_cut_again_and_again_is_resumed_within_one_run(server: Any, tmp_path: Path) -> None:
    url = server.put("a.zip", BODY)
    server.faults.cut_after = [20_000] * 6  # more often than attempts: each brings something on
    assert fetch(url, tmp_path / "a.zip", attempts=3, **QUICK) == SHA256
    assert len(server.requests) == 7


def test_a_file_that_changed_meanwhile_is_begun_anew(server: Any, tmp_path: Path) -> None:
    url, target = server.put("a.zip", BODY), tmp_path / "a.zip"
    server.faults.cut_after = [50_000]
    with pytest.raises(DownloadError):
        fetch(url, target, attempts=1, **QUICK)
    server.put("a.zip", BODY[::-1])
    server.faults.etag = '"v2"'
    fetch(url, target, **QUICK)
    assert target.read_bytes() == BODY[::-1]


@pytest.mark.parametrize("etag", ['W/"v1"', None])
def test_without_a_strong_etag_no_halves_of_two_files_are_joined(
    server: Any, tmp_path: Path, etag: str | None
) -> None:
    url, target = server.put("a.zip", BODY), tmp_path / "a.zip"
    server.faults.etag, server.faults.cut_after = etag, [50_000]
    with pytest.raises(DownloadError):
        fetch(url, target, attempts=1, **QUICK)
    server.put("a.zip", BODY[::-1])
    server.faults.etag = etag and 'W/"v2"'
    fetch(url, target, **QUICK)
    assert target.read_bytes() == BODY[::-1]


def test_a_server_without_ranges_sends_it_again_from_the_start(server: Any, tmp_path: Path) -> None:
    url = server.put("a.zip", BODY)
    server.faults.ignore_range, server.faults.cut_after = True, [50_000, 90_000]
    assert fetch(url, tmp_path / "a.zip", **QUICK) == SHA256


def test_a_length_that_never_comes_is_an_error_and_leaves_nothing(server: Any, tmp_path: Path) -> None:
    url = server.put("a.zip", BODY)
    server.faults.announce_more = 1000
    with pytest.raises(DownloadError, match="announced 129,000 bytes and closed after 128,000"):
        fetch(url, tmp_path / "a.zip", attempts=3, **QUICK)
    assert not (tmp_path / "a.zip").exists()


def test_promise_09_a_wrong_hash_is_an_error_and_nothing_stands_there(server: Any, tmp_path: Path) -> None:
    url = server.put("a.zip", BODY)
    with pytest.raises(DownloadError, match=f"is {SHA256}, and should be {'0' * 64}"):
        fetch(url, tmp_path / "a.zip", sha256="0" * 64, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_beginning_is_fetched_again_when_the_hash_is_known(server: Any, tmp_path: Path) -> None:
    url, target = server.put("a.zip", BODY), tmp_path / "a.zip"
    server.faults.cut_after = [50_000]
    with pytest.raises(DownloadError):
        fetch(url, target, sha256=SHA256, attempts=1, **QUICK)
    part = tmp_path / "a.zip.part"
    part.write_bytes(b"\0" * 50_000)
    assert fetch(url, target, sha256=SHA256, **QUICK) == SHA256


QUOTA = (
    b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>Sorry</body></html>"
)


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_promise_10_a_quota_page_is_named_and_not_kept(
    server: Any, tmp_path: Path, content_type: str
) -> None:
    url = server.put("a.zip", QUOTA)
    server.faults.content_type = content_type
    with pytest.raises(DownloadQuotaError, match=r"quota exceeded.*--url"):
        fetch(url, tmp_path / "a.zip", **QUICK)
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 1


def test_promise_10_any_other_page_is_not_kept_either(server: Any, tmp_path: Path) -> None:
    url = server.put("a.zip", b"\n <html><title>Sign &amp; in</title></html>")
    with pytest.raises(DownloadError, match=r"web page \('Sign & in'\) came instead of the file"):
        fetch(url, tmp_path / "a.zip", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_server_in_trouble_is_asked_again_a_missing_file_is_not(server: Any, tmp_path: Path) -> None:
    url = server.put("a.zip", BODY)
    server.faults.status = [503, 500, 429]
    assert fetch(url, tmp_path / "a.zip", **QUICK) == SHA256
    assert len(server.requests) == 4
    with pytest.raises(DownloadError, match=r"answered 404.*--url"):
        fetch(server.url("none.zip"), tmp_path / "b.zip", **QUICK)
    assert len(server.requests) == 5


def test_nobody_listening_is_an_error_after_some_attempts(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"connection failed.*2 times in a row"):
        fetch("http://127.0.0.1:9/a.zip", tmp_path / "a.zip", attempts=2, **QUICK)


def test_a_full_disk_is_an_error_that_says_so(server: Any, tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses the write for real, as a full disk would."""
    url = server.put("a.zip", BODY)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(DownloadError, match="cannot be written"):
            fetch(url, tmp_path / "a.zip", **QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "a.zip").exists()


def test_too_little_disk_is_found_before_the_transfer(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mu.commands.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DownloadError, match=r"128,000 bytes are needed, 1,000 are free"):
        fetch(server.put("a.zip", BODY), tmp_path / "a.zip", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_secret_in_a_url_is_not_shown() -> None:
    shown = shown_url("https://me:secret@host.test/a.zip?token=secret#secret")
    assert shown.startswith("https://host.test/a.zip?#")
    assert "secret" not in shown
