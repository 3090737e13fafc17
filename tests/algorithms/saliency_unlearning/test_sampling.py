"""Images of a checkpoint: each belongs to its prompt and seed, and lies where the index says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.algorithms.saliency_unlearning import sampling
from mu.algorithms.saliency_unlearning.configs import SampleConfig
from mu.algorithms.saliency_unlearning.sampling import SamplingError, sample_images
from mu.datasets.images import to_uint8
from mu.ldm import LatentDiffusion
from mu.ldm.sampler import sample_ddim

CATS, DOGS = "A Cats image in Noto style.", "A Dogs image in Blob style."
PAIRS = [(CATS, 3), (CATS, 4), (DOGS, 3)]


@pytest.fixture
def config(tiny_runs: Any, tmp_path: Path) -> SampleConfig:
    return SampleConfig(
        ckpt_path=str(tiny_runs.checkpoint()),
        model_config_path=str(tiny_runs.model_config),
        devices="cpu",
        prompts=(CATS, DOGS),
        seeds=(3, 4),
        sample_steps=2,
        guidance_scale=3.0,
        batch_size=3,
        output_dir=str(tmp_path / "samples"),
    )


def grey_levels(
    model: LatentDiffusion, pairs: Sequence[tuple[str, int]] = PAIRS, **options: Any
) -> torch.Tensor:
    """(N, H, W, 3) integers of 0..255."""
    images = sample_images(model, pairs, **{"steps": 2, "guidance_scale": 3.0, **options})
    return to_uint8(torch.stack(list(images))).int()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_belongs_to_its_image_whatever_the_batch(tiny_model: LatentDiffusion, eta: float) -> None:
    alone = grey_levels(tiny_model, eta=eta, batch_size=1)
    assert alone.float().std() > 5  # pictures, not plain colours
    assert (alone[0] - alone[1]).abs().max() > 5  # another seed
    assert (alone[0] - alone[2]).abs().max() > 5  # another prompt
    together = grey_levels(tiny_model, eta=eta, batch_size=8)
    assert (together - alone).abs().max() <= 1  # rounding
    turned = grey_levels(tiny_model, PAIRS[::-1], eta=eta, batch_size=2)
    assert (turned.flip(0) - alone).abs().max() <= 1


def test_eta_adds_noise(tiny_model: LatentDiffusion) -> None:
    plain, noisy = (grey_levels(tiny_model, PAIRS[:1], eta=eta) for eta in (0.0, 1.0))
    assert (plain - noisy).abs().max() > 5


def test_an_image_is_ddim_from_the_noise_of_its_seed(tiny_model: LatentDiffusion) -> None:
    latents = sample_ddim(
        tiny_model,
        tiny_model.embed([DOGS]),
        shape=(4, 12, 12),
        steps=3,
        guidance_scale=2.0,
        uncond_context=tiny_model.embed([""]),
        initial_noise=torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(3)),
    )
    with torch.no_grad():
        expected = to_uint8(tiny_model.decode(latents)).int()
    found = grey_levels(tiny_model, [(DOGS, 3)], steps=3, guidance_scale=2.0, image_size=24)
    assert found.shape == (1, 24, 24, 3)
    assert (found - expected).abs().max() <= 1


def test_a_run_writes_images_their_index_and_a_grid(config: SampleConfig) -> None:
    result = sampling.run(config)
    run = result["run"]
    names = ["0000_3.png", "0000_4.png", "0001_3.png", "0001_4.png"]
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == {
        *("config.yaml", "log.txt", "environment.json", "images.json", "grid.png"),
        *(f"images/{name}" for name in names),
    }
    assert result == {"run": run, "images": 4, "grid": run / "grid.png"}
    index = json.loads((run / "images.json").read_text())
    assert index == [
        {"file": f"images/{name}", "prompt": prompt, "seed": seed}
        for name, (prompt, seed) in zip(names, [(CATS, 3), (CATS, 4), (DOGS, 3), (DOGS, 4)], strict=True)
    ]
    model = sampling.model_of(config)
    for entry in index:
        with Image.open(run / entry["file"]) as opened:
            found = torch.from_numpy(numpy.asarray(opened).astype(int))
        expected = grey_levels(model, [(entry["prompt"], entry["seed"])])[0]
        assert (found - expected).abs().max() <= 1
    with Image.open(result["grid"]) as grid:
        assert grid.height > 2 * 64
        assert grid.width > 2 * 64


def test_prompts_may_come_from_a_file(config: SampleConfig, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"\n{DOGS}\n  {CATS}\n", encoding="utf-8")
    from_file = replace(
        config, prompts=(), prompts_path=str(tmp_path / "prompts.txt"), sample_steps=1, seeds=(3,), grid=False
    )
    first, second = sampling.run(from_file), sampling.run(from_file)
    assert first.keys() == {"run", "images"}
    assert not (first["run"] / "grid.png").exists()
    index = json.loads((first["run"] / "images.json").read_text())
    assert [entry["prompt"] for entry in index] == [DOGS, CATS]
    assert first["run"] != second["run"]  # never overwritten
    for entry in index:
        assert (first["run"] / entry["file"]).read_bytes() == (second["run"] / entry["file"]).read_bytes()


def test_an_image_with_nan_is_named_and_not_written(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LatentDiffusion.decode

    def decode(model: LatentDiffusion, latents: torch.Tensor) -> torch.Tensor:
        images = whole(model, latents).clone()
        images[1, 0, 2, 3] = torch.nan
        return images

    monkeypatch.setattr(LatentDiffusion, "decode", decode)
    with pytest.raises(SamplingError, match=r"A Cats image in Noto style\.' with seed 4 contains NaN"):
        sampling.run(config)
    assert [path.name for path in Path(config.output_dir).rglob("*.png")] == ["0000_3.png"]
