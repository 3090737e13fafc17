"""Properties of archives: whatever their names are, nothing is written outside of the folder."""

from __future__ import annotations

import io
import stat
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mu.commands.archive import ArchiveError, Limits, unpack
from mu.commands.files import DownloadError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
PIECES = ["..", ".", "", "a", "b", "A", "/", "\\", "//", "../", "..\\", "C:", "~"]
PIECES += ["\u202e", "ü", "u\u0308", "con", " ", "%2e%2e/"]
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("/".join) | st.text(max_size=20)
KINDS = st.sampled_from(["file"] * 6 + ["folder", "link", "hard link", "device"])
ENTRIES = st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=20)), min_size=1, max_size=5)


def as_zip(path: Path, entries: list[tuple[str, str, bytes]]) -> None:
    kinds = {
        "file": stat.S_IFREG,
        "folder": stat.S_IFDIR,
        "link": stat.S_IFLNK,
        "hard link": 0,
        "device": stat.S_IFCHR,
    }
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that come twice are meant
        for name, kind, body in entries:
            info = zipfile.ZipInfo("x")
            # ZipInfo itself would change the name: what another program writes is written here.
            info.filename = name + ("/" if kind == "folder" else "")
            info.create_system, info.external_attr = 3, (kinds[kind] | 0o755) << 16
            archive.writestr(info, b"" if kind == "folder" else body)


def as_tar(path: Path, entries: list[tuple[str, str, bytes]]) -> None:
    kinds = {
        "file": tarfile.REGTYPE,
        "folder": tarfile.DIRTYPE,
        "link": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, body in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kinds[kind], "../outside" if "link" in kind else ""
            info.size = len(body) if kind == "file" else 0
            archive.addfile(info, io.BytesIO(body))


@pytest.mark.parametrize("make", [as_zip, as_tar], ids=["zip", "tar"])
@QUICK
@given(entries=ENTRIES)
def test_promise_12_nothing_is_written_outside_whatever_the_names(
    make: object, entries: list[tuple[str, str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("archives")
    (place / "in").mkdir()
    (place / "outside").write_bytes(b"untouched")
    path = place / "in" / "x"
    try:
        make(path, entries)  # type: ignore[operator]
    except (UnicodeEncodeError, ValueError):
        return  # a name that cannot be written into such an archive
    out = place / "in" / "out"
    try:
        files = unpack(path, out, limits=Limits(), progress=False)
    except (ArchiveError, DownloadError):
        assert not out.exists()
    else:
        assert all(
            kind in ("file", "folder", "hard link" if make is as_zip else "file") for _, kind, _ in entries
        )
        found = {item for item in out.rglob("*") if not item.is_dir()}
        assert found == {out / name for name in files}
        assert not any(item.is_symlink() for item in out.rglob("*"))
        assert all(item.resolve().is_relative_to(out.resolve()) for item in found)
    assert {
        item.relative_to(place).as_posix() for item in place.rglob("*") if not item.is_relative_to(out)
    } == {
        "in",
        "in/x",
        "outside",
    }
    assert (place / "outside").read_bytes() == b"untouched"
