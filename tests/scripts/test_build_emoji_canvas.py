"""Rendering EmojiCanvas from a tiny icon package made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from emoji_drawings import ICONS, SOURCES
from PIL import Image

RED_LEFT_HALF = '<path fill="#f00" d="M0 0h16v32H0z"/>'


@pytest.fixture(scope="module")
def build(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("build_emoji_canvas")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """All seven packages, with one and the same drawing for every icon, black in High_Contrast."""
    for style, source in SOURCES.items():
        fill = "currentColor" if style == "High_Contrast" else "#00f"
        body = f'<path fill="{fill}" d="M8 8h16v16H8z"/>'
        icons = {source.icon_name(name): {"body": body} for names in ICONS.values() for name in names}
        folder = tmp_path / "packages" / source.folder
        folder.mkdir(parents=True)
        content = {"prefix": source.prefix, "width": 32, "height": 32, "icons": icons}
        (folder / "icons.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "packages"


def change(packages: Path, folder: str, **changes: object) -> None:
    path = packages / folder / "icons.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def test_an_icon_becomes_a_drawing_on_white(build: ModuleType) -> None:
    pytest.importorskip("resvg_py")
    package = {"prefix": "p", "width": 32, "height": 32, "icons": {"half": {"body": RED_LEFT_HALF}}}
    image = build.render(build.icon_svg(package, "half"), 16)
    assert (image.size, image.mode) == ((16, 16), "RGB")
    assert image.getpixel((3, 8)) == (255, 0, 0)
    assert image.getpixel((12, 8)) == (255, 255, 255)


def test_current_colour_is_black_and_an_icon_has_its_own_frame(build: ModuleType) -> None:
    pytest.importorskip("resvg_py")
    icon = {
        "body": '<path fill="currentColor" d="M0 0h64v32H0z"/>',
        "left": 0,
        "top": 0,
        "width": 64,
        "height": 32,
    }
    package = {"prefix": "p", "width": 32, "height": 32, "icons": {"wide": icon}}
    image = build.render(build.icon_svg(package, "wide"), 16)
    # a drawing twice as wide as high: white, black over half the height, white
    assert image.size == (16, 16)
    assert [image.getpixel((8, y)) for y in (1, 8, 14)] == [(255, 255, 255), (0, 0, 0), (255, 255, 255)]


def test_the_whole_data_set_is_written_in_unlearn_canvas_layout(
    build: ModuleType, packages: Path, tmp_path: Path
) -> None:
    pytest.importorskip("resvg_py")
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    arguments = ["--packages", str(packages), "--output_dir", str(out), "--size", "16"]
    assert build.main([*arguments, "--contact_sheet", str(sheet)]) == 0
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert len(files) == 7 * 12 * 4
    assert "Fluent_Flat/Cats/1.png" in files
    assert "EmojiOne/Cats/4.png" in files
    with Image.open(out / "High_Contrast/Cats/1.png") as image:
        assert image.size == (16, 16)
        assert image.getpixel((8, 8)) == (0, 0, 0)
        assert image.getpixel((1, 1)) == (255, 255, 255)
    with Image.open(sheet) as page:
        assert page.width > 7 * 2 * 64
        assert page.height > 12 * 2 * 64


def test_a_missing_icon_is_named_and_nothing_is_written(
    build: ModuleType, packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py")
    body = {"body": '<path d="M0 0h9v9H0z"/>'}
    icons = {name: body for names in ICONS.values() for name in names if name != "fox"}
    change(packages, "twemoji", icons={**icons, "foxy": body})
    assert (
        build.main(["--packages", str(packages), "--output_dir", str(tmp_path / "out"), "--size", "16"]) == 2
    )
    assert "'twemoji' has no icon 'fox'; near names: foxy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_or_absent_package_is_refused(build: ModuleType, packages: Path) -> None:
    source = SOURCES["Noto"]
    change(packages, "noto", prefix="noto-v1")
    with pytest.raises(build.BuildError, match="is the icon set 'noto-v1', not 'noto'"):
        build.read_package(packages, source)
    (packages / "noto" / "icons.json").write_text("<html>")
    with pytest.raises(build.BuildError, match="not JSON"):
        build.read_package(packages, source)
    (packages / "noto" / "icons.json").unlink()
    with pytest.raises(build.BuildError, match="npm install @iconify-json/noto"):
        build.read_package(packages, source)


def test_a_blank_drawing_is_refused(build: ModuleType, packages: Path) -> None:
    pytest.importorskip("resvg_py")
    white = '<path fill="#fff" d="M0 0h32v32H0z"/>'
    change(packages, "noto", icons={name: {"body": white} for names in ICONS.values() for name in names})
    with pytest.raises(build.BuildError, match=r"Noto/Cats/1 \(cat-face\) came out blank"):
        next(build.drawings(packages, 16))


def test_a_body_that_is_no_svg_is_refused(build: ModuleType) -> None:
    pytest.importorskip("resvg_py")
    package = {"prefix": "p", "width": 32, "height": 32, "icons": {"broken": {"body": "<path"}}}
    with pytest.raises(build.BuildError, match="cannot render"):
        build.render(build.icon_svg(package, "broken"), 16)


@pytest.mark.parametrize("size", ["7", "0", "-3", "5000"])
def test_an_impossible_size_is_refused(build: ModuleType, size: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        build.parse_arguments(["--packages", "p", "--size", size])
    assert stopped.value.code == 2
