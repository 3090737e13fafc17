"""Archives that must not be unpacked, made for real, and such that must."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from mu.commands.archive import ArchiveError, Limits, archive_kind, unpack

FILES = {"a/1.jpg": b"one", "a/2.jpg": b"two" * 1000, "b/3.txt": b""}


def make_zip(path: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in entries:
            archive.writestr(name, body)
    return path


def make_tar(path: Path, entries: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, body in entries:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def special_zip(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    return info


def special_tar(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def refused(path: Path, words: str, limits: Limits | None = None) -> None:
    before = sorted(path.parent.iterdir())
    with pytest.raises(ArchiveError, match=words):
        unpack(path, path.parent / "out", limits=limits or Limits(), progress=False)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_archive_is_unpacked_without_the_leftovers_of_file_managers(tmp_path: Path, suffix: str) -> None:
    entries = [("./a/", b""), *FILES.items(), ("__MACOSX/a/._1.jpg", b"x"), ("a/.DS_Store", b"x")]
    path = tmp_path / f"x.{suffix}"
    if suffix == "zip":
        make_zip(path, list(entries))
    else:
        make_tar(path, list(entries[1:]), f"w:{suffix[4:]}")
    names = unpack(path, tmp_path / "out", limits=Limits(), progress=False)
    assert names == list(FILES)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == FILES
    assert sum(file.is_file() for file in (tmp_path / "out").rglob("*")) == 3


BAD_NAMES = ["../x", "a/../../x", "/etc/x", "C:/x", "C:x", "..\\x", "\\\\host\\x", "a/\nb", "n" * 256]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_promise_12_a_name_that_leads_out_refuses_the_whole_archive(tmp_path: Path, name: str) -> None:
    refused(make_zip(tmp_path / "x.zip", [("fine.txt", b"1"), (name, b"2")]), "leads out|no proper file name")
    (tmp_path / "x.zip").unlink()
    refused(
        make_tar(tmp_path / "x.tar.gz", [("fine.txt", b"1"), (name, b"2")]), "leads out|no proper file name"
    )


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_promise_12_a_link_or_device_in_a_zip_refuses_it_whole(tmp_path: Path, kind: int) -> None:
    entries = [("fine.txt", b"1"), (special_zip("link", kind), b"/etc/passwd")]
    refused(make_zip(tmp_path / "x.zip", list(entries)), "'link' is a link or device")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_promise_12_a_link_or_device_in_a_tar_refuses_it_whole(tmp_path: Path, kind: bytes) -> None:
    entries = [("fine.txt", b"1"), (special_tar("link", kind, "/etc/passwd"), b"")]
    refused(make_tar(tmp_path / "x.tar", list(entries), "w"), "'link' is a link or device")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["a", "./a", "a/b"])
def test_a_name_that_comes_twice_refuses_it_whole(tmp_path: Path, second: str) -> None:
    refused(make_zip(tmp_path / "x.zip", [("a", b"1"), (second, b"2")]), "stands in it twice")
    (tmp_path / "x.zip").unlink()
    refused(make_tar(tmp_path / "x.tar.gz", [("a", b"1"), (second, b"2")]), "stands in it twice")


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
def test_promise_13_a_bomb_is_rejected_before_writing(tmp_path: Path, make: object) -> None:
    path = make(tmp_path / "x", [("zeros", bytes(70 << 20))])  # type: ignore[operator]
    refused(path, r"over 200 times as many.*--max_ratio")
    refused(path, r"more than 1,000 bytes unpacked.*--max_bytes", Limits(max_bytes=1000))
    assert unpack(path, tmp_path / "ratio", limits=Limits(max_ratio=5000), progress=False) == ["zeros"]
    path = make(tmp_path / "x", [(str(number), b"") for number in range(30)])  # type: ignore[operator]
    refused(path, r"more than 29 entries.*--max_files", Limits(max_files=29))
    assert len(unpack(path, tmp_path / "count", limits=Limits(max_files=30), progress=False)) == 30


def test_promise_13_a_zip_that_lies_about_its_size_writes_no_more_than_it_says(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", [("a", b"0" * 5000)])
    content = path.read_bytes().replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(content)
    refused(path, "damaged or cut off")


def test_a_tar_header_that_claims_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    header = special_tar("name", tarfile.GNUTYPE_LONGNAME)
    header.size = 8 << 30
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    refused(tmp_path / "x.tar", "damaged or cut off .*16 MiB")


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
def test_a_damaged_or_cut_archive_leaves_nothing(tmp_path: Path, make: object) -> None:
    body = bytes(range(256)) * 400
    path = make(tmp_path / "x", [("a", body), ("b", body[::-1])])  # type: ignore[operator]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    refused(path, "damaged or cut off")
    middle = len(content) // 3
    path.write_bytes(content[:middle] + b"\xff" * 40 + content[middle + 40 :])
    refused(path, "damaged or cut off")


def test_a_tar_whose_middle_header_is_broken_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a", b"1"), ("b", b"2")], "w")
    content = bytearray(path.read_bytes())
    content[1024:1034] = b"brokenname"
    path.write_bytes(content)
    refused(path, "damaged or cut off")


def test_an_encrypted_or_empty_archive_says_so(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", [("a", b"1")])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    refused(path, "encrypted")
    refused(make_zip(path, []), "is empty")


def test_a_torch_checkpoint_is_no_archive_although_it_is_a_zip_file(tmp_path: Path) -> None:
    entries = [("archive/data.pkl", b"."), ("archive/version", b"3\n")]
    assert archive_kind(make_zip(tmp_path / "x", list(entries))) is None
    assert archive_kind(make_zip(tmp_path / "y", [("a/data.txt", b"")])) == "zip"
    (tmp_path / "z").write_bytes(b"hello")
    assert archive_kind(tmp_path / "z") is None
