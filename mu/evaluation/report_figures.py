"""The figures of a report: its pictures as data URIs, small and blurred where need be; its loss curves as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image, ImageFilter

from mu.evaluation.metrics import Prediction
from mu.evaluation.report_data import EvaluationRun

CELL_PX = 96
MOST_ROWS, MOST_COLUMNS, MOST_STEPS = 12, 12, 8
_CELL_PNG_BYTES = 8_000
_PICTURE_PX = 1400
_PICTURE_PNG_BYTES = 250_000
_LEAST_STEPS_SMOOTHED = 20
_WIDTH, _HEIGHT, _LEFT, _BELOW, _ABOVE = 460, 250, 76, 38, 26
"""Of a curve, in px: the whole, and the margins in which the axes' numbers stand."""

Curve = Sequence[tuple[float, float]]
"""(step, value), in order."""


# ---- pictures


@dataclass(frozen=True)
class Cell:
    """One image of the grid: its data URI, and what it is, in words."""

    uri: str
    alt: str


@dataclass(frozen=True)
class Pair:
    """A concept's images of each model, same prompts and seeds; its cells are one for each column."""

    name: str
    forgotten: bool
    cells: dict[str, list[Cell | None]]
    accuracy: dict[str, float]


@dataclass(frozen=True)
class PictureGrid:
    """Rows of the kind that was forgotten, the forgotten ones first; columns of the other kind.

    Attributes:
        left_out: how many rows and columns there are beside those that are shown.
    """

    columns: list[str]
    pairs: list[Pair]
    left_out: tuple[int, int]


def picture_grid(run: EvaluationRun, *, blurred: bool) -> PictureGrid | None:
    """The images of the first seed of each prompt, before and after; None of images without styles and objects."""
    kind = run.template
    if kind not in ("style", "object"):
        return None
    images = {model: run.images(model) for model in run.models}
    keys = list(dict.fromkeys(key for found in images.values() for key in found))
    if not keys:
        return None
    place = 0 if kind == "style" else 1
    every = sorted(dict.fromkeys(key[place] for key in keys), key=lambda name: name not in run.concepts)
    others = list(dict.fromkeys(key[1 - place] for key in keys))
    rows, columns = _some(every, MOST_ROWS, kept=run.concepts), _some(others, MOST_COLUMNS)
    seen = {
        model: {(row.style, row.object, row.seed): row for row in predictions}
        for model, predictions in run.predictions.items()
    }
    pairs = []
    for name in rows:
        cells: dict[str, list[Cell | None]] = {}
        for model, found in images.items():
            cells[model] = []
            for column in columns:
                style, object = (name, column) if kind == "style" else (column, name)
                if (style, object) not in found:
                    cells[model].append(None)
                    continue
                seed, path = found[style, object]
                alt = _in_words(model, style, object, seed, seen.get(model, {}).get((style, object, seed)))
                uri = _data_uri(path, CELL_PX, _CELL_PNG_BYTES, blurred=blurred)
                cells[model].append(Cell(uri, alt))
        accuracy = {
            model: numbers[f"{kind}_accuracy_by_class"][name]
            for model, numbers in run.models.items()
            if name in numbers.get(f"{kind}_accuracy_by_class", {})
        }
        pairs.append(Pair(name, name in run.concepts, cells, accuracy))
    return PictureGrid(columns, pairs, (len(every) - len(rows), len(others) - len(columns)))


def picture_uri(path: Path, *, blurred: bool) -> str:
    """A whole picture, such as a grid that training has drawn."""
    return _data_uri(path, _PICTURE_PX, _PICTURE_PNG_BYTES, blurred=blurred)


def some_steps(paths: Sequence[Path]) -> list[Path]:
    """A few pictures, evenly over the run, the last among them."""
    if len(paths) <= MOST_STEPS:
        return list(paths)
    return [paths[(i + 1) * len(paths) // MOST_STEPS - 1] for i in range(MOST_STEPS)]


def _data_uri(path: Path, most_px: int, png_bytes: int, *, blurred: bool) -> str:
    """PNG, or JPEG where PNG is large. What is blurred is so in the file, not only on the screen."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((most_px, most_px), Image.Resampling.LANCZOS)
    if blurred:
        picture = picture.filter(ImageFilter.GaussianBlur(max(8, max(picture.size) / 40)))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    kind = "png"
    if content.tell() > png_bytes:
        content, kind = io.BytesIO(), "jpeg"
        picture.save(content, format="JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _some(names: Sequence[str], most: int, kept: Collection[str] = ()) -> list[str]:
    """So many names at most, evenly, with all of `kept`, in their order."""
    if len(names) <= most:
        return list(names)
    others = [name for name in names if name not in kept]
    room = max(0, most - (len(names) - len(others)))
    chosen = {others[i * len(others) // room] for i in range(room)} | set(kept)
    return [name for name in names if name in chosen]


def _in_words(model: str, style: str, object: str, seed: int, seen: Prediction | None) -> str:
    text = f"{model}: {object} in {style}, seed {seed}"
    return text if seen is None else f"{text}; seen as {seen.predicted_object} in {seen.predicted_style}"


# ---- loss curves


def loss_curve(title: str, training: Curve, validation: Curve, *, name: str, at_least: float = 0.0) -> Markup:
    """One term of the loss: training steps, faint, with their running mean; validation as dots.

    Args:
        name: class of the <svg>, from which the page takes its colour.
        at_least: how far up its axis goes, from 0, also where the term stays below.
    """
    curve = [(x, y) for x, y in training if math.isfinite(y)]
    dots = [(x, y) for x, y in validation if math.isfinite(y)]
    smooth = running_mean(curve)
    if not curve:
        return Markup("")

    # 1. Scales: from 0, so that a small loss looks small; to the largest of the running mean and the dots, so that
    #    one large step does not flatten the rest
    low, high = extent(training, validation)
    high = max(high, at_least)
    steps = [x for x, _ in (*curve, *dots)]
    first, last = min(steps), max(steps)
    reach = (high - low) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        y = min(max(y, low), high)
        across = (x - first) / ((last - first) or 1.0)
        up = (y - low) / reach
        return (
            _LEFT + across * (_WIDTH - _LEFT - 12),
            _HEIGHT - _BELOW - up * (_HEIGHT - _BELOW - _ABOVE),
        )

    def line(points: Curve, kind: str) -> str:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        return f'<polyline class="{kind}" points="{joined}"/>'

    # 2. Axes: three numbers at the side, the first and the last step below
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * reach
        _, y = place((first, value))
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step in dict.fromkeys((first, last)):
        x, _ = place((step, low))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2 + 20:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    parts.append('<text x="4" y="12">loss</text>')

    # 3. Curves
    parts.append(line(curve, "faint" if smooth else "whole"))
    if smooth:
        parts.append(line(smooth, "whole"))
    if dots:
        parts.append(line(dots, "dots"))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in map(place, dots)]
    label = Markup.escape(f"{title} over steps {first:g} to {last:g} of the training: {in_numbers(training)}")
    # All within is numbers and words of this file.
    return Markup(
        f'<svg class="curve {name}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def extent(training: Curve, validation: Curve) -> tuple[float, float]:
    """The least and the largest of 0, the running mean (of a short curve, its steps) and the validation."""
    curve = [(x, y) for x, y in training if math.isfinite(y)]
    values = [y for _, y in (*(running_mean(curve) or curve), *validation) if math.isfinite(y)]
    return min([0.0, *values]), max([0.0, *values])


def in_numbers(training: Curve) -> str:
    """Where the running mean (of a short curve, the steps) begins, ends, and is largest; "" of no finite step."""
    curve = [(x, y) for x, y in training if math.isfinite(y)]
    values = [y for _, y in running_mean(curve) or curve]
    if not values:
        return ""
    most = f", at most {max(values):.3g}" if max(values) > max(values[0], values[-1]) else ""
    return f"from {values[0]:.3g} to {values[-1]:.3g}{most}"


def running_mean(curve: Curve) -> list[tuple[float, float]]:
    """Means over a twentieth of the steps, each at the middle of its window; nothing for a short curve."""
    if len(curve) < _LEAST_STEPS_SMOOTHED:
        return []
    width = max(5, len(curve) // 20)
    found = []
    for first in range(len(curve) - width + 1):
        window = curve[first : first + width]
        found.append((sum(x for x, _ in window) / width, sum(y for _, y in window) / width))
    return found
