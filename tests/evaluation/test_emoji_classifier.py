"""Classifier files: written and read back, refused when wrong, and the two that are packaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mu
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.evaluation.emoji_classifier import (
    ARCHITECTURES,
    ClassifierError,
    EmojiClassifier,
    load_classifier,
    read_info,
    save_classifier,
)
from mu.ldm.tensor_file import FINGERPRINT_KEY, CheckpointError

ASSETS = Path(mu.__file__).parent / "assets/emoji_canvas"
PACKAGED = ("classifier.safetensors", "classifier_score.safetensors")


def tiny(architecture: str = "conv") -> EmojiClassifier:
    torch.manual_seed(0)
    return EmojiClassifier(architecture, ("Flat", "Round"), ("Cats", "Dogs", "Cars"), width=8, input_size=32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_classifier(tiny(), path, style_accuracy=0.99, object_accuracy=0.97, seed=5)
    return path


def edited(path: Path, **changes: object) -> Path:
    """The same file with other metadata (str), or other or removed (None) weights, without its fingerprint."""
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
    del metadata[FINGERPRINT_KEY]
    weights = load_file(path)
    for key, value in changes.items():
        table = metadata if key in metadata else weights
        if value is None:
            del table[key]
        else:
            table[key] = value
    save_file(weights, path, metadata)
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_saved_is_loaded_again(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture).eval()
    model.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})
    path = tmp_path / "classifier.safetensors"
    save_classifier(model, path, style_accuracy=0.99, object_accuracy=0.97, seed=5)
    loaded = load_classifier(path)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    for mine, theirs in zip(model.predict(images), loaded.predict(images), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert (loaded.architecture, loaded.styles, loaded.objects) == (architecture, model.styles, model.objects)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    info = read_info(path)
    assert (info.style_accuracy, info.object_accuracy, info.accuracy, info.seed) == (0.99, 0.97, 0.98, 5)
    with safe_open(path, framework="pt") as opened:
        assert opened.get_tensor("style_head.weight").dtype == torch.float16


def test_probabilities_of_each_head_sum_to_one() -> None:
    style_probs, object_probs = tiny().predict(torch.zeros(4, 3, 32, 32))
    assert (style_probs.shape, object_probs.shape) == ((4, 2), (4, 3))
    torch.testing.assert_close(style_probs.sum(1), torch.ones(4))
    torch.testing.assert_close(object_probs.sum(1), torch.ones(4))
    assert not style_probs.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_is_judged_alone_whatever_else_is_in_the_batch(architecture: str) -> None:
    model, images = tiny(architecture), torch.rand(5, 3, 32, 32) * 2 - 1
    together = model.predict(images)[1]
    alone = torch.cat([model.predict(image[None])[1] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_values_beyond_the_range_are_clamped() -> None:
    images = torch.rand(2, 3, 32, 32) * 4 - 2
    torch.testing.assert_close(tiny().predict(images), tiny().predict(images.clamp(-1, 1)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 64, 64), r"must be \(B, 3, 32, 32\), not \(1, 3, 64, 64\)"),
        (torch.zeros(3, 32, 32), r"not \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating point"),
        (torch.full((1, 3, 32, 32), float("nan")), "not finite"),
    ],
)
def test_images_that_cannot_be_judged_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        tiny().predict(images)


def test_an_unknown_structure_is_refused() -> None:
    with pytest.raises(ClassifierError, match="'resnet'; it must be one of conv, convnext"):
        EmojiClassifier("resnet", ("A",), ("B",))
    with pytest.raises(ClassifierError, match="different names"):
        EmojiClassifier("conv", ("A", "A"), ("B",))


def test_a_missing_file_and_a_damaged_one_are_named(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        load_classifier(file.with_name("absent.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(file)


def test_a_safetensors_file_of_something_else_is_no_classifier(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ClassifierError, match="no classifier"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style_head.bias": None}, "style_head.bias is missing"),
        ({"extra": torch.zeros(1)}, "extra is unexpected"),
        ({"object_head.bias": torch.zeros(7)}, r"object_head.bias is \(7,\), expected \(3,\)"),
        ({"object_head.bias": torch.full((3,), float("nan"))}, "object_head.bias is not finite"),
        ({"seed": None}, "lacks 'seed'"),
        ({"width": "wide"}, "malformed"),
        ({"architecture": "vit"}, "'vit'"),
    ],
)
def test_a_file_that_does_not_fit_its_header_is_refused(
    file: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ClassifierError, match=message):
        load_classifier(edited(file, **changes))


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_classifiers_load_and_are_accurate(name: str) -> None:
    path = ASSETS / name
    assert path.stat().st_size < 2.5e6  # 5 MB together
    info = read_info(path)
    assert info.styles == STYLES
    assert info.objects == OBJECTS
    assert info.input_size == 64
    assert min(info.style_accuracy, info.object_accuracy) >= 0.99
    style_probs, object_probs = load_classifier(path).predict(torch.ones(2, 3, 64, 64))
    assert (style_probs.shape, object_probs.shape) == ((2, 7), (2, 12))


def test_the_scoring_classifier_shares_neither_structure_nor_seed() -> None:
    tuning, scoring = (read_info(ASSETS / name) for name in PACKAGED)
    assert tuning.architecture != scoring.architecture
    assert tuning.seed != scoring.seed
