from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.images import load_image
from mu.datasets.index import DataError, Row
from mu.datasets.streams import draw
from mu.ldm.latent_diffusion import LatentDiffusion
from tests.stand_in_model import build_model

STYLES, OBJECTS, IMAGES = ["Blob", "Noto", "Seed_Images"], ["Cats", "Dogs"], 5
FORGET_COUNT, RETAIN_COUNT = 10, 20


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build_model(timesteps=50)


@pytest.fixture
def config(tmp_path: Path) -> SimpleNamespace:
    number = 0
    for style in STYLES:
        for object in OBJECTS:
            (tmp_path / "raw" / style / object).mkdir(parents=True)
            for n in range(1, IMAGES + 1):
                number += 1
                colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
                Image.new("RGB", (16, 16), colour).save(tmp_path / "raw" / style / object / f"{n}.png")
    return SimpleNamespace(
        raw_dataset_dir=str(tmp_path / "raw"),
        processed_dataset_dir=str(tmp_path / "processed"),
        dataset_type="unlearncanvas",
        template="style",
        template_name="Noto",
        use_sample=False,
        image_size=16,
        styles=None,
        objects=None,
        images_per_prompt=2,
        retain_images_per_prompt=1,
        sample_steps=2,
        guidance_scale=2.0,
        sample_precision="fp32",
        substitute=None,
        retain_dataset_dir=None,
        retain_set=None,
        forget_prompts=None,
        retain_prompts=None,
        batch_size=4,
        seed=0,
        num_timesteps=50,
        draws_per_image=1,
        epochs=3,
        retain_batch_size=None,
    )


def with_(config: SimpleNamespace, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**(vars(config) | changes))


def expected(model: LatentDiffusion, row: Row, *, seed: int, stage: str, epoch: int, timesteps: int) -> Any:
    """latents, timestep and noise written out from the formulas."""
    made = draw(seed, stage, epoch, row.key, shape=(4, 8, 8), num_timesteps=timesteps)
    with torch.no_grad():
        mean, logvar = model.encode(load_image(row.image, 16)[None])
    latents = 0.5 * (mean[0] + (0.5 * logvar[0]).exp() * made.posterior_noise)
    return latents, made.timestep, made.noise


def seen(loader: Any, part: str) -> dict[bytes, tuple[int, bytes]]:
    """Every image drawn: its noise -> (timestep, latent)."""
    found = {}
    for batch in loader:
        latents, timesteps, noise = getattr(batch, part)[:3]
        for place in range(len(latents)):
            found[noise[place].numpy().tobytes()] = (int(timesteps[place]), latents[place].numpy().tobytes())
    return found


def flat(batch: Any) -> list[Tensor]:
    return [*batch.forget, *batch.retain]


def test_mask_batches_hold_each_image_once_with_the_draw_of_its_stream(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    handler = SaliencyUnlearnDataHandler(config, model)
    batches = list(handler.mask_batches())
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    assert handler.mask_batch_count == 3
    latents, timesteps, noise, context, uncond = (torch.cat(parts) for parts in zip(*batches, strict=True))
    empty = model.embed([""])[0]
    for place, row in enumerate(handler.rows.forget):
        own = expected(model, row, seed=0, stage="mask", epoch=0, timesteps=50)
        assert torch.allclose(latents[place], own[0], atol=1e-6)
        assert int(timesteps[place]) == own[1]
        assert torch.equal(noise[place], own[2])
        assert torch.equal(context[place], model.embed([row.prompt])[0])
        assert torch.equal(uncond[place], empty)
    assert not torch.equal(context[0], uncond[0])


def test_every_draw_of_an_image_is_another(model: LatentDiffusion, config: SimpleNamespace) -> None:
    handler = SaliencyUnlearnDataHandler(with_(config, draws_per_image=3), model)
    noise = torch.cat([batch[2] for batch in handler.mask_batches()])
    assert len(noise) == 30
    assert handler.mask_batch_count == 8
    assert len({one.numpy().tobytes() for one in noise}) == 30
    once = torch.cat([batch[2] for batch in SaliencyUnlearnDataHandler(config, model).mask_batches()])
    assert torch.equal(noise[:10], once)


def test_mask_draws_do_not_depend_on_the_batch_size(model: LatentDiffusion, config: SimpleNamespace) -> None:
    small, large = (
        [
            torch.cat(parts)
            for parts in zip(
                *SaliencyUnlearnDataHandler(with_(config, batch_size=size), model).mask_batches(), strict=True
            )
        ]
        for size in (3, 10)
    )
    assert all(torch.equal(one, other) for one, other in zip(small, large, strict=True))


def test_num_timesteps_bounds_the_timesteps_of_the_mask(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    few = SaliencyUnlearnDataHandler(with_(config, num_timesteps=3, draws_per_image=10), model)
    times = torch.cat([batch[1] for batch in few.mask_batches()])
    assert set(times.tolist()) == {0, 1, 2}
    many = SaliencyUnlearnDataHandler(with_(config, num_timesteps=1000, draws_per_image=10), model)
    assert int(torch.cat([batch[1] for batch in many.mask_batches()]).max()) <= 49


def test_an_epoch_is_one_pass_over_forget_with_its_short_last_batch(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    handler = SaliencyUnlearnDataHandler(config, model)
    batches = list(handler.train_batches)
    assert (handler.train_batches.steps_per_epoch, handler.train_batches.total_steps) == (3, 9)
    assert len(batches) == 9
    assert [len(batch.forget[0]) for batch in batches] == [4, 4, 2] * 3
    assert [len(batch.retain[0]) for batch in batches] == [4] * 9
    orders = []
    for epoch in range(3):
        noise = torch.cat([batch.forget[2] for batch in batches[3 * epoch : 3 * epoch + 3]])
        found = {one.numpy().tobytes(): place for place, one in enumerate(noise)}
        streams = [
            draw(0, "forget", epoch, row.key, shape=(4, 8, 8), num_timesteps=50)
            for row in handler.rows.forget
        ]
        orders.append(
            [found[stream.noise.numpy().tobytes()] for stream in streams]
        )  # KeyError: not this epoch's
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1]


def test_a_training_batch_holds_what_its_streams_say(model: LatentDiffusion, config: SimpleNamespace) -> None:
    handler = SaliencyUnlearnDataHandler(config, model)
    batches = list(handler.train_batches)
    own = {
        expected(model, row, seed=0, stage="forget", epoch=1, timesteps=50)[2].numpy().tobytes(): row
        for row in handler.rows.forget
    }
    latents, timesteps, noise, context, substitute_context = batches[4].forget
    for place in range(4):
        row = own[noise[place].numpy().tobytes()]
        right = expected(model, row, seed=0, stage="forget", epoch=1, timesteps=50)
        assert torch.allclose(latents[place], right[0], atol=1e-6)
        assert int(timesteps[place]) == right[1]
        assert torch.equal(context[place], model.embed([row.prompt])[0])
        assert torch.equal(
            substitute_context[place], model.embed([f"A {row.object} image in Photo style."])[0]
        )
        assert not torch.equal(context[place], substitute_context[place])


def test_batches_name_their_images(model: LatentDiffusion, config: SimpleNamespace) -> None:
    """In the order of the batch: each file's stream gives the noise at its place."""
    handler = SaliencyUnlearnDataHandler(with_(config, draws_per_image=2), model)
    batch = list(handler.train_batches)[4]
    for part, count in (("forget", 4), ("retain", 4)):
        files = batch.images[part]
        assert len(files) == count
        rows = {str(row.image): row for row in getattr(handler.rows, part)}
        for place, file in enumerate(files):
            number = 1 if part == "forget" else (4 * 4 + place) // RETAIN_COUNT
            made = draw(0, part, number, rows[file].key, shape=(4, 8, 8), num_timesteps=50)
            assert torch.equal(getattr(batch, part).noise[place], made.noise)
    for index, (_, _, noise, *_) in enumerate(handler.mask_batches()):
        files = handler.mask_images(index)
        assert len(files) == len(noise)
        for place, file in enumerate(files):
            row = next(row for row in handler.rows.forget if str(row.image) == file)
            number = (4 * index + place) // FORGET_COUNT
            made = draw(0, "mask", number, row.key, shape=(4, 8, 8), num_timesteps=50)
            assert torch.equal(noise[place], made.noise)


def test_half_precision_images_are_kept_beside_the_others(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    """The folder of exact images is the one they have had before there was a choice."""
    asked = with_(config, dataset_type="generated", styles=["Noto", "Blob"], objects=["Cats"])
    folders = []
    for precision in ("fp32", "bf16"):
        handler = SaliencyUnlearnDataHandler(with_(asked, sample_precision=precision), model)
        folders.append(handler.rows.forget[0].image.parents[2])
    settings = SampleSettings(steps=2, guidance_scale=2.0, image_size=16)
    assert folders[0] == GeneratedImages(model, config.processed_dataset_dir, settings).path
    assert folders[0] != folders[1]


def test_retained_images_run_through_passes_of_their_own(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    handler = SaliencyUnlearnDataHandler(with_(config, retain_batch_size=6), model)
    noise = torch.cat([batch.retain[2] for batch in handler.train_batches])  # 54 positions: 20 + 20 + 14
    contexts = torch.cat([batch.retain[3] for batch in handler.train_batches])
    assert len(noise) == 54
    for number in range(3):
        streams = {
            draw(0, "retain", number, row.key, shape=(4, 8, 8), num_timesteps=50).noise.numpy().tobytes(): row
            for row in handler.rows.retain
        }
        part = slice(20 * number, 20 * number + 20)
        rows = [streams[one.numpy().tobytes()] for one in noise[part]]
        assert len(set(rows)) == len(rows) == (20, 20, 14)[number]
        for row, context in zip(rows, contexts[part], strict=True):
            assert torch.equal(context, model.embed([row.prompt])[0])
    assert all(row.style != "Noto" for row in handler.rows.retain)


def test_draws_of_an_epoch_do_not_depend_on_the_batch_size(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    small = SaliencyUnlearnDataHandler(with_(config, batch_size=3, retain_batch_size=5), model).train_batches
    large = SaliencyUnlearnDataHandler(
        with_(config, batch_size=10, retain_batch_size=20), model
    ).train_batches
    assert seen(small, "forget") == seen(large, "forget")
    assert len(seen(large, "forget")) == 30
    assert seen(small, "retain") == seen(large, "retain")


@pytest.mark.parametrize("start", [1, 3, 8])
def test_a_batch_is_the_same_whatever_was_asked_for_before(
    model: LatentDiffusion, config: SimpleNamespace, start: int
) -> None:
    whole = list(SaliencyUnlearnDataHandler(config, model).train_batches)
    rest = SaliencyUnlearnDataHandler(config, model).train_batches
    for step in range(start, 9):
        pairs = zip(flat(whole[step]), flat(rest[step]), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)


def test_the_seed_changes_order_and_noise(model: LatentDiffusion, config: SimpleNamespace) -> None:
    first = next(iter(SaliencyUnlearnDataHandler(config, model).train_batches))
    other = next(iter(SaliencyUnlearnDataHandler(with_(config, seed=1), model).train_batches))
    assert not any(torch.equal(left, right) for left, right in zip(flat(first), flat(other), strict=True))


def test_batches_are_the_same_wherever_the_data_lies(
    model: LatentDiffusion, config: SimpleNamespace, tmp_path: Path
) -> None:
    before = list(SaliencyUnlearnDataHandler(config, model).train_batches)
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    moved = with_(
        config, raw_dataset_dir=str(tmp_path / "elsewhere"), processed_dataset_dir=str(tmp_path / "new")
    )
    after = list(SaliencyUnlearnDataHandler(moved, model).train_batches)
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(flat(one), flat(other), strict=True))


def test_only_images_that_are_read_are_encoded_and_listed(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    handler = SaliencyUnlearnDataHandler(with_(config, epochs=1, retain_batch_size=2), model)
    loader = handler.train_batches
    list(loader)
    assert len(handler.train_batches.retain.mean) == 6  # 3 steps of 2, out of 20
    folder = Path(config.processed_dataset_dir) / "index/unlearncanvas/style-Noto"
    assert len((folder / "retain/images.txt").read_text().splitlines()) == 6
    images = (folder / "forget/images.txt").read_text().splitlines()
    assert images == [str(row.image) for row in handler.rows.forget]
    assert (folder / "forget/prompts.txt").read_text().splitlines() == [
        row.prompt for row in handler.rows.forget
    ]


def test_use_sample_takes_three_images_of_each_folder(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    handler = SaliencyUnlearnDataHandler(with_(config, use_sample=True), model)
    assert (len(handler.rows.forget), len(handler.rows.retain)) == (6, 12)


def test_generated_images_are_sampled_for_what_is_asked(
    model: LatentDiffusion, config: SimpleNamespace
) -> None:
    asked = with_(
        config, dataset_type="generated", styles=["Noto", "Blob"], objects=["Cats", "Dogs"], epochs=2
    )
    handler = SaliencyUnlearnDataHandler(asked, model)
    assert not list(Path(config.processed_dataset_dir).rglob("*.png"))
    mask = list(handler.mask_batches())
    assert sum(len(batch[0]) for batch in mask) == 4
    found = {path.parent.parent.name for path in Path(config.processed_dataset_dir).rglob("*.png")}
    assert found == {"Noto"}  # a mask needs no image to retain
    batch = next(iter(handler.train_batches))
    assert len(list(Path(config.processed_dataset_dir).rglob("*.png"))) == 6
    own = {
        draw(0, "forget", 0, row.key, shape=(4, 8, 8), num_timesteps=50).noise.numpy().tobytes(): row
        for row in handler.rows.forget
    }
    for noise, substitute_context in zip(batch.forget[2], batch.forget[4], strict=True):
        row = own[noise.numpy().tobytes()]
        assert torch.equal(substitute_context, model.embed([f"A {row.object} image in Blob style."])[0])


def test_emoji_canvas_is_the_default_grid(model: LatentDiffusion, config: SimpleNamespace) -> None:
    handler = SaliencyUnlearnDataHandler(
        with_(config, dataset_type="generated", template_name="Twemoji"), model
    )
    assert len(handler.rows.forget) == 12 * 2
    assert len(handler.rows.retain) == 6 * 12
    assert handler.rows.forget[0].substitute_prompt == "A Cats image in EmojiOne style."


def test_a_run_without_anything_to_retain_is_refused(model: LatentDiffusion, config: SimpleNamespace) -> None:
    lonely = with_(config, dataset_type="generated", template_name="Noto", retain_images_per_prompt=0)
    with pytest.raises(DataError, match="no image to retain"):
        _ = SaliencyUnlearnDataHandler(lonely, model).train_batches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_type": "unlearn_canvas"}, "Did you mean 'unlearncanvas'"),
        ({"template_name": "../Noto"}, "template_name"),
        ({"image_size": 17}, "multiple of 2 px, for example 16"),
    ],
)
def test_what_cannot_be_is_refused(
    model: LatentDiffusion, config: SimpleNamespace, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        SaliencyUnlearnDataHandler(with_(config, **changes), model)


@pytest.mark.parametrize("step", [-1, 9])
def test_a_step_beyond_the_end_is_refused(model: LatentDiffusion, config: SimpleNamespace, step: int) -> None:
    with pytest.raises(IndexError, match=rf"step {step} is not in 0\.\.8"):
        SaliencyUnlearnDataHandler(config, model).train_batches[step]
