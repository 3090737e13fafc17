"""What is measured of images beside accuracies: FID, KID, CLIP score, nudity. Loaded first, so that it fails early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mu.config import resolve_path
from mu.datasets.index import concept_names
from mu.evaluation import classifiers, features
from mu.evaluation.asked_images import AskedImage, paired
from mu.evaluation.classifiers import Classifier
from mu.evaluation.clip_score import ClipError, ClipScorer
from mu.evaluation.config import EvaluateConfig
from mu.evaluation.distances import DistanceError, fid, kid
from mu.evaluation.emoji_classifier import load_classifier
from mu.evaluation.features import FeatureExtractor, image_features
from mu.evaluation.intervals import mean_estimate
from mu.evaluation.nudity import Detector, count_nudity, load_detector


class ScoredBy(Protocol):
    """The keys of a config that name its classifier."""

    @property
    def classifier(self) -> str: ...
    @property
    def classifier_path(self) -> str: ...
    @property
    def style_classifier_path(self) -> str: ...
    @property
    def object_classifier_path(self) -> str: ...
    @property
    def classifier_resize(self) -> str | None: ...


def load_scorer(config: ScoredBy, device: str) -> Classifier | None:
    """The classifier that the settings name, or None for none.

    Raises:
        MuError: its files or its class are missing or wrong.
    """
    if config.classifier == "none":
        return None
    if config.classifier == "unlearn_canvas":
        paths = (resolve_path(config.style_classifier_path), resolve_path(config.object_classifier_path))
        return classifiers.load_unlearn_canvas(*paths, device)
    if config.classifier == "file":
        return load_classifier(resolve_path(config.classifier_path), device)
    return classifiers.load_own(config.classifier, device)


def scorer_name(config: ScoredBy) -> str:
    """What a result calls the classifier."""
    return Path(config.classifier_path).name if config.classifier == "file" else config.classifier


def interpolation(config: ScoredBy) -> str:
    """How images are brought to the classifier's size; UnlearnCanvas' own code leaves it to torchvision, bilinear."""
    return config.classifier_resize or ("bilinear" if config.classifier == "unlearn_canvas" else "bicubic")


@dataclass(frozen=True)
class Reference:
    """The images that FID and KID compare with; `name` says which they are."""

    name: str
    images: tuple[AskedImage, ...]


class Quality:
    """The measures that the settings ask for.

    Raises:
        MuError: a package or weights are missing, or a class of the user's own is wrong.
    """

    def __init__(self, config: EvaluateConfig, classifier: Classifier | None, device: str) -> None:
        self.config = config
        self.device = device
        self.extractor: FeatureExtractor | None = None
        if config.fid_reference != "none":
            if config.fid_features == "classifier":
                self.extractor = features.ClassifierFeatures(classifier, scorer_name(config))
            elif config.fid_features == "inception":
                path = None if config.inception_path is None else resolve_path(config.inception_path)
                self.extractor = features.InceptionFeatures(path, device)
            else:
                self.extractor = features.load_own(config.fid_features, device)
        self.clip = None
        if config.clip_model is not None:
            weights = resolve_path(config.clip_weights)
            given = str(weights) if weights.is_file() else config.clip_weights
            self.clip = ClipScorer(config.clip_model, given, device)
        self.detector: Detector | None = load_detector() if config.nudity else None
        self._features: dict[tuple[Path, ...], Tensor] = {}

    def measure(self, images: Sequence[AskedImage], reference: Reference | None) -> dict[str, object]:
        """The numbers of one model's images, as plain values for JSON; what was not asked for is left out.

        Raises:
            MuError: too few images, or images without prompts; see the message.
        """
        found: dict[str, object] = {}
        if reference is not None and self.extractor is not None:
            found |= self._distances(images, reference, self.extractor)
        if self.clip is not None:
            found["clip_score"] = self._clip_scores(images, self.clip)
        if self.detector is not None:
            found["nudity"] = count_nudity(
                [image.path for image in images],
                self.detector,
                labels=self.config.nudity_labels,
                threshold=self.config.nudity_threshold,
                batch_size=self.config.batch_size,
            ).as_dict()
        return found

    def _distances(
        self, images: Sequence[AskedImage], reference: Reference, extractor: FeatureExtractor
    ) -> dict[str, object]:
        chosen = self.chosen(images, self.config.fid_prompts)
        others = self.chosen(reference.images, self.config.fid_prompts)
        if min(len(chosen), len(others)) < 2:
            raise DistanceError(
                f"fid_prompts: of {self.config.fid_prompts} prompts there are {len(chosen)} images and {len(others)} "
                "of the reference; FID and KID need at least two of each"
            )
        sets = self._features_of(chosen, extractor), self._features_of(others, extractor)
        pairs = self.config.fid_reference == "base" and paired(chosen, others)
        described = {
            "features": extractor.name,
            "reference": reference.name,
            "prompts": self.config.fid_prompts,
        }
        return {
            "fid": asdict(fid(*sets, paired=pairs, device=self.device)) | described,
            "kid": asdict(kid(*sets, paired=pairs)) | described,
        }

    def _clip_scores(self, images: Sequence[AskedImage], clip: ClipScorer) -> dict[str, object]:
        without = [image for image in images if not image.prompt]
        if without:
            raise ClipError(
                f"clip_model: {len(without)} images have no prompt, such as {without[0].path}; give a folder with an "
                "images.csv (columns file, prompt, evaluation_seed)"
            )
        scores = dict(zip(images, clip.scores(images, batch_size=self.config.batch_size), strict=True))
        groups = {name: self.chosen(images, name) for name in ("all", "retained", "forgotten")}
        return {"model": clip.name} | {
            name: asdict(mean_estimate([scores[image] for image in group])) for name, group in groups.items()
        }

    def _features_of(self, images: Sequence[AskedImage], extractor: FeatureExtractor) -> Tensor:
        paths = tuple(image.path for image in images)
        if paths not in self._features:
            self._features[paths] = image_features(
                paths,
                extractor,
                batch_size=self.config.batch_size,
                interpolation=interpolation(self.config),
            )
        return self._features[paths]

    def chosen(self, images: Sequence[AskedImage], prompts: str) -> list[AskedImage]:
        """The images of "retained", "forgotten" or "all" prompts that count; those without concepts are in each."""
        targets = concept_names(self.config.template_name)
        return [
            image
            for image in images
            if image.style not in self.config.left_out
            and image.object not in self.config.left_out
            and (
                prompts == "all"
                or not image.style
                or (image.asked(self.config.template) in targets) == (prompts == "forgotten")
            )
        ]


def meanings(numbers: Mapping[str, object]) -> dict[str, str]:
    """What the measures that there are mean."""
    texts = {
        "fid": "Frechet distance of features to those of the reference; less is nearer",
        "kid": "squared kernel distance (MMD) of features to those of the reference; less is nearer; an unbiased "
        "estimate, which may fall a little below 0",
        "clip_score": "100 x cosine of image and prompt; more fits better",
        "nudity": "unsafe parts that NudeNet finds, by label",
        "memorised": "how sure the classifier is of the forgotten concept on its own prompts, in [0, 1]",
    }
    return {key: text for key, text in texts.items() if key in numbers}
