"""The keys of methods that train: how the network is trained, what a run shows and sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import ClassVar

from mu.config import setting
from mu.unlearning.config import TRAIN_METHOD_HELP, TRAIN_METHODS, ComputeKeys, DataKeys, OutputKeys
from mu.unlearning.find_checkpoint import Problem

RESUME_NEWEST = "newest"

SHOW_UNSAFE_HELP = (
    "report.html of a concept of template i2p: show its pictures; else they are blurred in the file."
)


class TrainingKeys(ComputeKeys, OutputKeys):
    """How the weights that may move are trained, and what the run shows of it."""

    MODULE: ClassVar[str]
    """The command that does it."""
    gone: ClassVar[Mapping[str, str]] = {
        **ComputeKeys.gone,
        "validation_draws": "32",
        "wandb_unsafe_pictures": "false",
    }

    train_method: str = setting(
        "full",
        f"Which UNet weights may move. {TRAIN_METHOD_HELP}",
        choices=TRAIN_METHODS,
    )
    lr: float = setting(1e-5, "Learning rate of Adam.", gt=0, le=1)
    lr_schedule: str = setting(
        "constant",
        "constant, as the paper's; linear: the learning rate falls in equal steps, and would be 0 after the last.",
        choices=("constant", "linear"),
    )
    batch_size: int = setting(8, "Images to forget in a step.", ge=1, le=100_000)
    micro_batch_size: int | None = setting(
        None,
        "How many of each part of the batch, forget and retain, go through the UNet at once; the step is that of the "
        "whole batch, to rounding. null: all of it. It is halved when memory runs out.",
        ge=1,
        le=100_000,
    )
    sample_every_steps: int | None = setting(
        None, "Also take these pictures every so many steps, into pictures/step_*.png; null: do not.", ge=1
    )
    validate_every_steps: int | None = setting(
        None,
        "Before the first step and every so many steps, the losses on fixed inputs, timesteps and noise, into "
        "validation.csv; null: do not. Neither this nor the pictures changes what is trained.",
        ge=1,
    )
    checkpoint_every_steps: int | None = setting(
        None,
        "Write a checkpoint of the run after every so many steps; null: only as checkpoint_every_minutes says. A run "
        "that is asked to stop (Ctrl-C, SIGTERM) always writes one. When the run is done, they are removed.",
        ge=1,
    )
    checkpoint_every_minutes: float | None = setting(
        10.0,
        "Write a checkpoint when the last is so old, or the run, at the end of a step; null: never.",
        gt=0,
    )
    keep_checkpoints: int = setting(
        2,
        "How many checkpoints of the run are kept; an older one goes when a newer one has been read back.",
        ge=1,
    )
    resume: str | None = setting(
        None,
        "Go on with a run that stopped early: its folder (then from the newest checkpoint that is whole), a checkpoint "
        "file, or newest, the newest checkpoint of a run with these settings in output_dir.",
        kind="path",
    )
    logger: str | None = setting(
        None,
        "Where the losses of each step, validation losses and pictures go beside the run's own files. wandb: Weights & "
        "Biases. tensorboard: tensorboard/ in the run's folder (needs the package). none: nowhere. null: wandb where "
        "the key wandb or the environment variable WANDB_MODE asks for it, else none.",
        choices=("none", "wandb", "tensorboard"),
    )
    wandb: str | None = setting(
        None,
        "Weights & Biases. online without a key, network or terminal becomes offline, with one warning. null: what "
        "WANDB_MODE says; where that is not set, online with logger wandb, else off. WANDB_MODE=offline and disabled "
        "also hold for online.",
        choices=("off", "offline", "online"),
    )
    wandb_project: str = setting("saliency-unlearning", "Project there.", kind="name")
    report: bool = setting(
        True, "The command train also writes report.html, one file with curves and pictures."
    )
    show_unsafe_pictures: bool = setting(False, SHOW_UNSAFE_HELP)

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        if self.logger == "wandb" and self.wandb == "off":
            yield ("logger", "wandb"), "wandb is off; leave one of the two keys out"
        elif self.logger in ("none", "tensorboard") and self.wandb in ("offline", "online"):
            yield (
                ("logger", "wandb"),
                f"{self.logger} is not Weights & Biases, which wandb {self.wandb} asks for; set wandb: off, or leave "
                "logger out",
            )
        if self.sample_every_steps is not None and self.sample_prompts == ():
            yield (
                ("sample_every_steps", "sample_prompts"),
                "there are no prompts to sample; leave sample_prompts out, or name some",
            )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.logger == "tensorboard" and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
            yield ("logger",), "tensorboard needs the package of that name: pip install tensorboard"


class ImageTrainingKeys(TrainingKeys, DataKeys):
    """The keys of a method that trains on images; with a retain term it has a key `retain_batch_size` too."""

    epochs: int = setting(5, "Passes over the images to forget.", ge=1, le=1_000_000)
