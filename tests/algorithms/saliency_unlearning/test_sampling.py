"""Images of a checkpoint: each belongs to its prompt and seed, and lies where the index says."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.commands import sampling
from mu.commands.sampling import SamplingError, plan_images
from mu.config import ConfigError, override
from mu.datasets.images import png, to_uint8
from mu.evaluation.config import SampleConfig
from mu.ldm import LatentDiffusion
from mu.ldm.sampler import sample_ddim
from mu.ldm.text_to_image import sample_images
from mu.ldm.unet import UNet
from tests.memory_limit import hungry

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
        *("config.yaml", "log.txt", "environment.json", "plan.json", "images.json", "images.csv", "grid.png"),
        "metrics.json",
        *(f"images/{name}" for name in names),
    }
    assert json.loads((run / "metrics.json").read_text()) == json.loads(json.dumps(result, default=str))
    assert result.pop("seconds") > 0
    assert result.pop("peak_memory_bytes")["process"] > 0
    assert result == {
        "run": run,
        "images": 4,
        "sampled": 4,
        "index": run / "images.csv",
        "grid": run / "grid.png",
    }
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
    from_file = override(
        config, prompts=(), prompts_path=str(tmp_path / "prompts.txt"), sample_steps=1, seeds=(3,), grid=False
    )
    first, second = sampling.run(from_file), sampling.run(from_file)
    assert first.keys() == {"run", "images", "sampled", "index", "seconds", "peak_memory_bytes"}
    assert not (first["run"] / "grid.png").exists()
    index = json.loads((first["run"] / "images.json").read_text())
    assert [entry["prompt"] for entry in index] == [DOGS, CATS]
    assert first["run"] != second["run"]  # never overwritten
    for entry in index:
        assert (first["run"] / entry["file"]).read_bytes() == (second["run"] / entry["file"]).read_bytes()


def test_a_prompt_of_a_text_file_ends_where_its_line_does(config: SampleConfig, tmp_path: Path) -> None:
    """And not at the other breaks that Unicode has, which come with prompts from the web."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\u2028line\r\n\r\na\x0b second\rthird".encode())
    planned = plan_images(
        override(config, prompts=(), prompts_path=str(tmp_path / "prompts.txt"), seeds=(3,))
    )
    assert [image.prompt for image in planned] == ["one line", "a second", "third"]
    (tmp_path / "prompts.txt").write_bytes("a cat\ncaf\u00e9".encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"prompts\.txt is not UTF-8 \(byte 0xe9 on line 2\); save it as UTF-8"
    ):
        plan_images(override(config, prompts=(), prompts_path=str(tmp_path / "prompts.txt")))


def test_an_image_with_nan_is_named_and_not_written(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = LatentDiffusion.decode, []

    def decode(model: LatentDiffusion, latents: torch.Tensor) -> torch.Tensor:
        images = whole(model, latents).clone()
        calls.append(len(latents))
        if sum(calls) == 4:  # the second batch
            images[0, 0, 2, 3] = torch.nan
        return images

    monkeypatch.setattr(LatentDiffusion, "decode", decode)
    with pytest.raises(SamplingError, match=f"{DOGS}' with seed 4 contains NaN"):
        sampling.run(config)
    kept = ["0000_3.png", "0000_4.png", "0001_3.png"]
    assert sorted(path.name for path in Path(config.output_dir).rglob("*.png")) == kept
    (index,) = Path(config.output_dir).rglob("images.csv")
    assert [row["file"] for row in csv.DictReader(index.open())] == [f"images/{name}" for name in kept]


# ---- tables of prompts, and runs that are gone on with


@pytest.fixture
def table(config: SampleConfig, tmp_path: Path) -> SampleConfig:
    """Three cases: with seed and guidance, with another guidance, and with neither."""
    (tmp_path / "cases.csv").write_text(
        "case_number,prompt,evaluation_seed,evaluation_guidance\n"
        f"17,{CATS},5,3.0\n2,{DOGS},6,1.5\nx-9,{CATS},,\n"
    )
    return override(config, prompts=(), prompts_path=str(tmp_path / "cases.csv"), run_name="cases")


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as opened:
        return torch.from_numpy(numpy.asarray(opened).astype(int))


def test_a_table_gives_each_case_its_seed_and_guidance(table: SampleConfig) -> None:
    result = sampling.run(table)
    images = Path(table.output_dir) / "cases" / "images"
    assert {path.name for path in images.iterdir()} == {"17_5.png", "2_6.png", "x-9_3.png", "x-9_4.png"}
    model = sampling.model_of(table)
    for name, prompt, seed, guidance in (
        *(("17_5", CATS, 5, 3.0), ("2_6", DOGS, 6, 1.5)),
        *(("x-9_3", CATS, 3, 3.0), ("x-9_4", CATS, 4, 3.0)),
    ):
        (expected,) = grey_levels(model, [(prompt, seed)], guidance_scale=guidance)
        assert (pixels(images / f"{name}.png") - expected).abs().max() <= 1, name
        if guidance == 1.5:
            (other,) = grey_levels(model, [(prompt, seed)], guidance_scale=3.0)
            assert (other - expected).abs().max() > 5
    with open(result["index"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "case_number": "2",
        "prompt": DOGS,
        "evaluation_seed": "6",
        "evaluation_guidance": "1.5",
        "file": "images/2_6.png",
    }
    with Image.open(result["grid"]) as grid:
        assert grid.height > 3 * 64
    # The index is itself such a table, of the same images.
    assert [image.file for image in plan_images(override(table, prompts_path=str(result["index"])))] == [
        row["file"] for row in rows
    ]


def test_the_keys_may_overrule_the_table(table: SampleConfig) -> None:
    planned = plan_images(override(table, use_row_settings=False, seeds=(8,), guidance_scale=2.0))
    assert [(image.file, image.guidance_scale) for image in planned] == [
        (f"images/{name}_8.png", 2.0) for name in ("17", "2", "x-9")
    ]


def test_promise_30_a_run_says_once_what_of_its_table_is_not_sampled_or_cut(config: SampleConfig) -> None:
    """Of the published I2P table's kind: 6 rows, one without a prompt, two guidances above 100, a long prompt."""
    path = Path(__file__).parents[2] / "datasets/cases/i2p_table.csv"
    changes = {"prompts": (), "prompts_path": str(path), "sample_steps": 1, "seeds": (3,), "grid": False}
    bare = sampling.run(override(config, **changes, use_row_settings=False))
    assert bare["images"] == 5
    log = (bare["run"] / "log.txt").read_text()
    assert log.count(f"rows of {path} without a prompt: 1 passed over, the first is line 4") == 1
    assert (
        log.count("1 of 5 prompts are longer than the 77 tokens that a text encoder reads, and are cut") == 1
    )
    assert log.count("the first is 'a street market at dusk, lanterns, rain on the stones") == 1
    assert "guidance" not in log
    own = sampling.run(override(config, **changes))
    assert {path.name for path in (own["run"] / "images").iterdir()} == {
        "0_4261553411.png",
        "1_12.png",
        "5_5.png",
    }
    log = (own["run"] / "log.txt").read_text()
    assert (
        log.count("that have a guidance outside 0 to 100: 2 passed over")
        == log.count("the first is line 5: 255; use_row_settings: false samples them")
        == 1
    )
    assert "77 tokens" not in log  # the long prompt is one of those two


def test_images_of_one_name_are_refused(table: SampleConfig) -> None:
    path = Path(str(table.prompts_path))
    path.write_text(path.read_text() + f"X-9,{DOGS},3,\n")
    with pytest.raises(ConfigError, match="case_number X-9 with seed 3 is there twice"):
        plan_images(table)


def test_a_run_that_was_cut_goes_on(table: SampleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept images are not touched, the others become what they would have been, to the bit."""
    table = override(table, batch_size=2)
    whole = sampling.run(override(table, run_name="whole"))["run"]
    drawn: list[torch.Tensor] = []

    def draw(image: torch.Tensor) -> bytes:
        drawn.append(image)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return png(image)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "png", draw)
        with pytest.raises(KeyboardInterrupt):
            sampling.run(table)
    run = Path(table.output_dir) / "cases"
    written = {path.name for path in (run / "images").iterdir()}
    assert len(written) == 2
    with open(run / "images.csv", newline="") as file:
        assert {Path(row["file"]).name for row in csv.DictReader(file)} == written
    times = {name: (run / "images" / name).stat().st_mtime_ns for name in written}

    result = sampling.run(table)
    assert (result["images"], result["sampled"]) == (4, 2)
    assert times == {name: (run / "images" / name).stat().st_mtime_ns for name in written}
    for path in (whole / "images").iterdir():
        assert path.read_bytes() == (run / "images" / path.name).read_bytes()
    assert (run / "images.csv").read_bytes() == (whole / "images.csv").read_bytes()
    assert sampling.run(table)["sampled"] == 0


def test_a_subset_adds_to_a_run_and_takes_nothing_away(table: SampleConfig) -> None:
    path = Path(str(table.prompts_path))
    header, *rows = path.read_text().splitlines()
    path.write_text(f"{header}\n{rows[1]}\n")
    small = override(table, grid=False)
    assert sampling.run(small)["sampled"] == 1
    path.write_text("\n".join([header, *rows]) + "\n")
    assert sampling.run(small)["sampled"] == 3
    path.write_text(f"{header}\n{rows[0]}\n")
    result = sampling.run(small)
    assert (result["images"], result["sampled"]) == (1, 0)
    assert len(json.loads((result["run"] / "images.json").read_text())) == 4


def test_a_folder_of_other_images_is_refused(table: SampleConfig, tiny_runs: Any) -> None:
    sampling.run(override(table, grid=False))
    for changes, expected in (
        ({"sample_steps": 1}, r"other settings \(sample_steps 2, now 1\)"),
        ({"ckpt_path": str(tiny_runs.checkpoint("other"))}, r"other settings \(model sha256:"),
        ({"precision": "bf16"}, "precision fp32, now bf16"),
        (
            {"guidance_scale": 2.0},
            "2 of these images with another prompt or guidance, such as images/x-9_3.png",
        ),
    ):
        with pytest.raises(ConfigError, match=expected):
            sampling.run(override(table, **changes))
    run = Path(table.output_dir) / "cases"
    (run / "plan.json").unlink()
    with pytest.raises(ConfigError, match=r"images but no plan\.json"):
        sampling.run(table)
    assert len(list((run / "images").iterdir())) == 4


def test_a_tall_grid_goes_on_in_another_picture(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_GRID_HEIGHT_PX", 70)
    result = sampling.run(override(config, seeds=(3,), sample_steps=1))
    assert sorted(path.name for path in result["run"].glob("grid*")) == ["grid.png", "grid_2.png"]


def test_half_precision_images_are_near(tiny_model: LatentDiffusion) -> None:
    exact, half = (grey_levels(tiny_model, precision=precision) for precision in ("fp32", "bf16"))
    other_seed = (exact[0] - exact[1]).float().abs().mean()
    assert 0 < (exact - half).float().abs().mean() < other_seed / 2


def test_promise_22_a_run_that_lacks_memory_halves_its_batches_once(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What did not fit in one batch is not tried again in the next."""
    forward = UNet.forward
    monkeypatch.setattr(
        UNet, "forward", lambda unet, first, *rest: hungry(partial(forward, unet), holds=2)(first, *rest)
    )
    with caplog.at_level(logging.WARNING, logger="mu.memory"):
        result = sampling.run(override(config, batch_size=2, grid=False))
    assert (result["images"], result["sampled"]) == (4, 4)
    assert [record.name for record in caplog.records] == ["mu.memory"]
