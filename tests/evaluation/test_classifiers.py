"""Classifiers behind one interface: UnlearnCanvas' file format, and classes of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import timm
import torch
from PIL import Image

from mu.datasets.canvas import UNLEARN_CANVAS_OBJECTS, UNLEARN_CANVAS_STYLES
from mu.evaluation import classifiers
from mu.evaluation.asked_images import AskedImage
from mu.evaluation.classifiers import Classifier, FeatureClassifier, VitPair, load_own, load_unlearn_canvas
from mu.evaluation.emoji_classifier import ClassifierError, EmojiClassifier
from mu.evaluation.grid import classify

TINY = "vit_tiny_patch16_224"
STYLES, OBJECTS = ("Monet", "Seed_Images", "Crayon"), ("Cats", "Sea")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two checkpoints as UnlearnCanvas writes them, beside things that only its training needs.

    Their vision transformers have two small blocks, under their usual name.
    """
    create = timm.create_model

    def small(name: str, **options: object) -> torch.nn.Module:
        assert name == TINY
        return create(name, depth=2, embed_dim=48, num_heads=2, **options)

    monkeypatch.setattr(timm, "create_model", small)
    paths = []
    for seed, (name, names) in enumerate({"style50.pth": STYLES, "style50_cls.pth": OBJECTS}.items()):
        torch.manual_seed(seed)
        model = timm.create_model(TINY, num_classes=len(names))
        torch.nn.init.normal_(model.head.weight)
        paths.append(tmp_path / name)
        torch.save({"model_state_dict": model.state_dict(), "epoch": 9, "optimizer": {"lr": 0.1}}, paths[-1])
    return paths


def load(files: list[Path], **changes: object) -> VitPair:
    options = {"architecture": TINY, "styles": STYLES, "objects": OBJECTS, **changes}
    return load_unlearn_canvas(*files, **options)  # type: ignore[arg-type]


def test_unlearn_canvas_checkpoints_say_what_timm_says(files: list[Path], tmp_path: Path) -> None:
    """The preprocessing of the protocol, written out with torchvision: 224 px, bilinear, mean and std 0.5."""
    from torchvision import transforms

    steps = transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    picture = Image.fromarray(
        numpy.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=numpy.uint8)
    ).resize((512, 512))
    picture.save(tmp_path / "1.png")
    pair = load(files)
    (found,) = classify(
        [AskedImage(tmp_path / "1.png", "", "Crayon", "Sea", 1)], pair, batch_size=1, interpolation="bilinear"
    )
    answers = {}
    for kind, file, names in (("style", files[0], STYLES), ("object", files[1], OBJECTS)):
        model = timm.create_model(TINY, num_classes=len(names)).eval()
        model.load_state_dict(torch.load(file, weights_only=True)["model_state_dict"])
        with torch.no_grad():
            answers[kind] = model(steps(picture)[None]).softmax(-1)[0]
    assert found.predicted_style == STYLES[int(answers["style"].argmax())]
    assert found.predicted_object == OBJECTS[int(answers["object"].argmax())]
    assert found.style_probability == pytest.approx(float(answers["style"][2]), abs=2e-3)
    assert found.object_probability == pytest.approx(float(answers["object"][1]), abs=2e-3)
    features = pair.features(torch.zeros(1, 3, 224, 224))
    logits = pair.style_model.head(features[:, :48])
    assert torch.allclose(logits.softmax(-1), pair.predict(torch.zeros(1, 3, 224, 224))[0])


def test_a_checkpoint_of_other_classes_is_refused(files: list[Path]) -> None:
    with pytest.raises(
        ClassifierError, match=r"style50.pth does not fit .* with 2 classes: head.weight is \(3, 48\)"
    ):
        load(files, styles=STYLES[:2])
    with pytest.raises(
        ClassifierError, match=r"style50_cls.pth does not fit vit_tiny_patch16_224 with 3 classes"
    ):
        load([files[1], files[1]])


def test_the_classes_are_those_of_the_protocol() -> None:
    assert (len(UNLEARN_CANVAS_STYLES), len(UNLEARN_CANVAS_OBJECTS)) == (51, 20)
    assert UNLEARN_CANVAS_STYLES[38] == "Seed_Images"
    assert classifiers.VIT == "vit_large_patch16_224"


def test_all_classifiers_fit_the_interface(files: list[Path]) -> None:
    for classifier in (load(files), EmojiClassifier("conv", STYLES, OBJECTS, width=8, input_size=16)):
        assert isinstance(classifier, Classifier)
        assert isinstance(classifier, FeatureClassifier)


OWN = '''
import torch

class Brightness:
    """Bright images are Monet's cats."""
    styles, objects, input_size = ("Monet", "Crayon"), ("Cats", "Sea"), 8

    def __init__(self, device):
        self.device = device

    def predict(self, images):
        bright = (images.mean(dim=(1, 2, 3)) + 1) / 2
        answer = torch.stack([bright, 1 - bright], dim=1)
        return answer, answer

class Logits(Brightness):
    def predict(self, images):
        return torch.ones(len(images), 2), torch.ones(len(images), 2)

class Mute:
    def __init__(self, device):
        self.styles = self.objects = ("a",)
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_classifiers_of_this_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_classifiers_of_this_test"


def test_a_class_of_the_users_own_scores_images(own_module: str, tmp_path: Path) -> None:
    classifier = load_own(f"{own_module}:Brightness", "cpu")
    Image.new("RGB", (20, 20), (204, 204, 204)).save(tmp_path / "1.png")
    (found,) = classify([AskedImage(tmp_path / "1.png", "", "Monet", "Sea", 1)], classifier, batch_size=4)
    assert (found.predicted_style, found.predicted_object) == ("Monet", "Cats")
    assert (found.style_probability, found.object_probability) == pytest.approx((0.8, 0.2), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:A", "no module 'no_such_module_here'.*PYTHONPATH"),
        ("{own}:Brightnes", "the module .* has no 'Brightnes'"),
        ("{own}:Mute", "lacks input_size, predict"),
        ("{own}:Logits", r"probabilities of its styles, \(1, 2\) with sum 1; it gave \(1, 2\) with sum 2"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(own_module: str, name: str, message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        load_own(name.format(own=own_module), "cpu")
