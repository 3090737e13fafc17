"""The tables of EmojiCanvas and the prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from emoji_drawings import DRAWINGS_PER_OBJECT, ICONS, SOURCES

import mu
from mu.datasets.canvas import canvas_prompt
from mu.datasets.emoji_canvas import OBJECTS, STYLES

NOTICE = Path(mu.__file__).parent / "assets/emoji_canvas/NOTICE"


def test_the_grid_is_seven_styles_by_twelve_objects_of_four_drawings() -> None:
    assert (len(STYLES), len(OBJECTS)) == (7, 12)
    assert (tuple(SOURCES), tuple(ICONS)) == (STYLES, OBJECTS)
    assert STYLES == ("Noto", "Blob", "Twemoji", "EmojiOne", "Fluent", "Fluent_Flat", "High_Contrast")
    assert {len(names) for names in ICONS.values()} == {DRAWINGS_PER_OBJECT} == {4}


def test_no_drawing_is_used_twice_and_no_package_twice() -> None:
    names = [name for names in ICONS.values() for name in names]
    assert len(set(names)) == len(names) == 48
    assert len({source.package for source in SOURCES.values()}) == 7
    for source in SOURCES.values():
        theirs = [source.icon_name(name) for name in names]
        assert len(set(theirs)) == 48
        assert set(source.other_names) <= set(names)


def test_style_and_object_names_are_single_path_parts() -> None:
    assert all(name.replace("_", "").isalpha() for name in (*STYLES, *OBJECTS))


@pytest.mark.parametrize("style", STYLES)
def test_the_notice_credits_every_source(style: str) -> None:
    notice = NOTICE.read_text(encoding="utf-8")
    source = SOURCES[style]
    for owed in (style, source.package, source.author, source.licence, source.url, source.licence_url):
        assert owed in notice


@pytest.mark.parametrize(
    ("object_name", "style", "prompt"),
    [
        ("Cats", "Van_Gogh", "A Cats image in Van Gogh style."),
        ("Houses", "High_Contrast", "A Houses image in High Contrast style."),
        ("Dogs", "Seed_Images", "A Dogs image in Photo style."),
    ],
)
def test_prompts_are_worded_as_in_unlearn_canvas(object_name: str, style: str, prompt: str) -> None:
    assert canvas_prompt(object_name, style) == prompt


def test_the_tables_load_nothing_heavy() -> None:
    code = (
        "import sys, mu.datasets.emoji_canvas, mu.datasets.canvas; "
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
