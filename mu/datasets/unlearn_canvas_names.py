"""The styles and objects of UnlearnCanvas (arXiv 2402.11846), in the order of its classifiers. Nothing is imported."""

from __future__ import annotations

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
"""50 styles, and the photographs (`Seed_Images`) as class 38."""

UNLEARN_CANVAS_OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())
