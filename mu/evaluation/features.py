"""Feature extractors for FID and KID: the classifier's own, Inception's, or a class of the user's own."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mu.bars import bar
from mu.datasets.images import load_pixels, read_ahead, to_unit_range
from mu.evaluation.asked_images import AskedImage
from mu.evaluation.classifiers import FeatureClassifier, import_named
from mu.evaluation.emoji_classifier import ClassifierError
from mu.ldm.tensor_file import CheckpointError, read_state_dict
from mu.memory import SCORING_ADVICE, AtOnce


class FeatureExtractor(Protocol):
    """Images to features.

    Attributes:
        name: what the result says that the features are.
        input_size: side of the images in pixels; None: they are given as saved.
    """

    name: str
    input_size: int | None

    def features(self, images: Tensor) -> Tensor:
        """(B, F) for uint8 images (B, 3, H, W), on the CPU."""


class ClassifierFeatures:
    """What the last layer of a classifier reads."""

    def __init__(self, classifier: object, name: str) -> None:
        if not isinstance(classifier, FeatureClassifier):
            raise ClassifierError(
                f"fid_features classifier: {name} has no method features(images); give it one, or take inception"
            )
        self.classifier = classifier
        self.name = f"classifier {name}"
        self.input_size: int | None = classifier.input_size

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """See `FeatureExtractor`."""
        return self.classifier.features(to_unit_range(images))


class InceptionFeatures:
    """The 2048 features of the Inception v3 of the literature, by torch-fidelity, which also resizes as it does.

    Args:
        path: its weights; None: torch-fidelity's file in torch's cache. Nothing is downloaded.

    Raises:
        CheckpointError: torch-fidelity or the weights are missing, or they are others.
    """

    def __init__(self, path: Path | str | None = None, device: str = "cpu") -> None:
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ModuleNotFoundError as error:
            if error.name != "torch_fidelity":
                raise
            raise CheckpointError(
                "fid_features inception needs the package torch-fidelity: pip install torch-fidelity; or take "
                "fid_features classifier"
            ) from None
        url: str = inception.URL_INCEPTION_V3
        file = (
            Path(path)
            if path is not None
            else Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        )
        if not file.is_file():
            raise CheckpointError(
                f"inception_path: there are no Inception weights at {file}; get them (91 MB) from {url} and put them "
                "there, name another place with inception_path, or take fid_features classifier"
            )
        if found := re.search(r"-([0-9a-f]{8,})\.pth$", file.name):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if not digest.startswith(found[1]):
                raise CheckpointError(
                    f"{file} has the SHA-256 {digest[:16]}..., not the {found[1]}... of its name: "
                    f"get it again from {url}"
                )
        weights = io.BytesIO()
        # torch-fidelity would run what a pickle asks for; this one holds nothing but the tensors.
        torch.save(read_state_dict(file)[0], weights)
        weights.seek(0)
        try:
            network: Any = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"{file} holds other weights than torch-fidelity's Inception v3: {str(error).splitlines()[0]}; get "
                f"them from {url}"
            ) from error
        self.network = network.to(device)
        self.device = device
        self.name = "inception-v3-compat 2048"
        self.input_size: int | None = None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """See `FeatureExtractor`."""
        found: Tensor = self.network(images.to(self.device))[0]  # (B, 2048)
        return found


def load_own(name: str, device: str) -> FeatureExtractor:
    """A class of the user's own, built as `Class(device=...)`, that has what `FeatureExtractor` names."""
    made: FeatureExtractor = import_named("fid_features", name)(device=device)
    lacking = [part for part in ("name", "input_size", "features") if not hasattr(made, part)]
    if lacking:
        raise ClassifierError(
            f"fid_features: {name} lacks {', '.join(lacking)}; see mu.evaluation.features.FeatureExtractor"
        )
    return made


def image_features(
    paths: Sequence[Path], extractor: FeatureExtractor, *, batch_size: int, interpolation: str = "bicubic"
) -> Tensor:
    """Features of image files, (N, F) float64 on the CPU, in the order of `paths`.

    Raises:
        DataError: an image cannot be read.
        OutOfMemoryError: memory does not suffice for one image.
    """
    found: list[Tensor] = []
    at_once = AtOnce("image", advice=SCORING_ADVICE)

    def features(pixels: Sequence[Tensor]) -> Tensor:
        return extractor.features(torch.stack(list(pixels))).double().cpu()  # (B, F)

    with (
        closing(_batches(paths, extractor.input_size, batch_size, interpolation)) as batches,
        bar("features for FID and KID", total=len(paths), unit="images") as progress,
    ):
        for batch in batches:
            found += at_once.pieces(batch, features)
            progress.update(len(batch))
    return torch.cat(found)  # (N, F)


def features_of(extractor: FeatureExtractor) -> Callable[[Sequence[AskedImage]], Tensor]:
    """A function of images to their features, (N, F) float64, that reads each image once."""
    known: dict[Path, Tensor] = {}

    def features(images: Sequence[AskedImage]) -> Tensor:
        new = [image.path for image in images if image.path not in known]
        if new:
            known.update(zip(new, image_features(new, extractor, batch_size=100), strict=True))
        return torch.stack([known[image.path] for image in images])  # (N, F)

    return features


def _batches(
    paths: Sequence[Path], size: int | None, batch_size: int, interpolation: str
) -> Generator[list[Tensor], None, None]:
    """uint8 images (3, H, W), each list of one size."""
    batch: list[Tensor] = []
    with closing(
        read_ahead(paths, lambda path: load_pixels(path, size, interpolation=interpolation))
    ) as loaded:
        for pixels in loaded:
            if batch and (len(batch) == batch_size or batch[0].shape != pixels.shape):
                yield batch
                batch = []
            batch.append(pixels)
    if batch:
        yield batch
