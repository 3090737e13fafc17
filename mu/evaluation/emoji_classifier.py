"""Classifiers with a style and an object head that say what an EmojiCanvas image shows.

Two architectures, so that a model tuned with one classifier can be scored by another that shares neither
structure nor seed. A file is safetensors in half precision; its header says everything needed to load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mu.errors import MuError
from mu.ldm.tensor_file import read_state_dict, write_state_dict

FORMAT_KEY = "mu.classifier_format"
FORMAT = "1"
ARCHITECTURES = ("conv", "convnext")


class ClassifierError(MuError, ValueError):
    """A file holds no classifier, or a classifier is asked what it cannot say."""


def _conv_block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


def _conv_trunk(width: int) -> tuple[nn.Sequential, int]:
    """A plain stack of 3x3 convolutions with group norm, halving the side four times."""
    return (
        nn.Sequential(
            _conv_block(3, width, 2),  # 32 px
            _conv_block(width, 2 * width, 2),  # 16 px
            _conv_block(2 * width, 2 * width, 1),
            _conv_block(2 * width, 4 * width, 2),  # 8 px
            _conv_block(4 * width, 4 * width, 1),
            _conv_block(4 * width, 4 * width, 2),  # 4 px
        ),
        4 * width,
    )


class _LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)  # (B, C, H, W)


class _ConvNextBlock(nn.Module):
    """A wide depthwise convolution, then a pointwise network, added to the input (Liu et al., 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.gain = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(x).movedim(1, -1)  # (B, H, W, C)
        h = self.narrow(F.gelu(self.widen(self.norm(h)))) * self.gain  # (B, H, W, C)
        return x + h.movedim(-1, 1)  # (B, C, H, W)


def _convnext_trunk(width: int) -> tuple[nn.Sequential, int]:
    """Residual blocks with layer norm on 16 px, then on 8 px."""
    return (
        nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4),  # 16 px
            _LayerNorm2d(width),
            _ConvNextBlock(width),
            _ConvNextBlock(width),
            _LayerNorm2d(width),
            nn.Conv2d(width, 2 * width, 2, stride=2),  # 8 px
            _ConvNextBlock(2 * width),
            _ConvNextBlock(2 * width),
            _ConvNextBlock(2 * width),
        ),
        2 * width,
    )


class EmojiClassifier(nn.Module):
    """Says which style and which object an image shows.

    Args:
        architecture: ``conv`` or ``convnext``.
        styles: names of the classes of the style head.
        objects: names of the classes of the object head.
        width: channels of the first layer, a multiple of 8.
        input_size: side of the images, in pixels, a multiple of 16.

    Raises:
        ClassifierError: the architecture is unknown, the names are empty or double, a size does not fit.
    """

    def __init__(
        self,
        architecture: str,
        styles: Sequence[str],
        objects: Sequence[str],
        *,
        width: int = 32,
        input_size: int = 64,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ClassifierError(
                f"architecture is {architecture!r}; it must be one of {', '.join(ARCHITECTURES)}"
            )
        for kind, names in (("styles", styles), ("objects", objects)):
            if not names or len(set(names)) != len(names):
                raise ClassifierError(f"{kind} must be different names, at least one; they are {list(names)}")
        if width < 8 or width % 8:
            raise ClassifierError(f"width is {width}; it must be a multiple of 8")
        if input_size < 16 or input_size % 16:
            raise ClassifierError(f"input_size is {input_size}; it must be a multiple of 16")
        self.architecture = architecture
        self.styles = tuple(styles)
        self.objects = tuple(objects)
        self.width = width
        self.input_size = input_size
        self.trunk, features = (_conv_trunk if architecture == "conv" else _convnext_trunk)(width)
        self.norm = nn.LayerNorm(features)
        self.style_head = nn.Linear(features, len(self.styles))
        self.object_head = nn.Linear(features, len(self.objects))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both heads for images (B, 3, input_size, input_size) in [-1, 1]."""
        h = self.features(images)  # (B, F)
        return self.style_head(h), self.object_head(h)  # (B, S), (B, O)

    def features(self, images: Tensor) -> Tensor:
        """What both heads read, (B, F), for images as `forward` takes them, on any device."""
        h = self.trunk(images.to(self.style_head.weight))  # (B, F, h, w)
        return self.norm(h.mean(dim=(2, 3)))

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the styles and of the objects.

        Args:
            images: (B, 3, input_size, input_size) in about [-1, 1]; what goes beyond is clamped.

        Returns:
            style probabilities (B, S) and object probabilities (B, O), in the order of ``styles``, ``objects``.

        Raises:
            ClassifierError: another shape, an integer type, or values that are not finite.
        """
        size = self.input_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ClassifierError(f"images must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ClassifierError(f"images must be floating point in [-1, 1], not {images.dtype}")
        if not torch.isfinite(images).all():
            raise ClassifierError("images hold values that are not finite (NaN or Inf)")
        style_logits, object_logits = self(images.to(self.style_head.weight).clamp(-1, 1))
        return style_logits.softmax(dim=-1), object_logits.softmax(dim=-1)


@dataclass(frozen=True)
class ClassifierInfo:
    """What the header of a classifier file says.

    Attributes:
        accuracy: mean of the two accuracies.
        style_accuracy: part of fresh augmentations of the drawings whose style was right, in [0, 1].
        object_accuracy: likewise of the object.
        seed: of the training.
    """

    architecture: str
    styles: tuple[str, ...]
    objects: tuple[str, ...]
    width: int
    input_size: int
    accuracy: float
    style_accuracy: float
    object_accuracy: float
    seed: int


def _parse_info(metadata: Mapping[str, str], path: Path) -> ClassifierInfo:
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise ClassifierError(
            f"{path} is no classifier: its header has no {FORMAT_KEY} = {FORMAT!r}; leave classifier_path out for the "
            "bundled one (scripts/train_emoji_classifier.py of the repository makes others)"
        )
    try:
        return ClassifierInfo(
            architecture=metadata["architecture"],
            styles=tuple(json.loads(metadata["styles"])),
            objects=tuple(json.loads(metadata["objects"])),
            width=int(metadata["width"]),
            input_size=int(metadata["input_size"]),
            accuracy=float(metadata["accuracy"]),
            style_accuracy=float(metadata["style_accuracy"]),
            object_accuracy=float(metadata["object_accuracy"]),
            seed=int(metadata["seed"]),
        )
    except KeyError as error:
        raise ClassifierError(f"{path}: its header lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise ClassifierError(f"{path}: its header is malformed ({error})") from None


def read_info(path: str | Path) -> ClassifierInfo:
    """The header of a classifier file.

    Raises:
        CheckpointError: the file is missing or damaged.
        ClassifierError: it is no classifier.
    """
    return _parse_info(read_state_dict(path)[1], Path(path))


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> EmojiClassifier:
    """Load a classifier, in single precision and eval mode, its parameters frozen.

    Args:
        path: a file written by ``save_classifier``.
        device: where it shall run.

    Raises:
        CheckpointError: the file is missing or damaged.
        ClassifierError: it is no classifier, or weights are missing, unexpected, of another shape or not finite.
    """
    path = Path(path)
    weights, metadata = read_state_dict(path)
    info = _parse_info(metadata, path)
    model = EmojiClassifier(
        info.architecture, info.styles, info.objects, width=info.width, input_size=info.input_size
    )
    expected = model.state_dict()
    wrong = [
        *(f"{name} is missing" for name in expected.keys() - weights.keys()),
        *(f"{name} is unexpected" for name in weights.keys() - expected.keys()),
        *(
            f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected.keys() & weights.keys()
            if weights[name].shape != expected[name].shape
        ),
        *(f"{name} is not finite" for name, weight in weights.items() if not torch.isfinite(weight).all()),
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ClassifierError(f"{path} does not fit its own header: {'; '.join(sorted(wrong)[:5])}{more}")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval().requires_grad_(False).to(device)


def save_classifier(
    model: EmojiClassifier, path: str | Path, *, style_accuracy: float, object_accuracy: float, seed: int
) -> None:
    """Write a classifier in half precision, atomically.

    Args:
        model: the classifier.
        path: a ``.safetensors`` file.
        style_accuracy: measured on fresh augmentations, in [0, 1], kept in the header.
        object_accuracy: likewise.
        seed: of the training.

    Raises:
        CheckpointError: the file could not be written.
    """
    metadata = {
        FORMAT_KEY: FORMAT,
        "architecture": model.architecture,
        "styles": json.dumps(model.styles),
        "objects": json.dumps(model.objects),
        "width": str(model.width),
        "input_size": str(model.input_size),
        "accuracy": f"{(style_accuracy + object_accuracy) / 2:.5f}",
        "style_accuracy": f"{style_accuracy:.5f}",
        "object_accuracy": f"{object_accuracy:.5f}",
        "seed": str(seed),
    }
    write_state_dict({name: weight.half() for name, weight in model.state_dict().items()}, path, metadata)
