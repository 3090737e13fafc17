from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mu.datasets.images import load_image
from mu.datasets.index import DataError, Row
from mu.datasets.latents import LatentCache
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.memory import OutOfMemoryError
from tests.datasets.drawing import data_set
from tests.memory_limit import hungry

Draw = Callable[..., Path]
SIZE = 16


@pytest.fixture
def rows(draw_canvas: Draw) -> tuple[Row, ...]:
    root = draw_canvas(["Blob", "Noto"], ["Cats", "Dogs"], 3)
    found = data_set("unlearncanvas", root, template_name="Noto").read()
    return (*found.forget, *found.retain)


def encoded_images(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the batch size of each call of the encoder."""
    calls: list[int] = []
    encode = model.encode

    def counted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(model, "encode", counted)
    return calls


def test_moments_are_those_of_the_model_in_the_order_of_the_rows(
    model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path
) -> None:
    mixed = rows[::5] + rows[1::5] + rows[2:5]
    mean, logvar = LatentCache(model, tmp_path / "latents", image_size=SIZE).moments(mixed)
    assert mean.shape == logvar.shape == (len(mixed), 4, 8, 8)
    with torch.no_grad():
        for place, row in enumerate(mixed):
            expected_mean, expected_logvar = model.encode(load_image(row.image, SIZE)[None])
            assert torch.equal(mean[place], expected_mean[0])
            assert torch.equal(logvar[place], expected_logvar[0])
    assert not torch.equal(mean[0], mean[1])


def test_an_image_is_encoded_once_and_kept_to_the_bit(
    model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = encoded_images(model, monkeypatch)
    first = LatentCache(model, tmp_path / "latents", image_size=SIZE).moments(rows[:7])
    assert calls == [1] * 7
    again = LatentCache(model, tmp_path / "latents", image_size=SIZE).moments(rows)
    assert calls == [1] * 12
    assert torch.equal(first[0], again[0][:7])
    assert torch.equal(first[1], again[1][:7])
    assert again[0].dtype == torch.float32


def test_a_changed_image_is_encoded_again_and_said(
    model: LatentDiffusion,
    rows: tuple[Row, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = LatentCache(model, tmp_path / "latents", image_size=SIZE)
    before, _ = cache.moments(rows)
    stat = rows[4].image.stat()
    Image.new("RGB", (20, 24), (1, 2, 3)).save(rows[4].image)
    os.utime(rows[4].image, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # its time does not give it away
    calls = encoded_images(model, monkeypatch)
    with caplog.at_level(logging.INFO):
        after, _ = cache.moments(rows)
    assert calls == [1]
    assert str(rows[4].image) in caplog.text
    same = [torch.equal(before[place], after[place]) for place in range(len(rows))]
    assert same == [place != 4 for place in range(len(rows))]
    cache.moments(rows)
    assert calls == [1]


def test_another_encoder_or_size_has_latents_of_its_own(
    model: LatentDiffusion, other_model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path
) -> None:
    mean, _ = LatentCache(model, tmp_path, image_size=SIZE).moments(rows[:2])
    other, _ = LatentCache(other_model, tmp_path, image_size=SIZE).moments(rows[:2])
    assert not torch.equal(mean, other)
    small, _ = LatentCache(model, tmp_path, image_size=8).moments(rows[:2])
    assert small.shape == (2, 4, 4, 4)
    again, _ = LatentCache(model, tmp_path, image_size=SIZE).moments(rows[:2])
    assert torch.equal(mean, again)


def test_a_change_of_the_unet_keeps_the_latents(
    model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LatentCache(model, tmp_path, image_size=SIZE).moments(rows[:2])
    with torch.no_grad():
        next(model.unet.parameters()).add_(1)
    calls = encoded_images(model, monkeypatch)
    LatentCache(model, tmp_path, image_size=SIZE).moments(rows[:2])
    assert calls == []


@pytest.mark.parametrize("damage", ["truncated", "other weights"])
def test_a_file_that_is_damaged_or_foreign_is_made_again(
    model: LatentDiffusion,
    other_model: LatentDiffusion,
    rows: tuple[Row, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    cache = LatentCache(model, tmp_path / "a", image_size=SIZE)
    before, _ = cache.moments(rows[:3])
    (path,) = (tmp_path / "a").rglob("*.safetensors")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        LatentCache(other_model, tmp_path / "b", image_size=SIZE).moments(rows[:3])
        (foreign,) = (tmp_path / "b").rglob("*.safetensors")
        path.write_bytes(foreign.read_bytes())
    with caplog.at_level(logging.WARNING):
        after, _ = cache.moments(rows[:3])
    assert str(path) in caplog.text
    assert torch.equal(before, after)


def test_all_bad_images_are_named_in_one_error(
    model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path
) -> None:
    rows[0].image.unlink()
    rows[3].image.write_bytes(rows[3].image.read_bytes()[:300])
    Image.new("RGB", (1, 1)).save(rows[11].image)
    with pytest.raises(DataError, match="3 images cannot be used") as raised:
        LatentCache(model, tmp_path, image_size=SIZE).moments(rows)
    for place, what in [(0, "missing"), (3, "unreadable"), (11, "too small")]:
        assert f"{rows[place].image}: " in str(raised.value)
        assert what in str(raised.value)


def test_a_latent_with_nan_names_its_image_and_is_not_kept(
    model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path
) -> None:
    cache = LatentCache(model, tmp_path / "latents", image_size=SIZE)
    with torch.no_grad():
        model.first_stage_model.get_parameter("encoder.conv_in.weight").fill_(torch.nan)
    with pytest.raises(DataError, match="NaN") as raised:
        cache.moments(rows[:2])
    assert str(rows[0].image) in str(raised.value)
    assert not list(tmp_path.glob("latents/**/*.safetensors"))


def test_a_prompt_is_embedded_once_and_kept(model: LatentDiffusion, tmp_path: Path) -> None:
    cache = LatentCache(model, tmp_path, image_size=SIZE)
    prompts = ["", "A Cats image", "A Cats image", "A Dogs image"]
    first = cache.contexts(prompts)
    text = model.cond_stage_model
    assert text is not None
    assert text.calls == ["", "A Cats image", "A Dogs image"]
    assert list(first) == ["", "A Cats image", "A Dogs image"]
    again = LatentCache(model, tmp_path, image_size=SIZE).contexts(["A Dogs image", "new", ""])
    assert text.calls == ["", "A Cats image", "A Dogs image", "new"]
    assert torch.equal(first["A Dogs image"], again["A Dogs image"])
    assert again["new"].shape == (7, 8)
    assert torch.equal(again["new"], model.embed(["new"])[0])
    with torch.no_grad():
        next(text.parameters()).mul_(2)
    doubled = LatentCache(model, tmp_path, image_size=SIZE).contexts(["new"])
    assert torch.equal(doubled["new"], 2 * again["new"])


def test_a_model_without_text_encoder_says_so(
    model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path
) -> None:
    model.cond_stage_model = None
    cache = LatentCache(model, tmp_path, image_size=SIZE)
    assert len(cache.moments(rows[:1])[0]) == 1
    with pytest.raises(DataError, match="no text encoder"):
        cache.contexts([""])


def test_a_model_in_training_mode_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eval"):
        LatentCache(model.train(), tmp_path, image_size=SIZE)


def test_promise_22_out_of_memory_while_encoding_names_what_saves_it(
    model: LatentDiffusion, rows: tuple[Row, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LatentCache(model, tmp_path / "latents", image_size=SIZE)
    monkeypatch.setattr(model, "encode", hungry(model.encode, holds=0))
    with pytest.raises(OutOfMemoryError, match=r"while encoding an image \(.*allocate.*a smaller image_size"):
        cache.moments(rows)
    monkeypatch.setattr(model, "embed", hungry(model.embed, holds=0))
    with pytest.raises(OutOfMemoryError, match=r"while embedding a prompt \(.*allocate.*devices cpu"):
        cache.contexts(["a cat"])
