"""Which classifiers can score images: the bundled ones, UnlearnCanvas' two, or a class of the user's own.

Any object will do that has what `Classifier` names. `FeatureClassifier` adds the features that FID can be taken of.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mu.datasets.canvas import UNLEARN_CANVAS_OBJECTS, UNLEARN_CANVAS_STYLES
from mu.evaluation.emoji_classifier import ClassifierError
from mu.ldm.tensor_file import read_state_dict

VIT = "vit_large_patch16_224"


@runtime_checkable
class Classifier(Protocol):
    """Says which style and which object an image shows."""

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the style classes, in order."""

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the object classes, in order."""

    @property
    def input_size(self) -> int:
        """Side of the images that `predict` takes, in pixels."""

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, S) and (B, O) for images (B, 3, input_size, input_size) in [-1, 1], on the CPU."""


@runtime_checkable
class FeatureClassifier(Classifier, Protocol):
    """A classifier whose features can be compared."""

    def features(self, images: Tensor) -> Tensor:
        """(B, F) for images as `predict` takes them."""


class VitPair(nn.Module):
    """Two vision transformers of timm, one for styles and one for objects, as UnlearnCanvas publishes them.

    Args:
        style_model, object_model: timm models with one output a class, for images with mean and std 0.5.
    """

    def __init__(
        self, style_model: Any, object_model: Any, *, styles: Sequence[str], objects: Sequence[str]
    ) -> None:
        super().__init__()
        self.style_model = style_model
        self.object_model = object_model
        self.styles = tuple(styles)
        self.objects = tuple(objects)
        self.input_size: int = style_model.patch_embed.img_size[0]

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Classifier.predict`."""
        images = images.to(self.style_model.head.weight)  # mean and std 0.5: as they are
        return self.style_model(images).softmax(-1), self.object_model(images).softmax(-1)  # (B, S), (B, O)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the heads read, of the style model and then of the object model, (B, 2 F)."""
        images = images.to(self.style_model.head.weight)
        return torch.cat(
            [
                model.forward_head(model.forward_features(images), pre_logits=True)
                for model in (self.style_model, self.object_model)
            ],
            dim=-1,
        )


def load_unlearn_canvas(
    style_path: Path | str,
    object_path: Path | str,
    device: str = "cpu",
    *,
    architecture: str = VIT,
    styles: Sequence[str] = UNLEARN_CANVAS_STYLES,
    objects: Sequence[str] = UNLEARN_CANVAS_OBJECTS,
) -> VitPair:
    """UnlearnCanvas' classifiers (arXiv 2402.11846): timm's ViT-L/16, weights under `model_state_dict`.

    Args:
        style_path: `style50.pth`, 51 classes (50 styles and the photographs); object_path: `style50_cls.pth`, 20.
        architecture: name in timm; styles, objects: the classes, in order.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe.
        ClassifierError: its weights are others than this architecture with these classes has.
    """
    models = [
        _load_vit(path, architecture, len(names))
        for path, names in ((style_path, styles), (object_path, objects))
    ]
    return VitPair(*models, styles=styles, objects=objects).eval().requires_grad_(False).to(device)


def _load_vit(path: Path | str, architecture: str, classes: int) -> nn.Module:
    import timm  # late: it imports torchvision

    model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=classes)
    weights, _ = read_state_dict(path)
    expected = model.state_dict()
    wrong = [
        *(f"{name} is missing" for name in expected if name not in weights),
        *(f"{name} is unexpected" for name in weights if name not in expected),
        *(
            f"{name} is {tuple(weights[name].shape)}, expected {tuple(weight.shape)}"
            for name, weight in expected.items()
            if name in weights and weights[name].shape != weight.shape
        ),
        *(f"{name} is not finite" for name, weight in weights.items() if not torch.isfinite(weight).all()),
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ClassifierError(
            f"{path} does not fit {architecture} with {classes} classes: {'; '.join(wrong[:5])}{more}"
        )
    model.load_state_dict(weights)
    return model


def import_named(key: str, name: str) -> Any:
    """What `package.module:Name` means, on Python's path. Raises ClassifierError where there is no such thing."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there, and lacks something itself
        raise ClassifierError(
            f"{key}: there is no module {module!r}; start in its folder, or set PYTHONPATH"
        ) from error
    except AttributeError:
        raise ClassifierError(f"{key}: the module {module!r} has no {attribute!r}") from None


def load_own(name: str, device: str) -> Classifier:
    """A class of the user's own, built as `Class(device=...)` and tried on one grey image.

    Raises:
        ClassifierError: it is not there, lacks a part of `Classifier`, or answers in another shape.
    """
    made = import_named("classifier", name)(device=device)
    if not isinstance(made, Classifier):
        lacking = [part for part in ("styles", "objects", "input_size", "predict") if not hasattr(made, part)]
        raise ClassifierError(
            f"classifier: {name} lacks {', '.join(lacking)}; see mu.evaluation.classifiers.Classifier"
        )
    size = made.input_size
    answers = made.predict(torch.zeros(1, 3, size, size))
    for kind, names, answer in zip(("styles", "objects"), (made.styles, made.objects), answers, strict=True):
        wanted = (1, len(names))
        if tuple(answer.shape) != wanted or not bool((answer.sum() - 1).abs() < 1e-3):
            raise ClassifierError(
                f"classifier: {name} must answer an image with probabilities of its {kind}, {wanted} with sum 1; "
                f"it gave {tuple(answer.shape)} with sum {float(answer.sum()):.4g}"
            )
    return made
