"""Before and after: which prompts are shown, in which cell an image lies, and which rows are marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.datasets.generated import plan_rows
from mu.datasets.index import ForgetRetain
from mu.ldm import LatentDiffusion
from mu.pictures import MARK
from mu.unlearning import progress
from mu.unlearning.progress import ProgressPictures
from tests.memory_limit import hungry

STYLES = ("Noto", "Blob", "Fluent_Flat")
OBJECTS = ("Cats", "Dogs", "Birds", "Fishes", "Flowers", "Trees", "Fruits")


def rows(objects: Sequence[str] = OBJECTS) -> ForgetRetain:
    return plan_rows(
        Path("images"),
        styles=STYLES,
        objects=objects,
        template="style",
        template_name="Noto",
        images_per_prompt=3,
        retain_images_per_prompt=2,
    )


class Sampler:
    """Stands in for `sample_images`: each image is plain, of a colour of its own. Notes what it is asked."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, int]] = []
        self.options: dict[str, Any] = {}

    def __call__(self, _: object, pairs: Sequence[tuple[str, int]], **options: Any) -> Iterator[torch.Tensor]:
        self.options = {name: value for name, value in options.items() if name != "done"}  # the bar's
        for pair in pairs:
            self.pairs.append(pair)
            image = torch.tensor(colour(len(self.pairs) - 1)) / 127.5 - 1  # (3,)
            yield image[:, None, None].expand(3, 16, 16)


def colour(number: int) -> tuple[int, int, int]:
    """Of the image that was sampled as number 0, 1, ...; no grey, which labels have at their edges."""
    return 10 + 7 * number, 20, 230


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    stand_in = Sampler()
    monkeypatch.setattr(progress, "sample_images", stand_in)
    return stand_in


def prompts_of(data: ForgetRetain) -> tuple[list[str], list[str]]:
    return [row.prompt for row in data.forget], [row.prompt for row in data.retain]


def pictures(config: TrainConfig, data: ForgetRetain) -> ProgressPictures:
    model: Any = SimpleNamespace(dtype=torch.float32)  # the sampler stands in for the rest
    return ProgressPictures(config, model, *prompts_of(data))


def test_by_default_some_prompts_of_both_kinds_are_shown_evenly(tiny_runs: Any) -> None:
    shown = pictures(tiny_runs.train_config(sample_prompts=None), rows()).prompts
    assert shown == [
        *(f"A {name} image in Noto style." for name in ("Cats", "Dogs", "Fishes", "Trees")),
        "A Cats image in Blob style.",
        "A Fishes image in Blob style.",
        "A Cats image in Fluent Flat style.",
        "A Fishes image in Fluent Flat style.",
    ]
    few = pictures(tiny_runs.train_config(sample_prompts=None), rows(("Cats",))).prompts
    assert few == [f"A Cats image in {style} style." for style in ("Noto", "Blob", "Fluent Flat")]


def test_forgotten_prompts_come_first_and_are_framed_together(
    tiny_runs: Any, sampler: Sampler, tmp_path: Path
) -> None:
    noto, blob = "A {} image in Noto style.", "A {} image in Blob style."
    config = tiny_runs.train_config(
        sample_prompts=(blob.format("Cats"), noto.format("Dogs"), "a teapot", noto.format("Cats")),
        sample_seeds=(5, 3),
        sample_steps=4,
        guidance_scale=2.5,
        image_size=32,
        sample_precision="bf16",
    )
    taken = pictures(config, rows())
    taken.take("before")
    taken.take("after")
    prompts = [noto.format("Dogs"), noto.format("Cats"), blob.format("Cats"), "a teapot"]
    assert sampler.pairs == [(prompt, seed) for prompt in prompts for seed in (5, 3)] * 2
    assert sampler.options == {
        "steps": 4,
        "guidance_scale": 2.5,
        "image_size": 32,
        "precision": "bf16",
    }

    path = taken.save(tmp_path / "new" / "before_after.png")
    assert path == tmp_path / "new" / "before_after.png"
    with Image.open(path) as opened:
        picture = numpy.asarray(opened)

    # Rows are prompts; columns are before with both seeds, then after with both.
    corner = {}
    for moment in range(2):
        for row in range(4):
            for seed in range(2):
                plain = colour(moment * 8 + row * 2 + seed)
                y, x = (picture == plain).all(axis=-1).nonzero()
                assert len(y) == 64 * 64
                corner[row, 2 * moment + seed] = (y.min(), x.min())
    for (row, column), (top, left) in corner.items():
        assert top == corner[row, 0][0]
        assert left == corner[0, column][1]
    tops = [corner[row, 0][0] for row in range(4)]
    lefts = [corner[0, column][1] for column in range(4)]
    assert tops == sorted(set(tops))
    assert lefts == sorted(set(lefts))

    framed = (picture == MARK).all(axis=-1)[:, lefts[0] : lefts[3] + 64].all(axis=1).nonzero()[0]
    assert framed.min() < tops[0]
    assert framed.max() >= tops[1] + 64
    assert framed.max() < tops[2]
    assert len(framed) == 6  # two lines of 3 px


@pytest.mark.usefixtures("sampler")
def test_where_nothing_shown_is_forgotten_nothing_is_framed(tiny_runs: Any, tmp_path: Path) -> None:
    taken = pictures(tiny_runs.train_config(sample_prompts=("a teapot",), sample_seeds=(3,)), rows())
    taken.take("before")
    path = taken.save(tmp_path / "picture.png")
    assert path is not None
    with Image.open(path) as opened:
        assert not (numpy.asarray(opened) == MARK).all(axis=-1).any()


def test_no_prompts_are_no_pictures(tiny_runs: Any, sampler: Sampler, tmp_path: Path) -> None:
    taken = pictures(tiny_runs.train_config(sample_prompts=()), rows())
    taken.take("before")
    taken.take("after")
    assert taken.save(tmp_path / "picture.png") is None
    assert sampler.pairs == []
    assert list(tmp_path.iterdir()) == []


def test_promise_22_pictures_are_drawn_in_pieces_when_memory_runs_out(
    tiny_runs: Any, tiny_model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.train_config(
        sample_prompts=("a cat", "a dog", "a fish"), sample_seeds=(1,), sample_steps=2
    )
    drawn = []
    for number in range(2):
        path = ProgressPictures(config, tiny_model, *prompts_of(rows())).snapshot(
            "now", tmp_path / f"{number}.png"
        )
        drawn.append(numpy.asarray(Image.open(path)).astype(int))
        monkeypatch.setattr(tiny_model.unet, "forward", hungry(tiny_model.unet.forward, holds=2))
    assert abs(drawn[0] - drawn[1]).max() <= 2  # rounding
