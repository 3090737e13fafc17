"""The grid of styles x objects, as UnlearnCanvas has it: its names, the wording of its prompts, and its rows.

Source: Zhang et al., UnlearnCanvas, 2024 (arXiv 2402.11846). Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mu.datasets.index import Row, fill_substitute

SEED_STYLE = "Seed_Images"
"""Folder of the unstylised photographs; its prompts say ``Photo``."""
CANVAS_TEMPLATE = "A {object} image in {style} style."
StandIns = Mapping[str, tuple[str | None, str | None]]
"""Forgotten style or object -> what stands in for it, see `choose_substitute`."""

_STYLES = """
Abstractionism Artist_Sketch Blossom_Season Bricks Byzantine Cartoon Cold_Warm Color_Fantasy Comic_Etch Crayon
Cubism Dadaism Dapple Defoliation Early_Autumn Expressionism Fauvism French Glowing_Sunset Gorgeous_Love Greenfield
Impressionism Ink_Art Joy Liquid_Dreams Magic_Cube Meta_Physics Meteor_Shower Monet Mosaic Neon_Lines On_Fire Pastel
Pencil_Drawing Picasso Pop_Art Red_Blue_Ink Rust Seed_Images Sketch Sponge_Dabbed Structuralism Superstring
Surrealism Ukiyoe Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor Winter
"""
_OBJECTS = """
Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish Rabbits Sandwiches
Sea Statues Towers Trees Waterfalls
"""
UNLEARN_CANVAS_STYLES: tuple[str, ...] = tuple(_STYLES.split())
"""50 styles, and the photographs (`Seed_Images`) as class 38: the order of the data set's classifiers."""
UNLEARN_CANVAS_OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())


def canvas_row(image: Path, style: str, object: str, *, template: str, stand_ins: StandIns) -> Row:
    """The row of an image `<Style>/<Object>/<file>` of a grid; it is to be forgotten if `stand_ins` has its concept."""
    concept = style if template == "style" else object
    name, whole_prompt = stand_ins.get(concept, (None, None))
    substitute = None
    if whole_prompt is not None:
        substitute = fill_substitute(whole_prompt, style=style_words(style), object=object)
    elif name is not None:
        substitute = canvas_prompt(object, name) if template == "style" else canvas_prompt(name, style)
    return Row(
        image,
        f"{style}/{object}/{image.name}",
        canvas_prompt(object, style),
        style,
        object,
        concept,
        substitute,
    )


def style_words(style: str) -> str:
    """A style's folder name as a prompt says it: ``Van_Gogh`` -> ``Van Gogh``, ``Seed_Images`` -> ``Photo``."""
    return "Photo" if style == SEED_STYLE else style.replace("_", " ")


def canvas_prompt(object: str, style: str) -> str:
    """The prompt for an image of ``object`` in ``style``, both as their folders are called.

    Source: UnlearnCanvas (Zhang et al., 2024), data set card: ``A {object} image in {style} style.``
    """
    return CANVAS_TEMPLATE.format(object=object.replace("_", " "), style=style_words(style))
