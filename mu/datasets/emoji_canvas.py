"""EmojiCanvas: twelve objects drawn by seven emoji houses, a style x object grid like UnlearnCanvas in small."""

from __future__ import annotations

STYLES: tuple[str, ...] = ("Noto", "Blob", "Twemoji", "EmojiOne", "Fluent", "Fluent_Flat", "High_Contrast")
"""`Blob` is Noto's first version; `High_Contrast` is black."""
OBJECTS: tuple[str, ...] = (
    "Cats",
    "Dogs",
    "Birds",
    "Fishes",
    "Flowers",
    "Trees",
    "Fruits",
    "Cars",
    "Ships",
    "Planes",
    "Trains",
    "Houses",
)
