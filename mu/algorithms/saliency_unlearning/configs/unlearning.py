"""The keys of the two stages: making a mask, and fine-tuning under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from mu.cli import command_line
from mu.config import as_dict, keys_of, resolve_path, setting
from mu.unlearning.config import (
    OUTPUTS,
    PRECISION_HELP,
    PRECISIONS,
    TRAIN_METHOD_HELP,
    TRAIN_METHODS,
    ComputeKeys,
    DataKeys,
)
from mu.unlearning.find_checkpoint import Problem
from mu.unlearning.training_config import ImageTrainingKeys

MASKS = f"{OUTPUTS}/masks"
MASK_MODULE = "mu.algorithms.saliency_unlearning.scripts.generate_mask"
TRAIN_MODULE = "mu.algorithms.saliency_unlearning.scripts.train"
_FEW_TIMESTEPS = 100
_RANDOM_FRACTION = 0.5
_MASK_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")


class MaskConfig(ComputeKeys, DataKeys):
    """Stage 1: the saliency mask of a concept."""

    AUTO_PRECISION: ClassVar[str] = "tf32"
    precision: str = setting(
        "auto",
        f"{PRECISION_HELP} auto: tf32 on a GPU that has it, else fp32; in bf16 2 to 4 % of the marked weights "
        "would be others (docs/method.md).",
        choices=PRECISIONS,
    )
    c_guidance: float = setting(
        7.5,
        "Guidance w of the forget loss, (1+w) prediction(prompt) - w prediction(''); 0: the plain loss.",
        ge=0,
        le=100,
    )
    batch_size: int = setting(
        4,
        "Images a gradient pass; memory and speed, not the mask. Halved when memory runs out.",
        ge=1,
        le=100_000,
    )
    num_timesteps: int = setting(
        1000, "Timesteps are drawn from 0..num_timesteps-1; at most the model's own number.", ge=1, le=100_000
    )
    draws_per_image: int = setting(1, "Draws of timestep and noise for each image.", ge=1, le=100_000)
    threshold: float | tuple[float, ...] = setting(
        0.5, "Fraction of the weights that is kept, the most salient. Several give several masks.", gt=0, le=1
    )
    pool: str = setting(
        "unet",
        "What is ranked: unet, all weights of the UNet; train_method, those that train_method moves.",
        choices=("unet", "train_method"),
    )
    train_method: str = setting(
        "full",
        f"Used by pool train_method: which UNet weights are ranked. {TRAIN_METHOD_HELP}",
        choices=TRAIN_METHODS,
    )
    lr: float = setting(1e-5, "Accepted because existing files have it; has no effect, nothing moves.", gt=0)
    output_dir: str = setting(MASKS, "The run's folder is made in it.", kind="path")

    @classmethod
    def of_another(cls, name: str) -> str | None:
        known = {key.name for key in keys_of(TrainConfig)}
        return "It is a key of train, which follows; leave it out here." if name in known else None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """`threshold` as a tuple."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)

    def doubts(self) -> Iterator[str]:
        if self.num_timesteps < _FEW_TIMESTEPS:
            yield (
                f"num_timesteps: {self.num_timesteps} draws from the first timesteps alone, where there is hardly any "
                "noise and little to forget. Files of unlearn_diff 2 say 1, which was not used there; leave the key out"
            )


class TrainConfig(ImageTrainingKeys):
    """Stage 2: masked fine-tuning."""

    MODULE: ClassVar[str] = TRAIN_MODULE
    without_effect: ClassVar[tuple[str, ...]] = ("start_guidance", "negative_guidance", "ddim_steps")
    gone: ClassVar[Mapping[str, str]] = {
        **ImageTrainingKeys.gone,
        "optimizer": "adam",
        "mask_seed": "0",
        "mask_pool": "unet",
    }

    masking: str = setting(
        "saliency",
        "saliency: the mask at mask_path. random: a random mask of the same sparsity, a control. none: all weights.",
        choices=("saliency", "random", "none"),
    )
    mask_path: str | None = setting(
        MASKS,
        "masking saliency: a mask file, or a folder, of which the newest mask of this concept is taken.",
        kind="path",
    )
    threshold: float | None = setting(
        None,
        "masking saliency, with a folder of masks: take one of this threshold; null: the newest of this concept.",
        gt=0,
        le=1,
    )
    random_fraction: float = setting(
        _RANDOM_FRACTION,
        "masking random: fraction of all weights of the UNet in the mask, which is drawn with seed.",
        gt=0,
        le=1,
    )
    objective: str = setting(
        "salun",
        "What is minimised. salun: the forgotten prompt shall predict what its substitute does, and the retained "
        "images keep their loss. Controls, without alpha and target: ascent, minus the diffusion loss of the images "
        "to forget; retain, the diffusion loss of those to retain.",
        choices=("salun", "ascent", "retain"),
    )
    alpha: float = setting(
        0.5,
        "objective salun: weight of the retain term, as in the paper: more of it keeps more. In unlearn_diff 2 alpha "
        "weighed the forget term, so that more of it forgot more.",
        ge=0,
        le=1_000_000,
    )
    target: str = setting(
        "current",
        "objective salun: which model predicts for the substitute prompt: the current one, without gradient, "
        "or the frozen original.",
        choices=("current", "frozen"),
    )
    retain_target: str = setting(
        "noise",
        "What the images to retain are to give. noise: the noise that was added, as the paper's. frozen: what the "
        "frozen original predicts, which disturbs less of what is kept, for one more prediction a step.",
        choices=("noise", "frozen"),
    )
    retain_batch_size: int | None = setting(
        None, "Images to retain in a step; null: as many as batch_size.", ge=1, le=100_000
    )
    output_dir: str = setting(f"{OUTPUTS}/finetuned_models", "The run's folder is made in it.", kind="path")

    @classmethod
    def of_another(cls, name: str) -> str | None:
        known = {key.name for key in keys_of(MaskConfig)}
        return "It is a key of mask, which comes first; leave it out here." if name in known else None

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        if self.masking == "saliency" and self.mask_path is None:
            yield (
                ("mask_path", "masking"),
                f"masking saliency needs a mask; this makes one: {mask_command(self)}",
            )
        if (
            self.masking == "random"
            and self.threshold not in (None, _RANDOM_FRACTION)
            and self.random_fraction == _RANDOM_FRACTION
        ):  # as files of earlier versions have it
            yield (
                ("threshold", "masking"),
                f"threshold chooses among saliency masks; for a random mask of this size set random_fraction: "
                f"{self.threshold}, and leave threshold out",
            )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if (
            self.masking == "saliency"
            and self.mask_path is not None
            and not _has_mask(resolve_path(self.mask_path))
        ):
            yield (
                ("mask_path", "masking", "template", "template_name"),
                f"there is no mask at {self.mask_path}; make it: {mask_command(self)}"
                + (" (then leave mask_path out)" if _is_mask_file(self.mask_path) else ""),
            )


def mask_command(config: TrainConfig) -> str:
    """The command that makes the mask of this concept, where `config` looks for it."""
    shared = {key.name for key in keys_of(DataKeys)} - {"output_dir"}
    values: dict[str, object] = {key: value for key, value in as_dict(config).items() if key in shared}
    if config.threshold is not None:
        values["threshold"] = config.threshold
    if config.mask_path is not None and not _is_mask_file(config.mask_path):
        values["output_dir"] = config.mask_path
    return command_line(MASK_MODULE, MaskConfig, values)


def _is_mask_file(path: str) -> bool:
    """Whether a path is that of a mask, which has another name when it is made here, and of no folder of masks."""
    return Path(path).suffix in _MASK_SUFFIXES


def _has_mask(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and next(path.rglob("mask_*.safetensors"), None) is not None)
