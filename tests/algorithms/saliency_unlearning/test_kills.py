"""Commands killed at random moments, and begun again: index, sampled images, latents, mask, samples, evaluation."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.evaluation.classifier import EmojiClassifier, save_classifier
from tests.forked_commands import SCRIPTS, Commands, flags

MASK = f"{SCRIPTS}.generate_mask"
ROUNDS = 4


def mask_argv(tiny_runs: Any, folder: Path) -> list[str]:
    """Everything anew below a folder: images are sampled, encoded and listed, and the mask made of them."""
    places = {"processed_dataset_dir": str(folder / "processed"), "output_dir": str(folder / "masks")}
    return flags(tiny_runs.keys(**places, batch_size=2, draws_per_image=8))


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(pattern)}
    assert found
    return {name: content for name, content in found.items() if not name.endswith(".tmp")}


def made(folder: Path) -> tuple[dict[str, bytes], set[bytes]]:
    """Images, latents and lists by name; and the masks."""
    index = files(folder / "processed", "*.txt")
    return index | files(folder / "processed", "*.png"), set(files(folder, "mask_*.safetensors").values())


def pixels(folder: Path) -> dict[str, numpy.ndarray]:
    found = {}
    for path in folder.rglob("*.png"):
        with Image.open(path) as opened:
            found[path.name if folder.name == "images" else str(path.relative_to(folder))] = numpy.asarray(
                opened
            ).astype(int)
    assert found
    return found


def assert_same_pixels(one: Path, other: Path) -> None:
    """To rounding: a batch that is cut elsewhere rounds otherwise."""
    a, b = pixels(one), pixels(other)
    assert a.keys() == b.keys()
    assert max(abs(a[name] - b[name]).max() for name in a) <= 1


def test_a_mask_run_killed_between_its_stages_makes_the_same_mask(
    tiny_runs: Any, commands: Commands, tmp_path: Path
) -> None:
    assert commands.run(MASK, tmp_path / "log", *mask_argv(tiny_runs, tmp_path / "whole")) == 0
    folder = tmp_path / "killed"
    for stage, code in [("*.png", -signal.SIGKILL), ("latents/*/*/*/*.safetensors", 143)]:
        command = commands.start(MASK, tmp_path / "log", *mask_argv(tiny_runs, folder))
        signum = -code if code < 0 else code - 128

        def begun(stage: str = stage) -> bool:
            return any((folder / "processed").rglob(stage))

        assert command.kill_when(signum, begun) == code
        assert not list(folder.rglob("mask_*.safetensors"))
    assert commands.run(MASK, tmp_path / "log", *mask_argv(tiny_runs, folder)) == 0
    assert_same_pixels(tmp_path / "whole", folder)
    assert made(tmp_path / "whole")[0].keys() == made(folder)[0].keys()
    assert made(tmp_path / "whole")[1] == made(folder)[1]


@pytest.mark.slow
def test_mask_runs_killed_at_random_make_the_same_mask(
    tiny_runs: Any, commands: Commands, tmp_path: Path
) -> None:
    assert commands.run(MASK, tmp_path / "log", *mask_argv(tiny_runs, tmp_path / "whole")) == 0
    rng = random.Random(0)
    kills = 0
    for number in range(ROUNDS):
        folder = tmp_path / f"killed-{number}"
        argv = mask_argv(tiny_runs, folder)
        kills += commands.run_despite_kills(MASK, tmp_path / "log", *argv, rng=rng)
        assert_same_pixels(tmp_path / "whole", folder)
        assert made(tmp_path / "whole")[1] == made(folder)[1]
    assert kills >= ROUNDS


@pytest.mark.slow
def test_samples_killed_at_random_are_the_same_images(
    tiny_runs: Any, commands: Commands, tmp_path: Path
) -> None:
    def argv(name: str) -> list[str]:
        keys = {
            "ckpt_path": str(tiny_runs.checkpoint()),
            "model_config_path": str(tiny_runs.model_config),
            "devices": "cpu",
            "prompts": ("A Cats image in Noto style.", "A Dogs image in Blob style."),
            "seeds": (3, 4, 5),
            "sample_steps": 2,
            "batch_size": 1,
            "output_dir": str(tmp_path),
            "run_name": name,
        }
        return flags(keys)

    script = f"{SCRIPTS}.sample"
    assert commands.run(script, tmp_path / "log", *argv("whole")) == 0
    rng = random.Random(1)
    kills = 0
    for number in range(ROUNDS):
        name = f"killed-{number}"
        kills += commands.run_despite_kills(script, tmp_path / "log", *argv(name), rng=rng)
        assert_same_pixels(tmp_path / "whole" / "images", tmp_path / name / "images")
        assert (tmp_path / name / "images.csv").read_bytes() == (
            tmp_path / "whole" / "images.csv"
        ).read_bytes()
    assert kills >= ROUNDS


@pytest.mark.slow
def test_evaluations_killed_at_random_come_to_the_same_numbers(
    tiny_runs: Any, commands: Commands, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    classifier = EmojiClassifier("conv", ("Noto", "Blob"), ("Cats", "Dogs"), width=8, input_size=16).eval()
    save_classifier(
        classifier, tmp_path / "classifier.safetensors", style_accuracy=1.0, object_accuracy=1.0, seed=3
    )

    def argv(name: str) -> list[str]:
        keys = {
            "ckpt_path": str(tiny_runs.checkpoint()),
            "model_config_path": str(tiny_runs.model_config),
            "devices": "cpu",
            "template": "style",
            "template_name": "Noto",
            "styles": ("Noto", "Blob"),
            "objects": ("Cats", "Dogs"),
            "seeds": (188, 288),
            "sample_steps": 2,
            "batch_size": 1,
            "classifier_path": str(tmp_path / "classifier.safetensors"),
            "output_dir": str(tmp_path / name),
        }
        return flags(keys)

    def metrics(name: str) -> set[bytes]:
        """Of finished evaluations."""
        ended = [path.parent for path in (tmp_path / name).rglob("metrics.json")]
        return {(run / "metrics.csv").read_bytes() for run in ended}

    script = f"{SCRIPTS}.evaluate"
    assert commands.run(script, tmp_path / "log", *argv("whole")) == 0
    rng = random.Random(2)
    kills = 0
    for number in range(ROUNDS):
        name = f"killed-{number}"
        kills += commands.run_despite_kills(script, tmp_path / "log", *argv(name), rng=rng)
        assert metrics(name) == metrics("whole")
    assert kills >= ROUNDS
