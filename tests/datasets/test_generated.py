from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mu.datasets.base import TRAINING_SEED_BASE
from mu.datasets.generated import plan_rows
from mu.datasets.index import DataError, ForgetRetain
from tests.datasets.drawing import data_set

STYLES = ("Noto", "Blob", "Fluent_Flat")
OBJECTS = ("Cats", "Dogs")


def plan(images: Path = Path("/images"), **changes: Any) -> ForgetRetain:
    wanted: dict[str, Any] = {
        "styles": STYLES,
        "objects": OBJECTS,
        "template": "style",
        "template_name": "Noto",
        "images_per_prompt": 2,
        "retain_images_per_prompt": 1,
    }
    return plan_rows(images, **(wanted | changes))


def test_a_style_is_forgotten_with_all_objects() -> None:
    rows = plan()
    assert [row.relative for row in rows.forget] == [
        f"Noto/{object}/{TRAINING_SEED_BASE + k}.png" for object in OBJECTS for k in range(2)
    ]
    assert rows.forget[0].prompt == "A Cats image in Noto style."
    assert rows.forget[0].substitute_prompt == "A Cats image in Blob style."
    assert [(row.style, row.object) for row in rows.retain] == [
        (style, object) for style in STYLES[1:] for object in OBJECTS
    ]
    assert rows.retain[-1].prompt == "A Dogs image in Fluent Flat style."


def test_an_object_is_forgotten_in_all_styles() -> None:
    rows = plan(template="object", template_name="Dogs")
    assert Counter((row.style, row.object) for row in rows.forget) == {(style, "Dogs"): 2 for style in STYLES}
    assert {row.object for row in rows.retain} == {"Cats"}
    assert (
        rows.forget[-1].substitute_prompt == "A Cats image in Fluent Flat style."
    )  # the first after the last


def test_the_last_style_is_replaced_by_the_first() -> None:
    assert plan(template_name="Fluent_Flat").forget[0].substitute_prompt == "A Cats image in Noto style."


def test_several_styles_are_forgotten_together() -> None:
    rows = plan(template_name=("Noto", "Blob"))
    assert Counter(row.style for row in rows.forget) == {"Noto": 4, "Blob": 4}
    assert {row.substitute_prompt for row in rows.forget} == {
        "A Cats image in Fluent Flat style.",
        "A Dogs image in Fluent Flat style.",
    }
    assert {row.style for row in rows.retain} == {"Fluent_Flat"}
    assert plan(template_name=("Noto",)) == plan(template_name="Noto")
    with pytest.raises(DataError, match="'Noto', 'Blob', 'Fluent_Flat' are all styles here"):
        plan(template_name=STYLES)


def test_a_chosen_substitute_is_used() -> None:
    assert plan(substitute="Fluent Flat").forget[-1].substitute_prompt == "A Dogs image in Fluent Flat style."
    assert plan(substitute="a sketch of {object}").forget[-1].substitute_prompt == "a sketch of Dogs"


def test_no_training_seed_is_an_evaluation_seed() -> None:
    rows = plan(images_per_prompt=50, retain_images_per_prompt=50)
    seeds = {int(row.image.stem) for row in rows.forget + rows.retain}
    assert min(seeds) == 1_000_000
    assert seeds.isdisjoint({188, 288, 588, 688, 888})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template_name": "noto"}, "Did you mean 'Noto'"),
        ({"template": "object", "template_name": "Noto"}, "not one of: Cats, Dogs"),
        ({"styles": ("Noto", "../etc")}, "cannot name a folder"),
        ({"objects": ()}, "objects: the list is empty"),
        ({"styles": ("Noto",)}, "the only style here"),
        ({"substitute": "Noto"}, "the style to forget"),
        ({"substitute": "A Dogs image in Noto style."}, "one of the prompts to forget"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan(**changes)


def plan_prompts(**changes: Any) -> ForgetRetain:
    wanted: dict[str, Any] = {
        "forget_prompts": ["a photo of a nude person", "a nude, painted"],
        "retain_prompts": ["a photo of a person wearing clothes"],
        "template_name": "nudity",
        "substitute": "a photo of a person wearing clothes",
        "images_per_prompt": 2,
        "retain_images_per_prompt": 3,
    }
    return data_set("generated", **wanted | changes).rows(Path("/images"))


def test_every_prompt_has_a_folder_and_every_image_a_seed() -> None:
    rows = plan_prompts()
    assert [row.prompt for row in rows.forget] == ["a photo of a nude person"] * 2 + ["a nude, painted"] * 2
    assert {row.substitute_prompt for row in rows.forget} == {"a photo of a person wearing clothes"}
    assert [int(row.image.stem) for row in rows.retain] == [TRAINING_SEED_BASE + k for k in range(3)]
    assert len({row.image.parent for row in (*rows.forget, *rows.retain)}) == 3
    first = rows.forget[0]
    assert first.image == Path("/images") / first.relative
    assert first.relative.startswith("a-photo-of-a-nude-person-")


def test_a_prompts_folder_depends_on_nothing_else() -> None:
    other = plan_prompts(forget_prompts=["a nude, painted"], template_name="art", images_per_prompt=1)
    assert other.forget[0].relative == plan_prompts().forget[2].relative


@pytest.mark.parametrize("prompt", ["../../etc", "日本", "A" * 500, "."])
def test_a_folder_is_one_safe_name(prompt: str) -> None:
    (row,) = plan_prompts(forget_prompts=[prompt], images_per_prompt=1).forget
    folder, _, name = row.relative.partition("/")
    assert set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert 12 <= len(folder) <= 60
    assert name == f"{TRAINING_SEED_BASE}.png"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retain_prompts": ["A nude,  painted"]}, "is a prompt to forget and"),
        ({"substitute": "a nude, painted"}, "one of the prompts to forget"),
        ({"substitute": "Nudity"}, "is to be forgotten"),
        ({"forget_prompts": ["a {object}"]}, "forget_prompts: .* placeholder"),
        ({"retain_prompts": [" "]}, "retain_prompts: .* blank"),
    ],
)
def test_free_prompts_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_prompts(**changes)
