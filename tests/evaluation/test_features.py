"""Features of images as they were saved: 8-bit values, in the order of the files."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from mu.evaluation.emoji_classifier import ClassifierError, EmojiClassifier
from mu.evaluation.features import ClassifierFeatures, InceptionFeatures, image_features, load_own
from mu.ldm.tensor_file import CheckpointError
from tests.memory_limit import hungry


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five noisy images, the third of another size."""
    found = []
    for number in range(5):
        side = 24 if number == 2 else 16
        values = numpy.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=numpy.uint8)
        found.append(tmp_path / f"{9 - number}.png")
        Image.fromarray(values).save(found[-1])
    return found


class Means:
    """Mean of each channel; remembers what it was given."""

    name = "means"
    input_size = None

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.given.append(images)
        return images.float().mean(dim=(2, 3))


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_the_extractor_is_given_the_saved_values(paths: list[Path], batch_size: int) -> None:
    extractor = Means()
    found = image_features(paths, extractor, batch_size=batch_size)
    expected = [numpy.asarray(Image.open(path)) for path in paths]
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(
        numpy.array([values.mean(axis=(0, 1)) for values in expected]), rel=1e-6
    )
    given = [image for batch in extractor.given for image in batch]
    assert all(image.dtype == torch.uint8 for image in given)
    for image, values in zip(given, expected, strict=True):
        assert (image.permute(1, 2, 0).numpy() == values).all()


def test_promise_22_features_are_the_same_when_memory_runs_out(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = image_features(paths, Means(), batch_size=5)
    extractor = Means()
    monkeypatch.setattr(extractor, "features", hungry(extractor.features, holds=1))
    assert torch.equal(image_features(paths, extractor, batch_size=5), expected)
    assert [len(images) for images in extractor.given] == [1] * 5


def test_classifier_features_are_what_its_heads_read(paths: list[Path]) -> None:
    torch.manual_seed(0)
    classifier = EmojiClassifier("convnext", ("a", "b"), ("c",), width=8, input_size=16).eval()
    found = image_features(paths, ClassifierFeatures(classifier, "tiny"), batch_size=2)
    assert found.shape == (5, 16)
    pixels = torch.from_numpy(numpy.asarray(Image.open(paths[0]), dtype=numpy.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = classifier(pixels / 127.5 - 1)[0]
        assert torch.allclose(classifier.style_head(found[:1].float()), logits, atol=1e-5)


def test_a_classifier_without_features_is_refused() -> None:
    with pytest.raises(
        ClassifierError, match=r"fid_features classifier: mine has no method features\(images\)"
    ):
        ClassifierFeatures(Means(), "mine")


def test_own_extractors_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_features_of_this_test.py").write_text(
        "class Good:\n    name, input_size = 'good', 8\n    def __init__(self, device): pass\n"
        "    def features(self, images): return images.float().flatten(1)\n"
        "class Nameless:\n    input_size = 8\n    def __init__(self, device): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_own("own_features_of_this_test:Good", "cpu").name == "good"
    with pytest.raises(
        ClassifierError, match="fid_features: own_features_of_this_test:Nameless lacks name, features"
    ):
        load_own("own_features_of_this_test:Nameless", "cpu")


def test_without_inception_weights_the_error_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"no Inception weights at .*hub/checkpoints/weights-inception.*https://"
    ):
        InceptionFeatures()
    with pytest.raises(CheckpointError, match=r"no Inception weights at .*mine.pth"):
        InceptionFeatures(tmp_path / "mine.pth")
    damaged = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    damaged.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"has the SHA-256 .*not the 6726825d"):
        InceptionFeatures(damaged)
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"other.pth holds other weights than torch-fidelity's Inception"
    ):
        InceptionFeatures(tmp_path / "other.pth")


@pytest.mark.slow
def test_inception_features_are_torch_fidelitys(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights in torch-fidelity's own file format."""
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3"
    ).FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict", lambda *_: None)
        torch.save({}, tmp_path / "empty.pth")
        network = inception("any", ["2048"], feature_extractor_weights_path=tmp_path / "empty.pth")
    torch.save(network.state_dict(), tmp_path / "random.pth")
    found = image_features(paths[:2], InceptionFeatures(tmp_path / "random.pth"), batch_size=2)
    assert found.shape == (2, 2048)
    values = numpy.stack([numpy.asarray(Image.open(path)) for path in paths[:2]])
    expected = network(torch.from_numpy(values).permute(0, 3, 1, 2))[0]
    assert torch.allclose(found.float(), expected, atol=1e-6)
