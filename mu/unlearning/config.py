"""The keys that methods share: which model and weights, which concept and images, how it computes, what is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mu.bars import waiting
from mu.config import Config, resolve_path, setting
from mu.datasets.base import RETAIN_SETS
from mu.datasets.data_sets import DATASETS, data_set_of, described
from mu.datasets.index import concept_names
from mu.devices import DEVICES_PATTERN, devices_problem, resolve_devices
from mu.run_folder import writable_problem
from mu.unlearning.find_checkpoint import (
    SD_CHECKPOINT,
    Problem,
    checkpoint_file,
    checkpoint_problems,
    model_config_problems,
)

if TYPE_CHECKING:
    from mu.ldm import LatentDiffusion

_log = logging.getLogger(__name__)
OUTPUTS = "outputs/saliency_unlearning"
SD_MODEL_CONFIG = "package:algorithms/saliency_unlearning/configs/model_config.yaml"
EMOJI_CHECKPOINT = "package:assets/emoji_canvas/model.safetensors"
EMOJI_MODEL_CONFIG = "package:assets/emoji_canvas/model_config.yaml"
SAMPLE_PRECISIONS = ("auto", "fp32", "bf16")
PRECISIONS = ("auto", "fp32", "tf32", "bf16-mixed")
PRECISION_HELP = (
    "Arithmetic of the UNet: fp32; tf32, products of factors rounded to 10 bits, on GPUs that have it; bf16-mixed, "
    "fp32 weights computed with in bf16. Files keep their own type."
)

_TIME = ("out.", "time_embed.")
_SELF_LAYERS = ("input_blocks.4.", "input_blocks.7.")
_CROSS_LAYERS = ("output_blocks.6.", "output_blocks.8.")
IN_METHOD: dict[str, Callable[[str], bool]] = {
    "full": lambda _: True,
    "notime": lambda name: not name.startswith(_TIME),
    "noxattn": lambda name: not name.startswith(_TIME) and "attn2" not in name.split("."),
    "selfattn": lambda name: "attn1" in name.split("."),
    "xattn": lambda name: "attn2" in name.split("."),
    "selflayer": lambda name: name.startswith(_SELF_LAYERS) and "attn1" in name.split("."),
    "xlayer": lambda name: name.startswith(_CROSS_LAYERS) and "attn2" in name.split("."),
}
"""Train method -> whether it moves the parameter of this UNet-relative name."""
TRAIN_METHODS = tuple(IN_METHOD)
TRAIN_METHOD_HELP = (
    "full: all; notime: without out and time_embed; noxattn: these also without cross-attention; selfattn, xattn: "
    "self- or cross-attention alone; selflayer: self-attention of input blocks 4 and 7; xlayer: cross-attention of "
    "output blocks 6 and 8."
)


class ModelKeys(Config):
    """Which model, and where it runs."""

    ckpt_path: str = setting(
        SD_CHECKPOINT,
        "CompVis checkpoint (.ckpt, .pth, .safetensors), a diffusers folder or file, the folder of a training run, or "
        "a folder of runs, whose newest is taken. `package:` before a path means a file of the installed package.",
        kind="path",
    )
    model_config_path: str = setting(
        SD_MODEL_CONFIG,
        "CompVis YAML with the structure of that model; the default is SD v1's. Packaged beside it: sd_v2_base.yaml "
        "(512 px) and sd_v2_v.yaml (768 px).",
        kind="path",
    )
    use_ema: bool = setting(
        False,
        "Take the EMA copy of the UNet in the checkpoint, not its raw weights; an error where it has none.",
    )
    devices: str = setting(
        "0",
        "CUDA device number such as 0, or cpu; several with commas, 0,1 or cpu,cpu, are as many processes that share "
        "the work, see docs/running.md. Without CUDA the run is on the CPU, and says so.",
        pattern=DEVICES_PATTERN,
    )

    deterministic: bool = setting(
        False,
        "The same bits each time on a GPU too: torch, cuDNN and cuBLAS take kernels that give them, which may be "
        "slower. On a CPU it is so without.",
    )

    def checkpoint(self) -> Path:
        """The file that `ckpt_path` leads to."""
        return checkpoint_file(self.ckpt_path)

    def _checkpoint_problems(self) -> Iterator[Problem]:
        return checkpoint_problems("ckpt_path", self.ckpt_path)

    def disk_problems(self) -> Iterator[Problem]:
        yield from self._checkpoint_problems()
        if (problem := devices_problem(self.devices)) is not None:
            yield ("devices",), problem
        yield from model_config_problems(self.model_config_path)


def model_of(config: ModelKeys) -> LatentDiffusion:
    """The model that `ckpt_path`, `model_config_path` and `devices` name, in eval mode.

    Raises:
        CheckpointError, ModelConfigError, DeviceError: see `mu.ldm.load_model` and `mu.devices.resolve_devices`.
    """
    from mu.ldm import load_model

    checkpoint, device = config.checkpoint(), resolve_devices(config.devices)
    _log.info("loading %s on %s", checkpoint, device)
    with waiting(f"reading {checkpoint.name}"):
        return load_model(
            resolve_path(config.model_config_path), checkpoint, device=device, use_ema=config.use_ema
        )


class ConceptKeys(ModelKeys):
    """What is forgotten, and how images are sampled."""

    template: str = setting(
        "style",
        "Kind of concept that is forgotten: style or object; i2p goes with dataset_type i2p. For generic, folder "
        "and forget_prompts it only names the run and its mask.",
        choices=("style", "object", "i2p"),
    )
    template_name: str | tuple[str, ...] = setting(
        "Abstractionism",
        "Name of the forgotten style or object, as its folder is called, or of the category; several are forgotten "
        "together. For folder and forget_prompts: a name of your choice for the run and its mask.",
        kind="name",
    )
    image_size: int | None = setting(
        None, "Side of the images in pixels; null: what the model was made for.", ge=8, le=4096, multiple_of=8
    )
    sample_steps: int = setting(50, "DDIM steps of a sampled image.", ge=1, le=1000)
    guidance_scale: float = setting(
        7.5, "Classifier-free guidance of sampled images; 1 is none.", ge=0, le=100
    )
    sample_precision: str = setting(
        "auto",
        "Arithmetic of sampled images and of pictures: fp32; bf16, faster, whose images differ a little and are kept "
        "beside the others; auto: bf16 on a GPU that computes in it, else fp32.",
        choices=SAMPLE_PRECISIONS,
    )

    @property
    def concepts(self) -> tuple[str, ...]:
        """`template_name` as a tuple."""
        return concept_names(self.template_name)


class RunKeys(ConceptKeys):
    """Where a run goes."""

    output_dir: str = setting(OUTPUTS, "The run's folder is made in it.", kind="path")

    def doubts(self) -> Iterator[str]:
        """What is allowed and seldom meant; a run warns of it, and a plan."""
        yield from ()

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem


class ComputeKeys(RunKeys):
    """How the UNet computes in both stages; docs/running.md says what each key costs and what is chosen by itself."""

    AUTO_PRECISION: ClassVar[str] = "bf16-mixed"
    """What precision auto is on a GPU that has it."""
    gone: ClassVar[Mapping[str, str]] = {"sharding": "none"}

    seed: int = setting(0, "Seed of every random number of the run.", ge=0, lt=2**32)
    precision: str = setting(
        "auto",
        f"{PRECISION_HELP} auto: bf16-mixed on a GPU that has it, else fp32.",
        choices=PRECISIONS,
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


class OutputKeys(RunKeys):
    """What a run writes of the unlearned model, and which pictures it takes before and after."""

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
        "Also write model.patch.safetensors, only what changed: with it, unlearn_diff patch makes the unlearned "
        "checkpoint from the original, and the original from the unlearned one.",
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


class DataKeys(ConceptKeys):
    """The images of what is forgotten and of what is kept."""

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "forget_prompts": ("styles", "objects"),
        "styles": ("forget_prompts", "retain_prompts"),
        "objects": ("forget_prompts", "retain_prompts"),
    }

    dataset_type: str = setting("unlearncanvas", described(), choices=tuple(DATASETS))
    substitute: str | None = setting(
        None,
        "What forgotten prompts shall give instead: another style or object by name, or a whole prompt with {object} "
        "or {style}. null: the next style or object of the list that is kept (after the last, the first); for a style "
        "of unlearncanvas, the photo; for i2p, the category's own prompt (docs/data.md); for folder and "
        "forget_prompts, the only one of retain_prompts. generic needs one.",
    )
    raw_dataset_dir: str | None = setting(
        "data/quick-canvas-dataset/sample",
        "Folder of the images (folder: of those to forget); not used by generated.",
        kind="path",
    )
    retain_dataset_dir: str | None = setting(None, "folder: folder of the images to retain.", kind="path")
    retain_set: str | None = setting(
        None,
        "What is retained. others: the other styles, objects or categories; for folder, retain_dataset_dir. "
        "seed_images: the images in Seed_Images (i2p, generic: images/Seed_Images). generated: images sampled from the "
        "model for retain_prompts. null: seed_images for i2p, else others.",
        choices=RETAIN_SETS,
    )
    forget_prompts: tuple[str, ...] | None = setting(
        None,
        "generated: prompts that are forgotten, instead of a grid; {concept} in one is each name of template_name, and "
        "in its substitute prompt what substitute says. folder: the prompt of all images to forget; null: "
        "texts beside the images, 7.txt for 7.jpg, or metadata.csv or .jsonl (file_name, text). A YAML list, or one.",
        split=False,
    )
    retain_prompts: tuple[str, ...] | None = setting(
        None,
        "Prompts whose images are sampled and retained, with forget_prompts and retain_set generated (null for i2p: "
        "the substitute). folder, and seed_images of i2p and generic: the prompt of all images to retain; null: "
        "texts beside the images. A YAML list, or one.",
        split=False,
    )
    processed_dataset_dir: str = setting(
        "data/processed", "Folder for sampled images, cached latents and lists of what was used.", kind="path"
    )
    use_sample: bool = setting(
        True,
        "unlearncanvas: take only the first 3 images of each class in each style, as the sample data set has.",
    )
    missing_images: str | None = setting(
        None,
        "i2p, generic: skip passes over rows of the table that have no image, and says so; error stops. null: skip.",
        choices=("skip", "error"),
    )
    styles: tuple[str, ...] | None = setting(
        None, "generated: styles of the grid; null: EmojiCanvas' seven.", kind="name"
    )
    objects: tuple[str, ...] | None = setting(
        None, "generated: objects of the grid; null: EmojiCanvas' twelve.", kind="name"
    )
    images_per_prompt: int = setting(
        5, "generated: images sampled for each forgotten prompt.", ge=1, le=100_000
    )
    retain_images_per_prompt: int = setting(2, "Images sampled for each retained prompt.", ge=1, le=100_000)

    def conflicts(self) -> Iterator[Problem]:
        yield from data_set_of(self).conflicts()

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        yield from data_set_of(self).disk_problems()
        if (problem := writable_problem(self.processed_dataset_dir)) is not None:
            yield ("processed_dataset_dir",), problem
