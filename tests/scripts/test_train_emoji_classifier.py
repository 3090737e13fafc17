"""Training a classifier for a few steps on drawings made here, and what it does to images before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.evaluation.emoji_classifier import read_info


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train_emoji_classifier")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain images whose red says the style and whose green says the object."""
    root = tmp_path_factory.mktemp("drawings")
    for s, style in enumerate(STYLES):
        for o, object_name in enumerate(OBJECTS):
            (root / style / object_name).mkdir(parents=True)
            for n in range(1, 5):
                Image.new("RGB", (16, 16), (30 * s, 20 * o, n)).save(root / style / object_name / f"{n}.png")
    return root


def test_drawings_come_with_their_own_labels(script: ModuleType, drawings: Path) -> None:
    images, styles, objects = script.load_drawings(drawings)
    assert images.shape == (336, 3, 16, 16)
    red, green = ((images[:, channel, 0, 0] + 1) * 127.5 for channel in (0, 1))
    torch.testing.assert_close(red / 30, styles.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(green / 20, objects.float(), atol=1e-3, rtol=0)


def test_a_missing_drawing_is_named(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Noto/Cats/1\.png is missing; scripts/build_emoji_canvas"):
        script.load_drawings(tmp_path)


def test_degraded_images_stay_close_and_a_quarter_stays_untouched(script: ModuleType) -> None:
    coarse = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(-1, 1)
    degraded = script.degrade(images, torch.Generator().manual_seed(1))
    assert torch.equal(degraded, script.degrade(images, torch.Generator().manual_seed(1)))
    assert degraded.abs().max() <= 1
    error = (degraded - images).square().mean(dim=(1, 2, 3)).sqrt()
    assert 0.15 < (error == 0).float().mean() < 0.35
    assert 0.03 < error[error > 0].mean() < 0.3
    assert error.max() < 0.5


def test_compression_keeps_means_and_forgets_fine_detail(script: ModuleType) -> None:
    flat = torch.full((1, 3, 16, 16), 0.5)
    fine = flat + 0.01 * (-1.0) ** torch.arange(16)
    step = torch.full((1, 1, 1, 1, 1, 1), 0.05)
    torch.testing.assert_close(script._compress(fine, step), flat, atol=0.01, rtol=0)
    assert script._compress(fine, step).std() < 1e-4 < fine.std()
    matrix = script._dct_matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-6, rtol=0)


def test_a_classifier_is_written_only_if_good_enough_and_the_same_for_the_same_seed(
    script: ModuleType, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "classifier.safetensors"
    arguments = ["--dataset_dir", str(drawings), "--output", str(output), "--architecture", "conv"]
    arguments += ["--threads", str(torch.get_num_threads())]  # as it is, for the tests that follow
    arguments += ["--seed", "3", "--width", "8", "--steps", "3", "--batch_size", "8", "--rounds", "1"]
    assert script.main(arguments) == 1
    assert not output.exists()
    assert "below --min_accuracy 0.99" in capsys.readouterr().err
    assert script.main([*arguments, "--min_accuracy", "0"]) == 0
    first = load_file(output)
    assert (read_info(output).seed, read_info(output).architecture) == (3, "conv")
    assert script.main([*arguments, "--min_accuracy", "0"]) == 0
    assert all(torch.equal(weight, first[name]) for name, weight in load_file(output).items())


def test_training_learns(script: ModuleType) -> None:
    """Four plain colours, two styles x two objects: right after a few steps."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[-1.0, -1, 0], [-1, 1, 0], [1, -1, 0], [1, 1, 0]])
    images = colours[:, :, None, None].expand(4, 3, 64, 64).contiguous()
    data = (images, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    model = script.EmojiClassifier("conv", ("A", "B"), ("C", "D"), width=8)
    script.train(model, data, steps=25, batch_size=16, lr=5e-3, generator=generator)
    style, object_, style_right, _ = script.accuracy(model, data, generator, rounds=4, degraded=False)
    assert (style, object_) == (1.0, 1.0)
    assert np.array_equal(style_right.numpy(), np.ones(4))
