"""Render the EmojiCanvas data set from seven openly licensed emoji sets, in UnlearnCanvas' layout.

The drawings come as SVG in npm packages. Get them with npm into any folder, then render:

    npm install --prefix /tmp/emoji --ignore-scripts @iconify-json/noto @iconify-json/noto-v1 \
        @iconify-json/twemoji @iconify-json/emojione @iconify-json/fluent-emoji \
        @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji-high-contrast
    pip install resvg-py
    python scripts/build_emoji_canvas.py --packages /tmp/emoji/node_modules/@iconify-json \
        --output_dir data/emoji-canvas --size 128

The result is <output_dir>/<Style>/<Object>/<n>.png, n = 1..4, RGB on white. Styles, objects, icon names and
licences are in scripts/emoji_drawings.py. The drawings are an input of the training scripts; they are not
kept in the repository.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emoji_drawings import ICONS, SOURCES, StyleSource
from PIL import Image, ImageDraw

from mu.errors import MuError


class BuildError(MuError, ValueError):
    """An icon package is missing, or is not what the tables say."""


def read_package(packages: Path, source: StyleSource) -> dict[str, Any]:
    """Read ``icons.json`` of one package and check that it is the expected icon set.

    Raises:
        BuildError: the file is missing, is no JSON, or belongs to another icon set.
    """
    path = packages / source.folder / "icons.json"
    try:
        package = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuildError(f"{path} is missing; get it with: npm install {source.package}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} is not JSON ({error}); reinstall {source.package}") from None
    if not isinstance(package, dict) or not isinstance(package.get("icons"), dict):
        raise BuildError(f"{path} has no table of icons; reinstall {source.package}")
    if package.get("prefix") != source.prefix:
        raise BuildError(f"{path} is the icon set {package.get('prefix')!r}, not {source.prefix!r}")
    return package


def icon_svg(package: Mapping[str, Any], name: str) -> str:
    """One icon as a standalone SVG document; ``currentColor`` becomes black.

    Args:
        package: a parsed ``icons.json`` (Iconify JSON format): a table ``icons`` of name -> {body, [left, top,
            width, height]}, whose numbers default to those of the set, then to 0, 0, 16, 16.
        name: the icon.

    Raises:
        BuildError: there is no such icon, or it has no body.
    """
    icons = package["icons"]
    if name not in icons:
        near = difflib.get_close_matches(name, icons, n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise BuildError(f"icon set {package.get('prefix')!r} has no icon {name!r}{hint}")
    icon = icons[name]
    body = icon.get("body")
    if not body:
        raise BuildError(f"icon {name!r} of icon set {package.get('prefix')!r} has no body")
    left, top, width, height = (
        icon.get(key, package.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}" color="black">'
        f"{body}</svg>"
    )


def render(svg: str, size_px: int) -> Image.Image:
    """Rasterise an SVG document onto a white square of ``size_px``, centred, keeping its proportions.

    Raises:
        BuildError: the document cannot be rendered.
    """
    # Imported here: only building needs it, --help and the tests of the tables do not.
    import resvg_py

    try:
        # Twice the size, then averaged down: smoother edges than the renderer's own.
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size_px, skip_system_fonts=True)
    except ValueError as error:
        raise BuildError(f"cannot render: {error}") from error
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (max(drawing.size),) * 2, "white")
    corner = ((canvas.width - drawing.width) // 2, (canvas.height - drawing.height) // 2)
    canvas.alpha_composite(drawing, corner)
    return canvas.convert("RGB").resize((size_px, size_px), Image.Resampling.BOX)


def drawings(
    packages: Path,
    size_px: int,
    sources: Mapping[str, StyleSource] = SOURCES,
    icons: Mapping[str, Sequence[str]] = ICONS,
) -> Iterator[tuple[str, str, int, Image.Image]]:
    """Render everything: yields (style, object, n, image), n from 1.

    Raises:
        BuildError: a package or an icon is missing, or a drawing came out blank.
    """
    for style, source in sources.items():
        package = read_package(packages, source)
        for object_name, names in icons.items():
            for n, name in enumerate(names, start=1):
                image = render(icon_svg(package, source.icon_name(name)), size_px)
                if min(image.convert("L").tobytes()) > 200:
                    raise BuildError(f"{style}/{object_name}/{n} ({name}) came out blank")
                yield style, object_name, n, image


def contact_sheet(images: Mapping[tuple[str, str, int], Image.Image], cell_px: int = 64) -> Image.Image:
    """All drawings on one page: a row per (object), a column per (style, n), named at the edges."""
    styles = list(dict.fromkeys(style for style, _, _ in images))
    objects = list(dict.fromkeys(object_name for _, object_name, _ in images))
    per_cell = max(n for _, _, n in images)
    columns = math.ceil(per_cell**0.5)  # the drawings of one cell in a square block
    rows = math.ceil(per_cell / columns)
    left, top, gap = 64, 20, 6
    width, height = columns * cell_px + gap, rows * cell_px + gap
    sheet = Image.new("RGB", (left + len(styles) * width, top + len(objects) * height), "lightgray")
    pen = ImageDraw.Draw(sheet)
    for x, style in enumerate(styles):
        pen.text((left + x * width, 4), style, fill="black")
    for y, object_name in enumerate(objects):
        pen.text((4, top + y * height + height // 2), object_name, fill="black")
    for (style, object_name, n), image in images.items():
        row, column = divmod(n - 1, columns)
        x = left + styles.index(style) * width + column * cell_px
        y = top + objects.index(object_name) * height + row * cell_px
        sheet.paste(image.resize((cell_px, cell_px), Image.Resampling.BOX), (x, y))
    return sheet


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--packages", type=Path, required=True, metavar="DIR", help="npm's folder node_modules/@iconify-json"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("data/emoji-canvas"), help="default: %(default)s"
    )
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels (%(default)s)")
    parser.add_argument("--contact_sheet", type=Path, metavar="PNG", help="also draw all on one page")
    options = parser.parse_args(arguments)
    if not 8 <= options.size <= 2048:
        parser.error(f"--size is {options.size}; it must be 8 to 2048 pixels")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    images: dict[tuple[str, str, int], Image.Image] = {}
    try:
        # Everything is rendered before anything is written: an error leaves no half data set.
        for style, object_name, n, image in drawings(options.packages, options.size):
            images[style, object_name, n] = image
    except BuildError as error:
        print(f"build_emoji_canvas: {error}", file=sys.stderr)
        return 2
    for (style, object_name, n), image in images.items():
        folder = options.output_dir / style / object_name
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{n}.png")
    if options.contact_sheet:
        options.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images).save(options.contact_sheet)
    print(f"{len(images)} drawings of {options.size} px in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
