from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.bars import bar
from mu.datasets import generated_images
from mu.datasets.base import SAMPLED_PROMPTS, TRAINING_SEED_BASE
from mu.datasets.generated import plan_rows
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.images import load_image, to_uint8
from mu.datasets.index import DataError, ForgetRetain
from mu.datasets.streams import initial_noise
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.sampler import sample_ddim
from tests.datasets.drawing import data_set
from tests.memory_limit import hungry

STYLES = ("Noto", "Blob", "Fluent_Flat")
OBJECTS = ("Cats", "Dogs")
SETTINGS = SampleSettings(steps=4, guidance_scale=3.0, image_size=16)


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


def test_an_image_is_sampled_from_its_own_noise_and_prompt(model: LatentDiffusion, tmp_path: Path) -> None:
    images = GeneratedImages(model, tmp_path, SETTINGS)
    rows = plan(images.path)
    assert images.sample_missing(rows.forget, batch_size=3) == 4
    row = rows.forget[3]
    latents = sample_ddim(
        model,
        model.embed([row.prompt]),
        shape=(4, 8, 8),
        steps=4,
        guidance_scale=3.0,
        uncond_context=model.embed([""]),
        initial_noise=initial_noise("Noto", "Dogs", TRAINING_SEED_BASE + 1, (4, 8, 8))[None],
    )
    with torch.no_grad():
        expected = to_uint8(model.decode(latents)[0]).int()
    found = to_uint8(load_image(row.image, 16)).int()
    assert found.float().std() > 5  # a picture, not a plain colour
    assert int((found - expected).abs().max()) <= 1  # another batch size: the same up to rounding


def test_the_progress_says_which_images_they_are(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def recorded(what: str, **keys: Any) -> Any:
        told.append(what)
        return bar(what, **keys)

    monkeypatch.setattr(generated_images, "bar", recorded)
    images = GeneratedImages(model, tmp_path, SETTINGS)
    rows = plan(images.path)
    images.sample_missing(rows.forget[:1], batch_size=1)
    images.sample_missing(rows.forget[1:2], batch_size=1, of="before")
    assert told == ["drawing images", "drawing images before"]


def test_images_of_free_prompts_are_sampled_once_and_lie_apart(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    images = GeneratedImages(model, tmp_path, SETTINGS, **SAMPLED_PROMPTS)
    assert images.path.parent == tmp_path / "generated_prompts"
    keys = {"forget_prompts": ["a wolf"], "retain_prompts": ["a dog"], "template_name": "wolves"}
    wolves = data_set("generated", **keys, images_per_prompt=2, retain_images_per_prompt=1)
    assert wolves.sampled == SAMPLED_PROMPTS
    rows = wolves.rows(images.path)
    assert images.sample_missing((*rows.forget, *rows.retain), batch_size=2) == 3
    latents = sample_ddim(
        model,
        model.embed(["a wolf"]),
        shape=(4, 8, 8),
        steps=4,
        guidance_scale=3.0,
        uncond_context=model.embed([""]),
        initial_noise=initial_noise("", "a wolf", TRAINING_SEED_BASE + 1, (4, 8, 8))[None],
    )
    with torch.no_grad():
        expected = to_uint8(model.decode(latents)[0]).int()
    found = to_uint8(load_image(rows.forget[1].image, 16)).int()
    assert int((found - expected).abs().max()) <= 1
    assert images.sample_missing((*rows.forget, *rows.retain), batch_size=2) == 0


def test_the_folder_of_a_grid_is_named_as_ever(model: LatentDiffusion, tmp_path: Path) -> None:
    """Images that were sampled by earlier versions are found again."""
    images = GeneratedImages(model, tmp_path, SETTINGS)
    assert images.manifest["prompt"] == "A {object} image in {style} style."
    described = hashlib.sha256(json.dumps(images.manifest, sort_keys=True).encode()).hexdigest()
    assert images.path.name.endswith(described[:8])
    assert set(images.manifest) == {
        "format", "model", "parameterization", "scale_factor", "sampler", "steps", "guidance_scale",
        "image_size_px", "precision", "prompt",
    }  # fmt: skip


def test_images_do_not_depend_on_batches_or_on_what_else_is_sampled(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    one, all_ = (
        GeneratedImages(model, tmp_path / "1", SETTINGS),
        GeneratedImages(model, tmp_path / "2", SETTINGS),
    )
    single, every = plan(one.path).forget[2:3], plan(all_.path)
    one.sample_missing(single, batch_size=1)
    all_.sample_missing(every.forget + every.retain, batch_size=8)
    first, second = (to_uint8(load_image(row.image, 16)).int() for row in (single[0], every.forget[2]))
    assert int((first - second).abs().max()) <= 1


def test_promise_22_images_are_the_same_to_rounding_when_memory_runs_out(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = (GeneratedImages(model, tmp_path / name, SETTINGS) for name in ("whole", "cut"))
    rows, cut_rows = plan(whole.path).forget, plan(cut.path).forget
    whole.sample_missing(rows, batch_size=4)
    monkeypatch.setattr(
        model.unet, "forward", hungry(model.unet.forward, holds=3)
    )  # of 8, with both branches
    with caplog.at_level(logging.WARNING):
        assert cut.sample_missing(cut_rows, batch_size=4) == len(cut_rows)
    sizes = [int(record.getMessage().partition(" with ")[2].partition(" ")[0]) for record in caplog.records]
    assert sizes == [4, 2]  # and then one at a time
    for row, cut_row in zip(rows, cut_rows, strict=True):
        images = [to_uint8(load_image(one.image, 16)).int() for one in (row, cut_row)]
        assert int((images[0] - images[1]).abs().max()) <= 1


def test_an_interrupted_run_goes_on_where_it_stopped(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = GeneratedImages(model, tmp_path, SETTINGS)
    rows = plan(images.path).forget
    whole, calls = model.decode, []

    def cut(latents: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(latents)

    monkeypatch.setattr(model, "decode", cut)
    with pytest.raises(KeyboardInterrupt):
        images.sample_missing(rows, batch_size=1)
    assert [row.image.exists() for row in rows] == [True, False, False, False]
    written = rows[0].image.stat().st_mtime_ns
    assert images.sample_missing(rows, batch_size=1) == 3
    assert calls == [1] * 5
    assert rows[0].image.stat().st_mtime_ns == written
    assert images.sample_missing(rows, batch_size=1) == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_concepts_share_images(model: LatentDiffusion, tmp_path: Path) -> None:
    images = GeneratedImages(model, tmp_path, SETTINGS)
    first = plan(images.path, images_per_prompt=1)
    assert images.sample_missing(first.forget + first.retain, batch_size=8) == 6
    second = plan(images.path, images_per_prompt=1, template="object", template_name="Cats")
    assert images.sample_missing(second.forget + second.retain, batch_size=8) == 0


def test_other_weights_and_settings_have_folders_of_their_own(
    model: LatentDiffusion, other_model: LatentDiffusion, tmp_path: Path
) -> None:
    paths = [
        GeneratedImages(model, tmp_path, SETTINGS).path,
        GeneratedImages(other_model, tmp_path, SETTINGS).path,
    ]
    for settings in [SampleSettings(5, 3.0, 16), SampleSettings(4, 3.5, 16), SampleSettings(4, 3.0, 32)]:
        paths.append(GeneratedImages(model, tmp_path, settings).path)
    assert len(set(paths)) == 5
    assert GeneratedImages(model, tmp_path, SampleSettings(4, 3, 16)).path == paths[0]  # 3 is 3.0


def test_bf16_images_are_nearly_those_of_fp32_and_lie_apart(model: LatentDiffusion, tmp_path: Path) -> None:
    exact = GeneratedImages(model, tmp_path, SETTINGS)
    rough = GeneratedImages(model, tmp_path, replace(SETTINGS, precision="bf16"))
    assert rough.path != exact.path
    assert rough.manifest["precision"] == "bf16"
    pictures = []
    for images in (exact, rough):
        rows = plan(images.path).forget
        images.sample_missing(rows, batch_size=4)
        pictures.append(torch.stack([to_uint8(load_image(row.image, 16)) for row in rows]).int())
    difference = (pictures[0] - pictures[1]).abs().float()
    assert 0 < difference.mean() < 3  # of 255 grey levels
    assert pictures[0].float().std() > 5


def test_an_unknown_precision_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="precision: 'bf16-mixed' is not one of: auto, fp32, bf16"):
        GeneratedImages(model, tmp_path, replace(SETTINGS, precision="bf16-mixed"))


def test_the_manifest_notes_the_settings_and_guards_the_folder(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    images = GeneratedImages(model, tmp_path, SETTINGS)
    rows = plan(images.path).forget
    images.sample_missing(rows[:1], batch_size=1)
    path = images.path / "manifest.json"
    noted = json.loads(path.read_text())
    assert (noted["steps"], noted["guidance_scale"], noted["image_size_px"]) == ("4", "3.0", "16")
    assert noted["model"].startswith("sha256:")
    assert images.path.name.startswith(noted["model"].removeprefix("sha256:")[:12])
    path.write_text(json.dumps(noted | {"steps": "50"}))
    with pytest.raises(DataError, match="describes other images"):
        images.sample_missing(rows, batch_size=1)


def test_an_image_with_nan_is_named_and_not_written(model: LatentDiffusion, tmp_path: Path) -> None:
    with torch.no_grad():
        model.first_stage_model.get_parameter("decoder.conv_in.weight").fill_(torch.nan)
    images = GeneratedImages(model, tmp_path, SETTINGS)
    rows = plan(images.path).forget
    with pytest.raises(DataError, match="NaN") as raised:
        images.sample_missing(rows, batch_size=2)
    assert str(rows[0].image) in str(raised.value)
    assert not list(tmp_path.rglob("*.png"))


def test_a_model_that_cannot_be_asked_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample_steps = 21: allowed are 1 to 20"):
        GeneratedImages(model, tmp_path, SampleSettings(21, 3.0, 16))
    with pytest.raises(DataError, match="eval"):
        GeneratedImages(model.train(), tmp_path, SETTINGS)
    model.cond_stage_model = None
    with pytest.raises(DataError, match="no text encoder"):
        GeneratedImages(model.eval(), tmp_path, SETTINGS)
