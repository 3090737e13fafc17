"""A source into its folder: from a URL, a mirror, this machine, the hub and Drive."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mu.commands import download_data
from mu.commands import fetch as fetch_module
from mu.commands.archive import ArchiveError, Limits
from mu.commands.download import download
from mu.commands.files import DownloadError, DownloadQuotaError
from mu.commands.origins import Wish
from mu.commands.record import exclusive
from mu.commands.sources import DATA, DATA_ALIASES, MIRROR_VARIABLE, MODELS, Hub
from tests.commands.conftest import noise

SOURCE = DATA["sample", "quick_canvas"]
COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (MIRROR_VARIABLE, "HF_ENDPOINT", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.chdir(tmp_path)


def wish(url: str | None = None, **more: Any) -> Wish:
    return Wish(**{"source": SOURCE, "folder": Path("data/sample"), "url": url, "progress": False, **more})


def content(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_archive_lands_without_the_folder_around_it(server: Any, canvas_zip: bytes) -> None:
    result = download(wish(server.put("x.zip", canvas_zip)))
    assert len(content(result.folder)) == 12
    assert (result.folder / "Cubism/Cats/1.jpg").stat().st_size == 900
    left = sorted(path.name for path in result.folder.parent.iterdir())
    assert left == ["sample", "sample.download.json"]


def test_the_second_call_does_nothing(server: Any, canvas_zip: bytes) -> None:
    url = server.put("x.zip", canvas_zip)
    download(wish(url))
    again = download(wish(url))
    assert "nothing was downloaded" in again.note
    assert len(again.files) == 12
    assert len(server.requests) == 1


def test_force_downloads_again_and_leaves_what_others_put_there(server: Any, canvas_zip: bytes) -> None:
    url = server.put("x.zip", canvas_zip)
    folder = download(wish(url)).folder
    (folder / "mine.txt").write_text("mine")
    (folder / "Cubism/Cats/1.jpg").write_bytes(b"spoilt")
    download(wish(url, force=True))
    assert (folder / "mine.txt").read_text() == "mine"
    assert (folder / "Cubism/Cats/1.jpg").stat().st_size == 900
    assert len(server.requests) == 2


def test_a_folder_of_somebody_else_is_not_touched(server: Any, canvas_zip: bytes) -> None:
    Path("data/sample").mkdir(parents=True)
    Path("data/sample/mine.txt").write_text("mine")
    with pytest.raises(DownloadError, match=r"not empty.*--output_dir.*--force"):
        download(wish(server.put("x.zip", canvas_zip)))
    assert content(Path("data/sample")) == {"mine.txt"}
    assert server.requests == []


def test_a_local_archive_is_taken_and_stays(tmp_path: Path, canvas_zip: bytes) -> None:
    (tmp_path / "own.zip").write_bytes(canvas_zip)
    for url in ("own.zip", (tmp_path / "own.zip").as_uri()):
        folder = Path(f"data/{len(url)}")
        assert len(download(wish(url, folder=folder)).files) == 12
    assert (tmp_path / "own.zip").read_bytes() == canvas_zip
    with pytest.raises(DownloadError, match="not a file on this machine"):
        download(wish("none.zip", folder=Path("data/none")))


@pytest.mark.parametrize(
    "url", ["http:///x.zip", "http://[::1/x.zip", "https://host.test/a b.zip", "ftp://host.test/x"]
)
def test_what_is_no_url_is_told_at_once(url: str) -> None:
    with pytest.raises(DownloadError, match=r"is no URL|ftp: is not supported"):
        download(wish(url))
    assert not Path("data").exists()


def test_a_mirror_replaces_the_source(
    server: Any, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("m/data/quick-canvas-dataset/sample.zip", canvas_zip)
    monkeypatch.setenv(MIRROR_VARIABLE, server.url("m/"))
    assert len(download(wish()).files) == 12


def test_a_checkpoint_that_is_a_plain_file_gets_the_name_that_configs_expect(server: Any) -> None:
    url = server.put("any/sd-v1-4.ckpt", b"weights")
    result = download(wish(url, source=MODELS["compvis"], folder=Path("models/compvis")))
    assert result.files == ("style50/compvis.ckpt",)
    assert (result.folder / "style50/compvis.ckpt").read_bytes() == b"weights"
    with pytest.raises(ArchiveError, match=r"no archive; sample quick_canvas comes as \.zip"):
        download(wish(url))


def test_promise_08_a_cut_download_is_resumed_by_the_next_command(server: Any, tmp_path: Path) -> None:
    """The process is killed for real while the archive comes in."""
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("Cubism/Cats/1.jpg", os.urandom(1_500_000))
    body = (tmp_path / "made.zip").read_bytes()
    url = server.put("x.zip", body)
    server.faults.cut_after = [600_000]
    command = [sys.executable, "-m", "mu.commands.download_data", "sample", "quick_canvas", "--url", url]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # The second connection is refused for long: the command waits, and is killed there.
    server.faults.status = [200] + [503] * 50
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(server.requests) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    server.faults.status = []
    folder = tmp_path / "data/quick-canvas-dataset"
    assert not (folder / "sample").exists()
    assert (folder / ".sample.download/x.zip.part").stat().st_size == 600_000
    download(wish(url, folder=folder / "sample"))
    assert server.requests[-1][1] == "bytes=600000-"
    record = json.loads((folder / "sample.download.json").read_text())
    assert record["pins"][url]["sha256"] == {"x.zip": hashlib.sha256(body).hexdigest()}


def test_promise_09_a_wrong_hash_leaves_nothing_at_the_final_path(server: Any, canvas_zip: bytes) -> None:
    url = server.put("x.zip", canvas_zip)
    with pytest.raises(DownloadError, match="should be 000"):
        download(wish(url, sha256="0" * 64))
    assert content(Path("data")) == set()
    assert len(download(wish(url, sha256=hashlib.sha256(canvas_zip).hexdigest())).files) == 12


def test_a_file_that_was_replaced_since_the_first_time_is_refused(server: Any, canvas_zip: bytes) -> None:
    url = server.put("x.zip", canvas_zip)
    folder = download(wish(url)).folder
    (folder / "Cubism/Cats/1.jpg").unlink()
    server.put("x.zip", canvas_zip + b"\0")
    with pytest.raises(DownloadError, match=r"seen the first time.*--sha256"):
        download(wish(url))
    with pytest.raises(DownloadError, match="seen the first time"):
        download(wish(url, force=True))


def test_promise_10_a_quota_page_is_never_kept(server: Any) -> None:
    server.faults.content_type = "text/html"
    url = server.put("x.zip", b"<html>Too many users have viewed or downloaded this file recently.</html>")
    with pytest.raises(DownloadQuotaError, match="quota exceeded"):
        download(wish(url))
    assert content(Path("data")) == set()


def test_promise_11_two_downloads_at_once_make_one_transfer(
    server: Any, canvas_zip: bytes, tmp_path: Path
) -> None:
    url = server.put("x.zip", canvas_zip)
    server.faults.wait_s = 3.0
    command = [sys.executable, "-m", "mu.commands.download_data", "sample", "quick_canvas", "--url", url]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while not server.requests:
        time.sleep(0.02)
    result = download(wish(url, folder=tmp_path / "data/quick-canvas-dataset/sample"))
    assert other.wait() == 0
    assert "nothing was downloaded" in result.note
    assert len(server.requests) == 1


def test_promise_11_also_within_one_process(server: Any, canvas_zip: bytes) -> None:
    url = server.put("x.zip", canvas_zip)
    server.faults.wait_s = 0.3
    notes: list[str] = []
    threads = [threading.Thread(target=lambda: notes.append(download(wish(url)).note)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(notes) == 3
    assert len(server.requests) == 1


def test_a_lock_goes_with_its_holder_and_is_one_at_a_time(tmp_path: Path) -> None:
    """Taking the file away must not let two waiters in, one by the old file and one by a new one."""
    path, inside, most = tmp_path / ".x.lock", 0, 0
    counted = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            with exclusive(path, "waiting"):
                with counted:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.0005)
                with counted:
                    inside -= 1

    with ThreadPoolExecutor(8) as pool:
        for entered in [pool.submit(enter) for _ in range(8)]:
            entered.result()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_waited_for_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that is full of locks says so only to who waits (stood in for: no local one does)."""

    def flock(_: Any, operation: int) -> None:
        if operation & fcntl.LOCK_NB:
            raise BlockingIOError
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(DownloadError, match=r"x\.lock: cannot be locked \(No locks available\)"),
        exclusive(tmp_path / ".x.lock", "waiting"),
    ):
        pass


def test_nothing_is_left_beside_a_folder_that_could_not_be_filled(server: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError):
        download(wish(str(tmp_path / "absent.zip")))
    with pytest.raises(DownloadError):
        download(wish(server.put("x.zip", b"<html>quota exceeded</html>")))
    assert list(Path("data").iterdir()) == []


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.zip").write_bytes(canvas_zip)
    argv = ["sample", "quick_canvas", "--url=~/x.zip", "--output_dir=~/canvas", "--quiet"]
    assert download_data.main(argv) == 0
    assert len(content(tmp_path / "canvas")) == 12
    monkeypatch.setenv("UNLEARN_DIFF_MIRROR", "~")
    (tmp_path / "data/quick-canvas-dataset").mkdir(parents=True)
    (tmp_path / "data/quick-canvas-dataset/sample.zip").write_bytes(canvas_zip)
    assert download(Wish(source=SOURCE, folder=Path("~/other"), progress=False)).folder == tmp_path / "other"


def test_promise_13_a_bomb_leaves_no_folder(server: Any, canvas_zip: bytes) -> None:
    with pytest.raises(ArchiveError, match="--max_files"):
        download(wish(server.put("x.zip", canvas_zip), limits=Limits(max_files=11)))
    assert content(Path("data")) == set()


def test_promise_14_offline_a_complete_folder_works_without_the_network(
    server: Any, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(wish(server.put("x.zip", canvas_zip)))
    calls: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: calls.append(address))
    assert len(download(wish()).files) == 12
    assert calls == []


def test_promise_14_offline_an_incomplete_folder_names_what_is_missing(
    server: Any, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(wish(server.put("x.zip", canvas_zip))).folder
    (folder / "Cubism/Cats/2.jpg").unlink()
    (folder / "Cubism/Dogs/3.jpg").write_bytes(b"short")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError) as raised:
        download(wish())
    assert "Cubism/Cats/2.jpg is missing; Cubism/Dogs/3.jpg has 5 bytes instead of 900" in str(raised.value)
    assert "the hub cannot be asked" in str(raised.value)
    assert len(content(folder)) == 11


def test_a_missing_file_is_put_back(server: Any, canvas_zip: bytes) -> None:
    url = server.put("x.zip", canvas_zip)
    folder = download(wish(url)).folder
    (folder / "Cubism/Cats/2.jpg").unlink()
    assert "downloaded from" in download(wish(url)).note
    assert len(content(folder)) == 12


def test_a_run_that_was_killed_while_putting_files_in_place_is_repaired(
    server: Any, canvas_zip: bytes
) -> None:
    url = server.put("x.zip", canvas_zip)
    folder = download(wish(url)).folder
    path = folder.with_name("sample.download.json")
    path.write_text(path.read_text().replace('"whole": true', '"whole": false'))
    assert "downloaded from" in download(wish(url)).note
    assert "nothing was downloaded" in download(wish(url)).note


def put_sample(server: Any, body: bytes, commit: str, *, large: bool = True) -> None:
    assert isinstance(SOURCE.origin, Hub)
    assert SOURCE.origin.file is not None
    files = {SOURCE.origin.file: body, "README.md": b"#"}
    server.put_hub(SOURCE.origin.repo, "dataset", files, commit=commit, large=large)


def test_the_hub_is_pinned_to_the_commit_of_the_first_time(
    server: Any, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.root)
    put_sample(server, canvas_zip, COMMITS[0])
    download(wish())
    put_sample(server, canvas_zip + b"\0", COMMITS[1])
    download(wish(force=True))
    fetched = [re.findall(r"/resolve/(\w+)/", path) for path, _ in server.requests]
    assert [commit for found in fetched for commit in found] == [COMMITS[0]] * 2
    with pytest.raises(DownloadError, match=f"filled from revision {COMMITS[0]}.*--force with --revision"):
        download(wish(revision=COMMITS[1]))
    download(wish(revision="main", force=True))
    assert (
        json.loads(Path("data/sample.download.json").read_text())["pins"][SOURCE.origin.text]["revision"]
        == COMMITS[1]
    )


def test_promise_08_a_large_file_of_the_hub_goes_on_where_it_was_cut(
    server: Any, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own library would begin it anew in the next run."""
    monkeypatch.setenv("HF_ENDPOINT", server.root)
    monkeypatch.setattr("mu.commands.hub.LARGE_BYTES", 1)
    put_sample(server, canvas_zip, COMMITS[0])
    real = fetch_module.fetch
    monkeypatch.setattr("mu.commands.hub.fetch", lambda *given, **more: real(*given, **more, attempts=1))
    server.faults.cut_after = [10**6, 5_000]  # the answer about the repository comes whole
    with pytest.raises(DownloadError, match=r"closed after 5,000.*kept"):
        download(wish())
    monkeypatch.setattr("mu.commands.hub.fetch", real)
    assert len(download(wish()).files) == 12
    assert [span for path, span in server.requests if "/resolve/" in path] == [None, "bytes=5000-"]


def test_of_a_repository_only_what_is_missing_is_fetched_after_a_cut(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DATA["full", "i2p"]
    assert isinstance(source.origin, Hub)
    monkeypatch.setenv("HF_ENDPOINT", server.root)
    files = {f"images/hate/{number}.jpg": noise(400, number) for number in range(6)}
    server.put_hub(source.origin.repo, "dataset", files, commit=COMMITS[0])
    broken = next(path for path in server.files if path.endswith("/3.jpg"))
    body = server.files.pop(broken)
    with pytest.raises(DownloadError, match="the download stopped; run the command again"):
        download(wish(source=source))
    assert not Path("data/sample").exists()
    server.files[broken] = body
    came = [path for path, _ in server.requests if "/resolve/" in path]
    result = download(wish(source=source))
    assert {name: (result.folder / name).read_bytes() for name in result.files} == files
    fetched = [path for path, _ in server.requests if "/resolve/" in path]
    assert sorted(fetched) == sorted({path for path in server.files if "/resolve/" in path})
    assert len(came) < len(fetched)


@pytest.mark.parametrize("large_bytes", [1, 1 << 30])
@pytest.mark.parametrize("large", [True, False])
def test_a_file_that_is_not_what_the_hub_says_is_refused(
    server: Any, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch, large: bool, large_bytes: int
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.root)
    monkeypatch.setattr("mu.commands.hub.LARGE_BYTES", large_bytes)
    put_sample(server, canvas_zip, COMMITS[0], large=large)
    name = next(path for path in server.files if path.endswith(".zip"))
    server.files[name] = canvas_zip[:-1] + b"\xff"
    with pytest.raises(
        DownloadError, match=r"SHA-256 is|(sha256|git-sha1) of sample-quick-unlearn-canvas.zip is"
    ):
        download(wish())
    assert not Path("data/sample").exists()


def test_a_whole_repository_keeps_its_folders(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DATA["full", "i2p"]
    assert isinstance(source.origin, Hub)
    monkeypatch.setenv("HF_ENDPOINT", server.root)
    files = {"README.md": b"#", "prompts/i2p.csv": b"prompt,categories\n", "images/hate/0.jpg": b"jpg"}
    server.put_hub(source.origin.repo, "dataset", files, commit=COMMITS[0], large=False)
    result = download(wish(source=source))
    assert content(result.folder) == {"prompts/i2p.csv", "images/hate/0.jpg"}


@pytest.mark.parametrize("large_bytes", [1, 1 << 30])
def test_a_token_stays_with_its_host(
    server: Any, canvas_zip: bytes, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    """The hub sends large files from another host, which must not get the token."""
    monkeypatch.setenv("HF_ENDPOINT", server.root)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("mu.commands.hub.LARGE_BYTES", large_bytes)
    put_sample(server, canvas_zip, COMMITS[0])
    name = next(path for path in server.files if path.endswith(".zip"))
    server.redirects[name] = server.put("elsewhere/x.zip", canvas_zip).replace("127.0.0.1", "localhost")
    download(wish())
    asked = [path for path, _ in server.requests]
    tokens = [*zip(asked, server.headers, strict=True), *server.heads]
    sent = {path: {name.lower(): value for name, value in headers.items()} for path, headers in tokens}
    assert sent[name]["authorization"] == "Bearer hf_secret"
    assert "authorization" not in sent["/elsewhere/x.zip"]
    assert all("secret" not in path.read_text() for path in Path("data").glob("*.json"))


class FakeDrive:
    """Stands in for the two calls of gdown that are used; Drive's address cannot be changed."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def download_folder(self, **_: Any) -> list[Any]:
        return [type("File", (), {"id": name, "path": name}) for name in self.files]

    def download(self, *, id: str, output: str, **_: Any) -> str:
        Path(output).write_bytes(self.files[id])
        return output


def test_classifiers_come_from_drive_and_are_held_to_their_first_hashes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gdown

    drive = FakeDrive({"style50.pth": b"weights", "style50_cls.pth": b"more"})
    monkeypatch.setattr(gdown, "download", drive.download)
    monkeypatch.setattr(gdown, "download_folder", drive.download_folder)
    result = download(wish(source=MODELS["classifier"]))
    assert content(result.folder) == {"style50.pth", "style50_cls.pth"}
    drive.files["style50.pth"] = b"others!"
    with pytest.raises(DownloadError, match="seen the first time"):
        download(wish(source=MODELS["classifier"], force=True))
    assert (result.folder / "style50.pth").read_bytes() == b"weights"
    drive.files["style50.pth"] = b"<!DOCTYPE html><html><title>Quota exceeded</title>"
    with pytest.raises(DownloadQuotaError, match="quota exceeded"):
        download(wish(source=MODELS["classifier"], force=True))


def test_every_source_has_its_folder_and_fits_its_own_layout() -> None:
    examples = {
        "data/quick-canvas-dataset/sample": "Cubism/Cats/1.jpg",
        "data/quick-canvas-dataset/full": "Seed_Images/Dogs/20.jpg",
        "data/i2p-dataset/sample": "prompts/i2p.csv",
        "data/i2p-dataset/full": "images/self-harm/1.jpg",
        "models/compvis": "style50/compvis.ckpt",
        "models/diffuser": "style50/unet/config.json",
        "models/classifier_ckpt_path": "style50_cls.pth",
    }
    sources = [*DATA.values(), *MODELS.values()]
    assert {source.folder.as_posix() for source in sources} == set(examples)
    for source in sources:
        assert source.fits(examples[source.folder.as_posix()])
        assert not source.fits(f"around/{examples[source.folder.as_posix()]}")
    assert DATA_ALIASES == {"unlearn_canvas": "quick_canvas"}
