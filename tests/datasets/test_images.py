from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from mu.datasets.image_files import image_problems, is_image
from mu.datasets.images import load_image, read_ahead, save_png, to_uint8
from mu.datasets.index import DataError


def test_pixels_are_mapped_to_minus_one_and_one(tmp_path: Path) -> None:
    Image.fromarray(numpy.array([[[0, 255, 51]]], dtype=numpy.uint8).repeat(4, 0).repeat(4, 1)).save(
        tmp_path / "a.png"
    )
    image = load_image(tmp_path / "a.png", 4)
    assert image.shape == (3, 4, 4)
    assert image.dtype == torch.float32
    assert image[:, 2, 1].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_the_centre_square_is_cut_out_before_resizing(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 10), "black")
    wide.paste("white", (15, 0, 25, 10))  # exactly the centre square
    wide.save(tmp_path / "wide.png")
    assert torch.equal(load_image(tmp_path / "wide.png", 5), torch.ones(3, 5, 5))
    wide.rotate(90, expand=True).save(tmp_path / "tall.png")
    assert torch.equal(load_image(tmp_path / "tall.png", 20), torch.ones(3, 20, 20))


def test_resizing_is_bicubic(tmp_path: Path) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = numpy.asarray(
        Image.fromarray(pixels).resize((7, 7), Image.Resampling.BICUBIC), dtype=numpy.float32
    )
    assert torch.allclose(
        load_image(tmp_path / "a.png", 7), torch.from_numpy(expected / 127.5 - 1).permute(2, 0, 1), atol=1e-6
    )


def test_transparency_is_white_and_grey_has_three_channels(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(load_image(tmp_path / "clear.png", 4), torch.ones(3, 4, 4))
    Image.new("L", (4, 4), 0).save(tmp_path / "grey.png")
    assert torch.equal(load_image(tmp_path / "grey.png", 4), -torch.ones(3, 4, 4))


def test_a_camera_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "black")
    picture.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = load_image(tmp_path / "a.jpg", 8)
    assert float(image[:, 0].max()) < -0.9
    assert float(image[:, 7].min()) > 0.9


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 6, 6), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    save_png(image, tmp_path / "sub" / "a.png")
    assert torch.allclose(load_image(tmp_path / "sub" / "a.png", 6), image, atol=1e-6)


def test_values_are_rounded_and_clamped() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 6).expand(3, 1, 6)
    assert to_uint8(values)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


OLD_PILLOW = pytest.mark.skipif(
    ".avif" not in Image.registered_extensions(), reason="this Pillow was built without AVIF"
)


@pytest.mark.parametrize(
    "suffix",
    [
        *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
        pytest.param(".avif", marks=OLD_PILLOW),
    ],
)
def test_promise_30_every_kind_of_image_is_read(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("RGB", (16, 16), (255, 0, 51))
    path = tmp_path / f"A{suffix.upper()}"
    picture.save(path, format="JPEG" if suffix == ".jfif" else None)
    assert is_image(path)
    assert image_problems([path]) == []
    image = load_image(path, 8)
    assert image.shape == (3, 8, 8)
    assert image.mean(dim=(1, 2)).tolist() == pytest.approx([1.0, -1.0, -0.6], abs=0.05)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as opened:
        assert opened.n_frames == 2
    assert torch.equal(load_image(path, 8), torch.ones(3, 8, 8))


def test_a_kind_of_image_that_pillow_was_built_without_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Pillow before 11.3 is, which knows no AVIF."""
    path = tmp_path / "a.avif"
    Image.new("RGB", (16, 16)).save(path, "AVIF" if ".avif" in Image.registered_extensions() else "PNG")
    monkeypatch.delitem(Image.EXTENSION, ".avif", raising=False)
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "AVIF"])
    expected = (
        "this installation of Pillow does not read .avif; install pillow 11.3 or newer, or save it as .png"
    )
    assert image_problems([path]) == [f"{path}: {expected}"]
    with pytest.raises(DataError, match=f"{path}: {expected}"):
        load_image(path, 8)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_deep_pixels_are_found_in_the_head_of_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(numpy.full((64, 64), 40000, dtype=numpy.uint16)).save(path)
    (problem,) = image_problems([path])
    assert problem == f"{path}: I;16 pixels (more than 8 bits) are not read; save it as 8-bit RGB"


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "empty", "tiny", "deep"])
def test_files_that_are_no_usable_image_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(path)
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("<html>quota exceeded</html>")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "tiny":
        Image.new("RGB", (7, 200)).save(path)
    else:
        Image.fromarray(numpy.full((64, 64), 40000, dtype=numpy.uint16)).save(path)
    message = {"missing": "missing", "tiny": "7 x 200 px is too small for 64 px", "deep": "8-bit"}
    with pytest.raises(DataError, match=message.get(kind, "unreadable")) as raised:
        load_image(path, 64)
    assert str(path) in str(raised.value)


def test_results_come_in_order_and_not_too_many_wait() -> None:
    begun: list[int] = []
    threads: set[str] = set()

    def read(number: int) -> int:
        begun.append(number)
        threads.add(threading.current_thread().name)
        time.sleep(random.Random(number).random() / 100)
        return number**2

    results = read_ahead(range(40), read, threads=3)
    for number in range(40):
        assert next(results) == number**2
        time.sleep(0.02)  # a caller slower than the threads: those that wait are no more
        assert len(begun) <= number + 1 + 2 * 3
    with pytest.raises(StopIteration):
        next(results)
    assert sorted(begun) == list(range(40))
    assert len(threads) == 3


def test_an_error_comes_when_its_turn_has_come() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = read_ahead(range(10), read, threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_a_caller_who_stops_leaves_no_thread() -> None:
    results = read_ahead(range(100), lambda number: number, threads=2)
    assert next(results) == 0
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_nothing_to_read_is_nothing() -> None:
    assert list(read_ahead([], str)) == []
