"""Image files to tensors and back, and files read ahead in threads."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mu.atomic import write_atomically
from mu.datasets.image_files import UNREADABLE, deep_pixels, unsupported
from mu.datasets.index import DataError, raise_problems

S = TypeVar("S")
T = TypeVar("T")
UNUSABLE = "images cannot be used"
ADVICE = "Replace them, or delete them together with their rows."
_MOST_THREADS = 8


def load_image(path: Path | str, size: int, *, interpolation: str = "bicubic") -> Tensor:
    """Reads an image: centre square crop, resize, RGB; (3, size, size) float32 in [-1, 1].

    A rotation noted by a camera is applied; transparency is laid on white; of an animation the first picture is taken.
    Raises DataError for a file that is missing, is no whole image, has deep grey levels, or is smaller than an eighth
    of `size` on its short side.
    """
    return to_unit_range(load_pixels(path, size, interpolation=interpolation))


def load_pixels(path: Path | str, size: int | None = None, *, interpolation: str = "bicubic") -> Tensor:
    """As `load_image`, but the 8-bit values themselves, uint8 (3, H, W); with size None the whole image as saved."""
    if (problem := unsupported(Path(path))) is not None:
        raise DataError(f"{path}: {problem}")
    try:
        with Image.open(path) as opened:
            if (problem := deep_pixels(opened)) is not None:
                raise DataError(f"{path}: {problem}")
            picture = _on_white(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{path}: unreadable ({error})") from error
    if size is not None:
        picture = _square(picture, size, Path(path), Image.Resampling[interpolation.upper()])
    # numpy turns the axes, because torch would start threads of its own in each thread that reads.
    return torch.from_numpy(numpy.array(picture).transpose(2, 0, 1).copy())  # (3, H, W)


def check_images(paths: Sequence[Path], size: int) -> None:
    """Read images as `load_image` does, several at once, and keep none of them.

    Raises:
        DataError: as `load_image` does, of all of them together.
    """

    def problem(path: Path) -> str | None:
        try:
            load_pixels(path, size)
        except DataError as error:
            return str(error)
        return None

    found = [told for told in read_ahead(paths, problem) if told is not None]
    raise_problems(found, what=UNUSABLE, advice=ADVICE)


def read_ahead(
    items: Iterable[S], read: Callable[[S], T], *, threads: int | None = None
) -> Generator[T, None, None]:
    """`read(item)` of each item, in the order of the items; an error comes when its item's turn has come.

    At most twice as many results as there are threads wait for the caller, so memory does not grow with the items.
    `read` should decode and no more: torch's own threads would multiply in each of these.

    Args:
        threads: that read at once; None: as many as cores, at most 8.
    """
    count = threads or min(_MOST_THREADS, _cores())
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="reading") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def to_unit_range(pixels: Tensor) -> Tensor:
    """8-bit values 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Images (..., 3, H, W) in [-1, 1] to uint8 (..., H, W, 3), rounded; what lies outside is clamped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def to_picture(image: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1] as an 8-bit picture."""
    return Image.fromarray(to_uint8(image).cpu().numpy())


def png(image: Tensor) -> bytes:
    """One image (3, H, W) in [-1, 1] as an 8-bit PNG file."""
    content = io.BytesIO()
    to_picture(image).save(content, format="PNG")
    return content.getvalue()


def save_png(image: Tensor, path: Path) -> None:
    """Writes one image (3, H, W) in [-1, 1] as an 8-bit PNG, atomically."""
    write_atomically(path, png(image))


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layers = picture.convert("RGBA")
    white = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(white, layers).convert("RGB")


def _square(picture: Image.Image, size: int, path: Path, resample: Image.Resampling) -> Image.Image:
    side = min(picture.size)
    if side * 8 < size:
        raise DataError(f"{path}: {picture.width} x {picture.height} px is too small for {size} px")
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), resample)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
