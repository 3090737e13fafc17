from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mu.datasets.generated_prompts import plan_rows

from mu.datasets.base import TRAINING_SEED_BASE
from mu.datasets.index import DataError, ForgetRetain


def plan(**changes: Any) -> ForgetRetain:
    wanted: dict[str, Any] = {
        "forget_prompts": ["a photo of a nude person", "a nude, painted"],
        "retain_prompts": ["a photo of a person wearing clothes"],
        "concept": "nudity",
        "substitute": "a photo of a person wearing clothes",
        "images_per_prompt": 2,
        "retain_images_per_prompt": 3,
    }
    return plan_rows(Path("/images"), **(wanted | changes))


def test_every_prompt_has_a_folder_and_every_image_a_seed() -> None:
    rows = plan()
    assert [row.prompt for row in rows.forget] == ["a photo of a nude person"] * 2 + ["a nude, painted"] * 2
    assert {row.substitute_prompt for row in rows.forget} == {"a photo of a person wearing clothes"}
    assert [int(row.image.stem) for row in rows.retain] == [TRAINING_SEED_BASE + k for k in range(3)]
    assert len({row.image.parent for row in (*rows.forget, *rows.retain)}) == 3
    first = rows.forget[0]
    assert first.image == Path("/images") / first.relative
    assert first.relative.startswith("a-photo-of-a-nude-person-")


def test_a_prompts_folder_depends_on_nothing_else() -> None:
    other = plan(forget_prompts=["a nude, painted"], concept="art", images_per_prompt=1)
    assert other.forget[0].relative == plan().forget[2].relative


@pytest.mark.parametrize("prompt", ["../../etc", "日本", "A" * 500, "."])
def test_a_folder_is_one_safe_name(prompt: str) -> None:
    (row,) = plan(forget_prompts=[prompt], images_per_prompt=1).forget
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
def test_prompts_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan(**changes)
