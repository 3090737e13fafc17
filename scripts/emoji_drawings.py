"""The artwork of EmojiCanvas: which drawings of which npm packages, and whom they are owed to.

`build_emoji_canvas.py` turns them into `<root>/<Style>/<Object>/<n>.png`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

DRAWINGS_PER_OBJECT = 4


@dataclass(frozen=True)
class StyleSource:
    """Where the drawings of one style come from.

    Attributes:
        package: npm package with the SVG bodies in ``icons.json``.
        folder: its folder under ``node_modules/@iconify-json``.
        prefix: the icon set's own name, checked against ``icons.json``.
        author: who is credited.
        licence: SPDX identifier of the artwork's licence.
        url: where the artwork's authors publish it.
        licence_url: text of the licence.
        other_names: icon name used here -> name in this package, where they differ.
    """

    package: str
    author: str
    licence: str
    url: str
    licence_url: str
    other_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def folder(self) -> str:
        return self.package.rsplit("/", 1)[-1]

    @property
    def prefix(self) -> str:
        return self.folder

    def icon_name(self, icon: str) -> str:
        """The name under which this package keeps ``icon``."""
        return self.other_names.get(icon, icon)


_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"
_CC_BY = "https://creativecommons.org/licenses/by/4.0/"
_FLUENT_MIT = "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE"


def _fluent(package: str) -> StyleSource:
    return StyleSource(
        package=package,
        author="Microsoft Corporation",
        licence="MIT",
        url="https://github.com/microsoft/fluentui-emoji",
        licence_url=_FLUENT_MIT,
    )


def _noto(package: str) -> StyleSource:
    return StyleSource(
        package=package,
        author="Google Inc",
        licence="Apache-2.0",
        url="https://github.com/googlefonts/noto-emoji",
        licence_url=_APACHE,
    )


SOURCES: Mapping[str, StyleSource] = MappingProxyType(
    {
        "Noto": _noto("@iconify-json/noto"),
        "Blob": _noto("@iconify-json/noto-v1"),
        "Twemoji": StyleSource(
            package="@iconify-json/twemoji",
            author="Twitter, Inc. and contributors",
            licence="CC-BY-4.0",
            url="https://github.com/jdecked/twemoji",
            licence_url=_CC_BY,
        ),
        "EmojiOne": StyleSource(
            package="@iconify-json/emojione",
            author="Emoji One",
            licence="CC-BY-4.0",
            url="https://github.com/EmojiTwo/emojitwo",
            licence_url=_CC_BY,
            other_names=MappingProxyType(
                {"grinning-cat": "grinning-cat-face", "weary-cat": "weary-cat-face"}
            ),
        ),
        "Fluent": _fluent("@iconify-json/fluent-emoji"),
        "Fluent_Flat": _fluent("@iconify-json/fluent-emoji-flat"),
        "High_Contrast": _fluent("@iconify-json/fluent-emoji-high-contrast"),
    }
)
"""Style name -> where its drawings come from. ``Blob`` is Noto's first version; ``High_Contrast`` is black."""

ICONS: Mapping[str, tuple[str, str, str, str]] = MappingProxyType(
    {
        "Cats": ("cat-face", "cat", "grinning-cat", "weary-cat"),
        "Dogs": ("dog-face", "dog", "poodle", "fox"),
        "Birds": ("bird", "penguin", "duck", "owl"),
        "Fishes": ("fish", "tropical-fish", "blowfish", "dolphin"),
        "Flowers": ("rose", "tulip", "sunflower", "hibiscus"),
        "Trees": ("evergreen-tree", "deciduous-tree", "palm-tree", "cactus"),
        "Fruits": ("red-apple", "banana", "strawberry", "pineapple"),
        "Cars": ("automobile", "taxi", "racing-car", "sport-utility-vehicle"),
        "Ships": ("sailboat", "ship", "ferry", "speedboat"),
        "Planes": ("airplane", "small-airplane", "rocket", "helicopter"),
        "Trains": ("locomotive", "train", "metro", "tram"),
        "Houses": ("house", "house-with-garden", "castle", "japanese-castle"),
    }
)
"""Object name -> its drawings; drawing ``n`` (from 1) is the file ``<n>.png``."""
