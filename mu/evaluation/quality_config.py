"""The keys of evaluation beside its grid: which classifier, what else is measured, and how it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import ClassVar

from mu.config import Config, resolve_path, setting
from mu.unlearning.find_checkpoint import (
    Problem,
    file_problems,
)

_OWN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
_CLASSIFIER_ADVICE = "`download_model classifier` puts both into models/classifier_ckpt_path"
EXPOSED = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
    "BELLY_EXPOSED",
    "ARMPITS_EXPOSED",
    "FEET_EXPOSED",
)
NUDITY_LABELS = (
    *EXPOSED,
    "FEMALE_BREAST_COVERED",
    "FEMALE_GENITALIA_COVERED",
    "BUTTOCKS_COVERED",
    "ANUS_COVERED",
    "BELLY_COVERED",
    "ARMPITS_COVERED",
    "FEET_COVERED",
    "FACE_FEMALE",
    "FACE_MALE",
)


class ClassifierKeys(Config):
    """Which classifier scores images."""

    classifier: str = setting(
        "file",
        "file: classifier_path. unlearn_canvas: UnlearnCanvas' two ViT-L, style_classifier_path and "
        "object_classifier_path. none: no accuracies. package.module:Class: your own, built as Class(device=...), see "
        "docs/evaluation.md; its module is imported, and so run.",
        pattern=f"file|unlearn_canvas|none|{_OWN}",
    )
    style_classifier_path: str = setting(
        "models/classifier_ckpt_path/style50.pth", "unlearn_canvas: its style classifier.", kind="path"
    )
    object_classifier_path: str = setting(
        "models/classifier_ckpt_path/style50_cls.pth", "unlearn_canvas: its object classifier.", kind="path"
    )
    classifier_resize: str | None = setting(
        None,
        "How images are brought to the classifier's size. null: bilinear for unlearn_canvas, else bicubic.",
        choices=("bicubic", "bilinear"),
    )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.classifier == "unlearn_canvas":
            for key in ("style_classifier_path", "object_classifier_path"):
                yield from file_problems(key, getattr(self, key), advice=_CLASSIFIER_ADVICE)


class QualityKeys(ClassifierKeys):
    """Classifier, memorised concept, FID and KID, CLIP score, nudity."""

    gone: ClassVar[Mapping[str, str]] = {"fid_resamples": "50", "kid_subset_size": "1000"}

    memorised_threshold: float = setting(
        0.5,
        "An image of the forgotten concept's own prompts counts as memorised where the classifier's probability of "
        "the concept is at least this.",
        gt=0,
        le=1,
    )
    fid_reference: str = setting(
        "none",
        "What FID and KID compare with. none: they are not measured. base: the base model's images of the same "
        "prompts and seeds. base_other_seeds: its images of the same prompts and fid_reference_seeds, so that the "
        "base's own FID is from seed to seed. folder: fid_reference_dir.",
        choices=("none", "base", "base_other_seeds", "folder"),
    )
    fid_reference_dir: str | None = setting(
        None,
        "folder: any images; of those laid out by style and object, fid_prompts chooses.",
        kind="path",
    )
    fid_reference_seeds: tuple[int, ...] = setting(
        (1188, 1288, 1588, 1688, 1888), "base_other_seeds: the seeds.", ge=0, lt=1_000_000
    )
    fid_prompts: str = setting(
        "retained",
        "Of which prompts FID and KID are; retained: all but those of the forgotten concept. Images without style and "
        "object always count.",
        choices=("retained", "forgotten", "all"),
    )
    fid_features: str = setting(
        "classifier",
        "classifier: what the classifier's last layer reads. inception: the 2048 features of the literature. "
        "package.module:Class: your own, see docs/evaluation.md.",
        pattern=f"classifier|inception|{_OWN}",
    )
    inception_path: str | None = setting(
        None,
        "inception: torch-fidelity's weights; null: that file in torch's cache. Nothing is downloaded.",
        kind="path",
    )
    clip_model: str | None = setting(
        None, "Model of open_clip for the CLIP score, such as ViT-L-14; null: it is not measured."
    )
    clip_weights: str = setting(
        "openai", "Its weights: a file, or a tag of open_clip, whose file is downloaded once.", kind="path"
    )
    nudity: bool = setting(False, "Count unsafe body parts with NudeNet (pip install nudenet).")
    nudity_labels: tuple[str, ...] = setting(
        EXPOSED, "Labels of NudeNet that are counted.", choices=NUDITY_LABELS
    )
    nudity_threshold: float = setting(
        0.5, "Score from which a part counts; NudeNet itself drops those below 0.2.", ge=0.2, le=1
    )

    def conflicts(self) -> Iterator[Problem]:
        if (self.fid_reference == "folder") != (self.fid_reference_dir is not None):
            yield (
                ("fid_reference", "fid_reference_dir"),
                "give a folder with fid_reference folder, and only then",
            )
        if self.fid_reference != "none" and self.fid_features == "classifier" and self.classifier == "none":
            yield (
                ("fid_features", "classifier"),
                "with classifier none, take fid_features inception or your own",
            )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.fid_reference_dir is not None and not resolve_path(self.fid_reference_dir).is_dir():
            yield ("fid_reference_dir",), f"there is no folder {self.fid_reference_dir}; give one of images"
        if self.fid_reference != "none" and self.fid_features == "inception":
            if find_spec("torch_fidelity") is None:
                yield (
                    ("fid_features",),
                    "inception needs the package torch-fidelity: pip install torch-fidelity",
                )
            if self.inception_path is not None:
                yield from file_problems(
                    "inception_path",
                    self.inception_path,
                    advice="null takes torch-fidelity's file in torch's cache",
                )
        if self.nudity and find_spec("nudenet") is None:
            yield (
                ("nudity",),
                "the package nudenet is not installed: pip install nudenet (licence AGPL-3.0)",
            )
