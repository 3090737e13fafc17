"""Which files of a folder are images, and what is wrong with them as far as names, sizes and headers tell.

torch is not imported, and nothing is decoded while nothing is wrong, so that all images of a data set can be looked at
before a model is loaded. What only decoding shows (a cut file) is then found by `mu.datasets.images.load_image`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from mu.datasets.index import DataError, natural_key, passed_over

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""Of the files that are read as images, in every data set and in every folder to measure; of animations the first
picture."""
_BESIDE_IMAGES = (".txt", ".csv", ".json", ".jsonl", ".md")
_OF_FILE_MANAGERS = ("thumbs.db", "desktop.ini")
MIN_SIDE_PX = 8
MAX_PIXELS = 89_000_000
"""Just below the size from which Pillow warns of a decompression bomb."""
MAX_BYTES = 256 * 2**20

_sound: set[tuple[Path, int, int]] = set()
"""Files whose head nothing was wrong with, by size and time of change: a run asks more than once."""

# What Pillow raises for files that are not whole images; a broken PNG chunk is a SyntaxError.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def is_image(path: Path) -> bool:
    """Whether a file's name ends as an image's does."""
    return path.suffix.lower() in SUFFIXES


def entries(folder: Path, inside: Path, problems: list[str]) -> list[Path]:
    """What lies in a folder, 2.jpg before 10.jpg; hidden files are left out, links are added to `problems`.

    Args:
        inside: the data set's own folder, resolved: a link is told apart by whether it leaves it.
    """
    kept = []
    for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        if path.name.startswith((".", "__MACOSX")):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            problems.append(f"{path}: a link that leaves the folder (to {path.resolve()})")
        elif path.is_symlink():
            # Within the folder a link could bring images of the concept to forget among those to retain.
            problems.append(f"{path}: a link; images must be files of the folder itself")
        else:
            kept.append(path)
    return kept


def find_images(folder: Path, inside: Path, problems: list[str], others: list[Path]) -> list[Path]:
    """All images of a folder and of the folders in it, by name; links as in `entries`.

    Args:
        others: files that are no images are added to it, see `not_read`.
    """
    found: list[Path] = []
    for path in entries(folder, inside, problems):
        if path.is_dir():
            found += find_images(path, inside, problems, others)
        elif is_image(path) and path.is_file():
            found.append(path)
        else:
            others.append(path)
    return found


def not_read(folder: Path, others: Iterable[Path]) -> list[str]:
    """One sentence on the files of a folder that are not read; none on texts and tables, which lie beside images."""
    left_out = [
        str(path)
        for path in others
        if path.suffix.lower() not in _BESIDE_IMAGES and path.name.lower() not in _OF_FILE_MANAGERS
    ]
    return passed_over(
        left_out, f"files of {folder} that are not where images are read, or no {', '.join(SUFFIXES)}"
    )


def no_images(key: str, folder: Path, others: Sequence[Path] = (), *, layout: str = "") -> str:
    """What is said of a folder without images, and of the files that it has instead."""
    notes = not_read(folder, others)
    told = "".join(f" {note[0].upper()}{note[1:]}." for note in notes)
    return f"{key}: {folder} holds no images ({', '.join(SUFFIXES)}){layout}.{told}"


def unsupported(path: Path) -> str | None:
    """Why this installation of Pillow cannot read images with such a name; None: it can."""
    suffix = path.suffix.lower()
    Image.preinit()  # the common kinds; the others take longer to load
    if suffix not in SUFFIXES or suffix in Image.EXTENSION or suffix in Image.registered_extensions():
        return None
    advice = "install pillow 11.3 or newer, or " if suffix == ".avif" else ""
    return f"this installation of Pillow does not read {suffix}; {advice}save it as .png"


def deep_pixels(picture: Image.Image) -> str | None:
    """What is wrong with pixels of more than 8 bits; None: they have no more."""
    if picture.mode.startswith(("I", "F")):
        return f"{picture.mode} pixels (more than 8 bits) are not read; save it as 8-bit RGB"
    return None


def image_problems(paths: Iterable[Path], *, others: Sequence[str] = ()) -> list[str]:
    """Why each of these files cannot be used: missing, empty, unreadable, tiny or absurdly large.

    Headers alone are read while nothing is wrong. Else, or with `others` (what is wrong with the folder already), all
    images are decoded, so that one message also names those that are cut.
    """
    paths = list(paths)
    found = {path: problem for path in paths if (problem := _problem(path)) is not None}
    if found or others:
        decoded = {path: _problem(path, decode=True) for path in paths if path not in found}
        found |= {path: problem for path, problem in decoded.items() if problem is not None}
    return [f"{path}: {found[path]}" for path in dict.fromkeys(paths) if path in found]


def check_folder(key: str, folder: Path, *, advice: str) -> None:
    """Raises DataError unless `folder` is one."""
    if not folder.is_dir():
        raise DataError(f"{key}: there is no folder {folder}. {advice}")


def _problem(path: Path, *, decode: bool = False) -> str | None:
    try:
        status = path.stat()
        size, head = status.st_size, (path.absolute(), status.st_size, status.st_mtime_ns)
        if head in _sound and not decode:
            return None
        if size == 0:
            return "an empty file"
        if (problem := unsupported(path)) is not None:
            return problem
        if size > MAX_BYTES:
            return f"{size / 2**20:.0f} MiB is too large for an image (at most {MAX_BYTES // 2**20} MiB)"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:  # reads the header alone
                width, height = opened.size
                deep = deep_pixels(opened)
                if decode:
                    opened.load()
    except FileNotFoundError:
        return "missing"
    except Image.DecompressionBombError:
        return f"too large: more than {MAX_PIXELS / 1e6:.0f} million pixels"
    except UNREADABLE as error:
        return f"unreadable ({error})"
    if min(width, height) < MIN_SIDE_PX:
        return f"{width} x {height} px is too small (at least {MIN_SIDE_PX} px a side)"
    if width * height > MAX_PIXELS:
        return f"{width} x {height} px is too large: more than {MAX_PIXELS / 1e6:.0f} million pixels"
    if deep is not None:
        return deep
    _sound.add(head)
    return None
