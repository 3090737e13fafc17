"""At a path there is the old file or the whole new one, and nothing beside it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mu.atomic import WriteError, finish_writes, write_atomically, write_together, written_beside

# The limit on file sizes makes the write itself fail, as a full disk would.
TOO_LARGE = """
import resource, signal, sys
from pathlib import Path
from mu.atomic import WriteError, write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), b"x" * 5000)
except WriteError as error:
    sys.exit(str(error))
"""


def test_folders_are_made_and_the_content_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "list.txt"
    assert write_atomically(path, b"one") == path
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_promise_16_a_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    write_atomically(path, b"old")
    ended = subprocess.run(
        [sys.executable, "-c", TOO_LARGE, str(path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert f"{path} could not be written (File too large): 5,000 bytes are needed, " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_after_the_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(
        WriteError, match=r"a\.json could not be written \(No space left on device\): 5 bytes"
    ):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_any_other_error_leaves_nothing_either(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]

    def interrupted() -> None:
        with written_beside(path, 1) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127])
def test_a_name_may_be_as_long_as_the_file_system_takes(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, b"abc")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match=r"file/sub/list\.txt could not be written .*: 3 bytes"):
        write_atomically(tmp_path / "file" / "sub" / "list.txt", b"abc")


def test_the_place_keeps_its_permissions_and_links_stay_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    write_atomically(real, b"old")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(real.stat().st_mode) == 0o666 & ~mask
    real.chmod(0o640)
    link.symlink_to(real)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def everything(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_files_that_belong_together_come_all_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Ended before the files are whole, after that, and when one of them is in its place."""
    contents = {"a/1.png": b"one", "b.png": b"two"}
    replace, rename = os.replace, os.rename
    placed = []

    def place(source: Path, target: Path) -> None:
        if ".together" in str(source):
            placed.append(target)
            if len(placed) == kept:
                raise KeyboardInterrupt
        replace(source, target)

    def commit(source: Path, target: Path) -> None:
        if kept == 0:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", place)
        patch.setattr(os, "rename", commit)
        with pytest.raises(KeyboardInterrupt):
            write_together(tmp_path, contents)
    assert len([path for path in everything(tmp_path) if not path.startswith(".")]) == max(0, kept - 1)
    finish_writes(tmp_path)
    assert everything(tmp_path) == (contents if kept else {})
    assert not list(tmp_path.glob(".*"))


def test_two_processes_may_finish_the_same_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, other = os.replace, []

    def place(source: Path, target: Path) -> None:
        if ".together" in str(source) and not other:
            other.append(source)
            finish_writes(tmp_path)  # the other one does all of it first
        replace(source, target)

    monkeypatch.setattr(os, "replace", place)
    write_together(tmp_path, {"1": b"one", "2": b"two"})
    assert other
    assert everything(tmp_path) == {"1": b"one", "2": b"two"}
    write_together(tmp_path, {"1": b"other", "3": b"three"})
    assert everything(tmp_path) == {"1": b"one", "2": b"two", "3": b"three"}
