"""Every stage is killed at random moments, and comes to the same bits: images, latents, index, mask, training, samples.

Downloads are killed in tests/commands/test_download_kills.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.evaluation.emoji_classifier import EmojiClassifier, save_classifier
from mu.ldm.tensor_file import fingerprint, read_state_dict
from mu.unlearning.run_state import read_run_state
from tests.forked_commands import SCRIPTS, Commands, flags
from tests.kills import RUN, Found, assert_kills_change_nothing, contents

MANY = pytest.param(20, marks=pytest.mark.slow)
QUICK_TOO = pytest.mark.parametrize("kills", [1, MANY])
MASK, TRAIN = f"{SCRIPTS}.generate_mask", f"{SCRIPTS}.train"


@pytest.fixture
def survives(commands: Commands, tmp_path: Path) -> Callable[..., None]:
    """survives(script, argv, found, kills=..., seed=...): `argv` writes into `tmp_path / "out"`."""
    return partial(assert_kills_change_nothing, commands, folder=tmp_path / "out")


def tensors(folder: Path, pattern: str) -> dict[str, str]:
    """The fingerprints of what is in safetensors files: their metadata has a date, or no order."""
    found: dict[str, str] = {}
    for path in folder.rglob(pattern):
        name = RUN.sub("", path.relative_to(folder).as_posix())
        content = fingerprint(read_state_dict(path)[0])
        assert found.setdefault(name, content) == content, name
    return found


def masks(folder: Path) -> Found:
    """Sampled images, latents, index and masks."""
    latents = tensors(folder, "processed/latents/**/*.safetensors")
    return {**contents(folder, "*.png", "manifest.json", "index/**/*.txt", "mask_*.safetensors"), **latents}


def mask_argv(tiny_runs: Any, folder: Path, **changes: Any) -> list[str]:
    places = {"processed_dataset_dir": str(folder / "processed"), "output_dir": str(folder / "masks")}
    return flags(tiny_runs.keys(**places, **changes))


@pytest.mark.parametrize("kills", [MANY])
def test_sampled_images_and_their_mask(tiny_runs: Any, tmp_path: Path, survives: Any, kills: int) -> None:
    argv = mask_argv(tiny_runs, tmp_path / "out", images_per_prompt=9, batch_size=4)
    survives(MASK, lambda: argv, found=masks, kills=kills, seed=0)


@QUICK_TOO
def test_latents_index_and_mask_of_a_folder_of_images(
    tiny_runs: Any, tmp_path: Path, survives: Any, kills: int
) -> None:
    generator = numpy.random.default_rng(0)
    for style, count in (("Abstractionism", 1), ("Van_Gogh", 8)):
        for name in ("Cats", "Dogs", "Birds", "Trees"):
            (tmp_path / "canvas" / style / name).mkdir(parents=True)
            for number in range(1, count + 1):
                noise = generator.integers(0, 256, (24, 24, 3), dtype=numpy.uint8)
                Image.fromarray(noise).save(tmp_path / "canvas" / style / name / f"{number}.png")
    data = {
        "dataset_type": "unlearncanvas",
        "raw_dataset_dir": str(tmp_path / "canvas"),
        "template_name": "Van_Gogh",
        "styles": None,
        "objects": None,
        "image_size": 16,
    }
    argv = mask_argv(tiny_runs, tmp_path / "out", **data, batch_size=16)
    survives(MASK, lambda: argv, found=masks, kills=kills, seed=1)


@pytest.mark.parametrize("kills", [MANY])
def test_promise_15_a_training_run_killed_at_random_comes_to_the_same_bits(
    tiny_runs: Any, tmp_path: Path, survives: Any, kills: int
) -> None:
    """With all that has a state: optimizer, schedule, originals. Each checkpoint that a kill leaves can be read."""
    runs = tmp_path / "out"
    recipe = {"masking": "random", "target": "frozen", "lr_schedule": "linear", "lr": 1e-3}
    length = {"epochs": 2, "batch_size": 2, "checkpoint_every_steps": 1, "sample_prompts": ()}
    keys = {**recipe, **length, "output_dir": str(runs)}

    def argv() -> list[str]:
        left = any(runs.glob("*/checkpoints/step-*"))
        return flags(tiny_runs.keys(**keys, resume="newest" if left else None))

    def found(folder: Path) -> Found:
        for path in folder.glob("*/checkpoints/step-*"):
            read_run_state(path)
        ended = [path.parent for path in folder.glob("*/metrics.json")]
        return {
            **tensors(folder, "model.safetensors"),
            **contents(folder, "model.patch.safetensors"),
            **{f"{RUN.sub('', run.name)}/metrics.csv": (run / "metrics.csv").read_bytes() for run in ended},
        }

    survives(TRAIN, argv, found=found, kills=kills, seed=2)


@QUICK_TOO
def test_samples(tiny_runs: Any, tmp_path: Path, survives: Any, kills: int) -> None:
    keys = {
        "ckpt_path": str(tiny_runs.checkpoint()),
        "model_config_path": str(tiny_runs.model_config),
        "devices": "cpu",
        "prompts": ("A Cats image in Noto style.", "A Dogs image in Blob style."),
        "seeds": tuple(range(8)),
        "sample_steps": 2,
        "batch_size": 4,
        "output_dir": str(tmp_path / "out"),
        "run_name": "run",
    }

    def found(folder: Path) -> Found:
        files = contents(folder, "images/*.png", "grid.png", "images.csv", "plan.json")
        if len(files) < 2 * 8 + 3:
            files.pop("run/images.csv", None)  # of the images that are there
        return files

    survives(f"{SCRIPTS}.sample", lambda: flags(keys), found=found, kills=kills, seed=3)


@pytest.mark.parametrize("kills", [MANY])
def test_an_evaluation(tiny_runs: Any, tmp_path: Path, survives: Any, kills: int) -> None:
    torch.manual_seed(3)
    classifier = EmojiClassifier("conv", ("Noto", "Blob"), ("Cats", "Dogs"), width=8, input_size=16).eval()
    path = tmp_path / "classifier.safetensors"
    save_classifier(classifier, path, style_accuracy=1.0, object_accuracy=1.0, seed=3)
    keys = {
        "ckpt_path": str(tiny_runs.checkpoint()),
        "model_config_path": str(tiny_runs.model_config),
        "devices": "cpu",
        "template": "style",
        "template_name": "Noto",
        "styles": ("Noto", "Blob"),
        "objects": ("Cats", "Dogs"),
        "seeds": (1, 2, 3),
        "sample_steps": 2,
        "batch_size": 4,
        "classifier_path": str(path),
        "output_dir": str(tmp_path / "out"),
    }

    def found(folder: Path) -> Found:
        return contents(folder, "*.png", "*.csv", "manifest.json")

    survives(f"{SCRIPTS}.evaluate", lambda: flags(keys), found=found, kills=kills, seed=4)
