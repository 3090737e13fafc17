"""The wording of prompts, as UnlearnCanvas has it: ``A Cats image in Van Gogh style.``"""

from __future__ import annotations

SEED_STYLE = "Seed_Images"
"""Folder of the unstylised photographs in UnlearnCanvas; its prompts say ``Photo``."""

CANVAS_TEMPLATE = "A {object} image in {style} style."


def style_words(style: str) -> str:
    """A style's folder name as a prompt says it: ``Van_Gogh`` -> ``Van Gogh``, ``Seed_Images`` -> ``Photo``."""
    return "Photo" if style == SEED_STYLE else style.replace("_", " ")


def canvas_prompt(object: str, style: str) -> str:
    """The prompt for an image of ``object`` in ``style``.

    Args:
        object: class name as its folder is called, e.g. ``Cats``.
        style: style name as its folder is called, e.g. ``Fluent_Flat``; ``Seed_Images`` is said as ``Photo``.

    Source: UnlearnCanvas (Zhang et al., 2024), data set card: ``A {object} image in {style} style.``
    """
    return CANVAS_TEMPLATE.format(object=object.replace("_", " "), style=style_words(style))
