"""The technique that eval_unlearn finds by its entry point, loaded as the library loads it, on a tiny model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.config import ConfigError, dump
from mu.datasets.images import to_picture
from mu.evaluation.eval_unlearn import SaliencyUnlearningTechnique, _device_number
from mu.ldm.text_to_image import sample_images
from tests.memory_limit import hungry

ROOT = Path(__file__).parents[2]
CATS, DOGS = "A Cats image in Noto style.", "A Dogs image in Blob style."
OPTIONS: dict[str, Any] = {"devices": "cpu", "sample_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def run_folder(tiny_runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's folder, as far as the technique looks at it."""
    folder = tmp_path_factory.mktemp("runs") / "style-Noto-20260101-000000"
    folder.mkdir()
    shutil.copy(tiny_runs.checkpoint(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(dump(tiny_runs.train_config(masking="none")))
    return folder


@pytest.fixture(scope="module")
def technique(run_folder: Path) -> SaliencyUnlearningTechnique:
    return SaliencyUnlearningTechnique(run_folder, **OPTIONS)


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(abs(numpy.asarray(one).astype(int) - numpy.asarray(other).astype(int)).max())


def test_the_distribution_offers_the_class(tmp_path: Path) -> None:
    """From metadata built of this pyproject.toml, as an installation has it."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "mu/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "site").mkdir()
    (tmp_path / "configs").mkdir()
    build = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('site')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (info,) = (tmp_path / "site").glob("*.dist-info")
    (point,) = metadata.Distribution.at(info).entry_points.select(group="eval_unlearn.techniques")
    assert point.name == "saliency_unlearning"
    assert point.load() is SaliencyUnlearningTechnique


def test_images_are_those_of_the_checkpoint(technique: SaliencyUnlearningTechnique) -> None:
    pictures = technique.generate([CATS, DOGS], seed=5)
    assert all(isinstance(picture, Image.Image) and picture.size == (16, 16) for picture in pictures)
    for picture, prompt in zip(pictures, (CATS, DOGS), strict=True):
        (expected,) = sample_images(technique.model, [(prompt, 5)], steps=2, guidance_scale=3.0)
        assert difference(picture, to_picture(expected)) <= 1
    assert difference(*pictures) > 5


def test_a_seed_belongs_to_its_image(technique: SaliencyUnlearningTechnique) -> None:
    pictures = technique.generate([CATS, DOGS, CATS], seed=5)
    assert technique.seeds == (5, 5, 6)  # the second cat is another one
    assert difference(pictures[0], pictures[2]) > 5
    (alone,) = technique.generate(CATS, 6)
    assert difference(alone, pictures[2]) <= 1
    swapped = technique.generate([CATS, CATS], seed=[6, 5], batch_size=1)
    assert difference(swapped[1], pictures[0]) <= 1
    technique.generate([CATS, CATS])
    drawn = technique.seeds
    assert drawn[0] != drawn[1]
    technique.generate([CATS, CATS])
    assert technique.seeds != drawn


def test_promise_30_prompts_that_are_cut_are_told_once(
    technique: SaliencyUnlearningTechnique, caplog: pytest.LogCaptureFixture
) -> None:
    technique.generate(CATS, seed=1)
    assert caplog.messages == []
    for _ in range(2):
        technique.generate([CATS, " ".join(["street"] * 76)], seed=1)
    (message,) = caplog.messages
    assert message.startswith("1 of 2 prompts are longer than the 77 tokens that a text encoder reads")


def test_options_hold_for_one_call(technique: SaliencyUnlearningTechnique) -> None:
    (plain,) = technique.generate([CATS], seed=1)
    (other,) = technique.generate([CATS], seed=1, num_inference_steps=1, guidance_scale=1.0)
    assert difference(plain, other) > 5
    assert difference(plain, technique.generate([CATS], seed=1)[0]) == 0
    assert technique.generate([CATS], seed=1, image_size=24)[0].size == (24, 24)
    assert technique.generate([], seed=1) == []


def test_mistakes_are_told(technique: SaliencyUnlearningTechnique, run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"no option 'guidance'.*Did you mean 'guidance_scale'"):
        technique.generate([CATS], guidance=3)
    with pytest.raises(TypeError, match="one option"):
        technique.generate([CATS], sample_steps=2, num_inference_steps=2)
    with pytest.raises(ConfigError, match="sample_steps: must be >= 1"):
        technique.generate([CATS], sample_steps=0)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        technique.generate([CATS], seed=[1, 2])
    with pytest.raises(ValueError, match="the seed -1 is not"):
        technique.generate([CATS], seed=-1)
    with pytest.raises(ConfigError, match="ckpt_path: there is no file"):
        SaliencyUnlearningTechnique(tmp_path / "absent.ckpt", **OPTIONS)
    with pytest.raises(ConfigError, match=r"model_config_path: there is no file absent\.yaml"):
        SaliencyUnlearningTechnique(run_folder, "absent.yaml", **OPTIONS)
    with pytest.raises(ConfigError, match="devices: cpu,cpu are several"):
        SaliencyUnlearningTechnique(run_folder, **{**OPTIONS, "devices": "cpu,cpu"})


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_what_the_benchmark_library_hands_over_is_taken(run_folder: Path, device: Any) -> None:
    options = {"sample_steps": 2, "device": device, "erase_concept": "Nudity"}
    technique = SaliencyUnlearningTechnique(ckpt_path=str(run_folder), **options)
    assert (technique.config.devices, technique.erase_concept) == ("cpu", "Nudity")
    assert technique.generate(prompts=[CATS], seed=None)[0].size == (16, 16)
    with pytest.raises(TypeError, match="devices and device are one option"):
        SaliencyUnlearningTechnique(run_folder, devices="cpu", device="cpu")


@pytest.mark.parametrize(
    ("device", "number"),
    [(None, "0"), ("cuda", "0"), ("cuda:1", "1"), (torch.device("cuda", 2), "2"), (3, "3"), ("cpu", "cpu")],
)
def test_a_device_is_named_as_torch_names_it(device: Any, number: str) -> None:
    assert _device_number(device) == number


def test_the_concept_is_the_runs_own_where_nobody_names_it(
    technique: SaliencyUnlearningTechnique, run_folder: Path, tiny_runs: Any, tmp_path: Path
) -> None:
    assert technique.erase_concept == "Noto"
    alone = SaliencyUnlearningTechnique(
        run_folder / "model.safetensors", tiny_runs.model_config, erase_concept="Noto", **OPTIONS
    )
    assert alone.erase_concept == "Noto"
    shutil.copy(run_folder / "model.safetensors", tmp_path)
    bare = SaliencyUnlearningTechnique(tmp_path / "model.safetensors", tiny_runs.model_config, **OPTIONS)
    assert bare.erase_concept is None
    (tmp_path / "config.yaml").write_text(
        f"model_config_path: {tiny_runs.model_config}\ntemplate_name: null\n"
    )
    assert SaliencyUnlearningTechnique(tmp_path, **OPTIONS).erase_concept is None
    (tmp_path / "config.yaml").write_text(
        dump(
            tiny_runs.train_config(
                template_name=("Noto", "Blob"), styles=("Noto", "Blob", "Fluent"), masking="none"
            )
        )
    )
    assert SaliencyUnlearningTechnique(tmp_path, **OPTIONS).erase_concept == "Noto+Blob"


def test_promise_22_the_technique_halves_its_batch_when_memory_runs_out(
    technique: SaliencyUnlearningTechnique, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = technique.generate([CATS, DOGS], seed=5)
    unet = technique.model.unet
    monkeypatch.setattr(unet, "forward", hungry(unet.forward, holds=2))  # one image with both branches
    found = technique.generate([CATS, DOGS], seed=5)
    assert max(difference(*pair) for pair in zip(found, expected, strict=True)) <= 1
