"""The figures of a report as SVG for the middle of an HTML page: its own font, its own colours, light or dark.

Matplotlib is told no colour of text and lines but `_INK`, which becomes the page's `currentColor`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.style import context
from matplotlib.ticker import NullFormatter

FORGET, RETAIN = "#c8264f", "#2b7a9b"
"""Colours that are seen on white and on black."""
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_LEAST_STEPS_SMOOTHED = 20
_LABEL_LENGTH = 22

Curve = Sequence[tuple[float, float]]
"""(step, value), in order."""


def loss_curve(title: str, training: Curve, validation: Curve, *, colour: str) -> Markup:
    """One term of the loss: training steps, faint, with their running mean; validation as dots."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        curve = [(x, y) for x, y in training if math.isfinite(y)]
        smooth = running_mean(curve)
        axes.plot(*_columns(curve), color=colour, alpha=0.35 if smooth else 1, linewidth=0.8)
        if smooth:
            axes.plot(*_columns(smooth), color=colour, linewidth=1.8, label="training, running mean")
        if validation:
            look: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 0.8}
            axes.plot(*_columns(validation), color=_INK, label="validation", **look)
        values = [y for _, y in (smooth or curve)]
        if values and min(values) > 0 and max(values) > 8 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.5)
        if smooth or validation:
            axes.legend(loc="best", fontsize=8)

    return _svg(draw, (4.8, 2.8), f"{title} at each step of the training")


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


def confusion_matrix(
    counts: Mapping[str, Mapping[str, int]], *, marked: Collection[str], title: str
) -> Markup:
    """Rows: what was asked for; columns: what is seen; a cell's shade is its part of the row.

    Args:
        counts: asked -> seen -> number of images; rows and columns in the order of the outer keys, then others.
        marked: names of the forgotten concepts; their rows and labels are in colour.
    """
    rows = list(counts)
    columns = list(dict.fromkeys([*rows, *(name for row in counts.values() for name in row)]))
    cell = 0.33 if len(columns) <= 14 else 0.2

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for r, asked in enumerate(rows):
            total = sum(counts[asked].values()) or 1
            colour = FORGET if asked in marked else RETAIN
            for c, seen in enumerate(columns):
                number = counts[asked].get(seen, 0)
                part = number / total
                if number:
                    axes.add_patch(Rectangle((c, r), 1, 1, facecolor=colour, alpha=part, linewidth=0))
                if number and cell > 0.3:
                    text = f"{100 * part:.0f}" if part >= 0.005 else "<1"
                    ink = "white" if part > 0.7 else _INK
                    axes.text(c + 0.5, r + 0.53, text, ha="center", va="center", fontsize=7.5, color=ink)
            if asked in marked:
                frame = Rectangle((0, r), len(columns), 1, fill=False, edgecolor=FORGET, linewidth=1.6)
                axes.add_patch(frame)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_aspect("equal")
        size = 8.5 if cell > 0.3 else 6
        axes.set_yticks([r + 0.5 for r in range(len(rows))], [_short(name) for name in rows], fontsize=size)
        axes.set_xticks(
            [c + 0.5 for c in range(len(columns))],
            [_short(name) for name in columns],
            rotation=45,
            ha="left",
            rotation_mode="anchor",
            fontsize=size,
        )
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set(visible=True, alpha=0.35)
        for label, name in zip(axes.get_yticklabels(), rows, strict=True):
            if name in marked:
                label.set(color=FORGET, fontweight="bold")

    side = 1.4 + cell * len(columns)
    return _svg(draw, (side, 1.1 + cell * len(rows)), title)


def unet_picture(kept: Mapping[str, float], names: Collection[str] = ()) -> Markup:
    """The UNet as a U: input blocks down, the middle, output blocks up, each shaded by its kept fraction.

    Args:
        kept: block ("input_blocks.1", "middle_block.0", "time_embed", "out") -> kept fraction in [0, 1].
        names: of the UNet's parameters; with them a block is the narrower, the smaller its feature maps are.
    """
    arms = {
        kind: [block for block in kept if block.startswith(kind)] for kind in ("input", "middle", "output")
    }
    others = [block for block in kept if not block.startswith(tuple(arms))]
    levels = _levels(arms["input"], arms["output"], names)
    depth = max(levels.values(), default=0)
    rows = max(len(arms["input"]), len(arms["output"]))
    most = max(kept.values(), default=0) or 1.0

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_axis_off()

        def box(block: str, left: float, row: float, width: float) -> None:
            part = kept[block]
            shade = 0.85 * part / most
            axes.add_patch(_rounded(left, row, width, facecolor=RETAIN, alpha=shade, linewidth=0))
            axes.add_patch(_rounded(left, row, width, fill=False, edgecolor=_INK, linewidth=0.6))
            ink = "white" if shade > 0.7 else _INK
            text = f"{_words(block)} · {100 * part:.3g} %"
            axes.text(left + width / 2, row + 0.42, text, ha="center", va="center", fontsize=8, color=ink)

        for row, block in enumerate(arms["input"]):
            width = 4 - 1.2 * levels[block] / max(depth, 1)
            box(block, 4 - width, row, width)
        for row, block in enumerate(reversed(arms["output"])):
            width = 4 - 1.2 * levels[block] / max(depth, 1)
            box(block, 6, row, width)
            if row < len(arms["input"]):
                middle = row + 0.42
                axes.plot((4, 6), (middle, middle), color=_INK, alpha=0.35, linewidth=0.7, linestyle="--")
        for row, block in enumerate(arms["middle"]):
            box(block, 3.4, rows + 0.25 + row, 3.2)
        bottom = rows + 0.25 + len(arms["middle"])
        for place, block in enumerate(others):
            box(block, 5.1 * place, bottom + 0.5 + 1.0 * (place // 2), 4.9)
            bottom += place // 2
        axes.set_xlim(-0.1, 10.1)
        axes.set_ylim(bottom + (1.5 if others else 0.1), -0.15)

    height = rows + len(arms["middle"]) + 2
    return _svg(
        draw, (4.6, 0.27 * height), "The UNet, each block shaded by the fraction of its weights in the mask"
    )


def _levels(inputs: Sequence[str], outputs: Sequence[str], names: Collection[str]) -> dict[str, int]:
    """How often the feature maps of a block have been halved, as CompVis names tell it."""
    levels, level = {}, 0
    for block in inputs:
        level += any(name.startswith(f"{block}.") and ".op." in name for name in names)
        levels[block] = level
    for block in outputs:
        levels[block] = level
        # Upsampling is the last part of a block, and the only one with a bare `conv`.
        level -= any(re.match(rf"{re.escape(block)}\.\d+\.conv\.", name) is not None for name in names)
    return levels


def _rounded(left: float, row: float, width: float, **look: Any) -> FancyBboxPatch:
    return FancyBboxPatch((left, row), width, 0.84, boxstyle="round,pad=0,rounding_size=0.12", **look)


def _words(name: str) -> str:
    return name.replace("_blocks.", " ").replace("_block.", " ").replace("_", " ")


def _short(name: str) -> str:
    """For the edge of a figure: longer, it would leave no room for the figure."""
    return _words(name) if len(name) <= _LABEL_LENGTH else f"{_words(name)[: _LABEL_LENGTH - 1]}…"


def _columns(points: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _svg(draw: Callable[[Figure], None], size_inches: tuple[float, float], title: str) -> Markup:
    """What `draw` draws, as an <svg> element that stands on its own in a page."""
    with context({**_STYLE, "svg.hashsalt": title}):  # a page has several figures, whose names must differ
        figure = Figure(figsize=size_inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        content = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=none)
    text = content.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    (box,) = re.findall(r'viewBox="[^"]+"', head)
    wide = 96 * size_inches[0]
    referenced = set(re.findall(r"""(?:url\(#|href="#)([^)"]+)""", body))
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referenced else "", body)
    body = body.replace("xlink:href", "href").replace(_INK, "currentColor")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    label = Markup.escape(title)
    # The text is matplotlib's, which escapes what it is given.
    return Markup(f'<svg {box} style="width:{wide:.0f}px" role="img" aria-label="{label}">{body.strip()}')
