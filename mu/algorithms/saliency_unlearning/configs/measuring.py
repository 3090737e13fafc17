"""The keys of sampling, evaluation and the whole table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mu.algorithms.saliency_unlearning.configs.concept import (
    EMOJI_CHECKPOINT,
    EMOJI_MODEL_CONFIG,
    OUTPUTS,
    PACKAGED,
    ModelKeys,
    Problem,
    checkpoint_file,
    checkpoint_problems,
    file_problems,
)
from mu.algorithms.saliency_unlearning.configs.unlearning import MaskConfig, TrainConfig
from mu.config import Config, ConfigError, load_config, nearest, resolve_path, setting
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.index import concept_names
from mu.devices import DEVICES_PATTERN
from mu.run_folder import writable_problem

# The second classifier: neither the data nor the recipes were made with it.
SCORE_CLASSIFIER = "package:assets/emoji_canvas/classifier_score.safetensors"
SEEDS = (188, 288, 588, 688, 888)
_SEEDS_HELP = "Seeds of the images of each prompt; from 1000000 on they belong to training."


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelKeys):
    """Images from a checkpoint."""

    prompts: tuple[str, ...] = setting(
        (), "Prompts: one, or a YAML list (commas do not separate them).", split=False, may_be_empty=True
    )
    prompts_path: str | None = setting(
        None, "Text file with one prompt a line, instead of prompts.", kind="path"
    )
    seeds: tuple[int, ...] = setting((188,), "Seeds of the images of each prompt.", ge=0, lt=2**32)
    sample_steps: int = setting(50, "DDIM steps.", ge=1, le=1000)
    guidance_scale: float = setting(7.5, "Classifier-free guidance; 1 is none.", ge=0, le=100)
    eta: float = setting(0.0, "Noise of DDIM: 0 deterministic, 1 as DDPM.", ge=0, le=1)
    batch_size: int = setting(
        8, "Images sampled at once; memory and speed, not the images.", ge=1, le=100_000
    )
    grid: bool = setting(True, "Also write all images in one picture, a row a prompt.")
    output_dir: str = setting(f"{OUTPUTS}/samples", "The run's folder is made in it.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        if bool(self.prompts) == (self.prompts_path is not None):
            yield ("prompts", "prompts_path"), "give prompts or prompts_path, one of the two"

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.prompts_path is not None and not self.prompts:
            try:
                self.all_prompts()
            except ConfigError as error:
                yield ("prompts_path",), error.mistakes[0].partition(": ")[2]
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem

    def all_prompts(self) -> tuple[str, ...]:
        """The prompts, from the key or from the lines of the file. Raises ConfigError when the file has none."""
        if self.prompts_path is None:
            return self.prompts
        path = resolve_path(self.prompts_path)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"prompts_path: {path} cannot be read as text ({error})"]) from error
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise ConfigError([f"prompts_path: {path} has no prompt; write one a line"])
        return prompts


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelKeys):
    """What a checkpoint forgot and what it kept, on the grid of styles x objects."""

    ckpt_path: str = setting(
        EMOJI_CHECKPOINT,
        "Checkpoint to measure, or the folder of a training run, or a folder of runs, of which the newest that forgot "
        "this concept is taken.",
        kind="path",
    )
    base_ckpt_path: str | None = setting(
        None, "Checkpoint before unlearning, measured beside it on the same prompts and seeds.", kind="path"
    )
    model_config_path: str = setting(
        EMOJI_MODEL_CONFIG, "CompVis YAML with the structure of both models.", kind="path"
    )
    template: str = setting("style", "Kind of the forgotten concept.", choices=("style", "object"))
    template_name: str | tuple[str, ...] = setting(
        "Noto", "Name of the forgotten concept, or of several that were forgotten together.", kind="name"
    )
    styles: tuple[str, ...] | None = setting(
        None, "Styles of the grid; null: EmojiCanvas' seven.", kind="name"
    )
    objects: tuple[str, ...] | None = setting(
        None, "Objects of the grid; null: EmojiCanvas' twelve.", kind="name"
    )
    seeds: tuple[int, ...] = setting(SEEDS, _SEEDS_HELP, ge=0, lt=1_000_000)
    sample_steps: int = setting(20, "DDIM steps.", ge=1, le=1000)
    guidance_scale: float = setting(7.5, "Classifier-free guidance; 1 is none.", ge=0, le=100)
    batch_size: int = setting(
        32, "Images sampled at once; memory and speed, not the images.", ge=1, le=100_000
    )
    precision: str = setting(
        "fp32",
        "Arithmetic of sampling; bf16 is faster, its images differ a little.",
        choices=("fp32", "bf16"),
    )
    classifier_path: str = setting(
        SCORE_CLASSIFIER, "Classifier with a style and an object head that scores the images.", kind="path"
    )
    output_dir: str = setting(f"{OUTPUTS}/evaluations", "The run's folder is made in it.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        names = (self.styles or STYLES) if self.template == "style" else (self.objects or OBJECTS)
        unknown = [name for name in concept_names(self.template_name) if name not in names]
        for name in unknown[:1]:
            message = f"there is no {self.template} {name!r}; the grid has: {', '.join(names)}."
            yield ("template_name", "template", "styles", "objects"), message + nearest(name, names)

    def checkpoint(self) -> Path:
        """The file that `ckpt_path` leads to."""
        return checkpoint_file(self.ckpt_path, template=self.template, template_name=self.template_name)

    def _checkpoint_problems(self) -> Iterator[Problem]:
        return checkpoint_problems(
            "ckpt_path", self.ckpt_path, template=self.template, template_name=self.template_name
        )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.base_ckpt_path is not None:
            yield from file_problems(
                "base_ckpt_path", self.base_ckpt_path, advice="give the model before training"
            )
        yield from _classifier_problems(self.classifier_path)
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Config):
    """Every concept of EmojiCanvas in turn: mask, unlearning, evaluation; a row each of one table."""

    concepts: tuple[str, ...] | None = setting(
        None, "Styles and objects to forget, one after the other; null: all.", kind="name"
    )
    style_mask: str = setting("emoji_canvas/mask_style.yaml", "Recipe of the mask of a style.", kind="path")
    style_train: str = setting("emoji_canvas/train_style.yaml", "Recipe of forgetting a style.", kind="path")
    object_mask: str = setting(
        "emoji_canvas/mask_object.yaml", "Recipe of the mask of an object.", kind="path"
    )
    object_train: str = setting(
        "emoji_canvas/train_object.yaml", "Recipe of forgetting an object.", kind="path"
    )
    seeds: tuple[int, ...] = setting(SEEDS, _SEEDS_HELP, ge=0, lt=1_000_000)
    sample_steps: int = setting(20, "DDIM steps of the images that are scored.", ge=1, le=1000)
    guidance_scale: float = setting(7.5, "Classifier-free guidance of these images; 1 is none.", ge=0, le=100)
    batch_size: int = setting(
        32, "Images sampled at once; memory and speed, not the images.", ge=1, le=100_000
    )
    precision: str = setting(
        "fp32",
        "Arithmetic of sampling; bf16 is faster, its images differ a little.",
        choices=("fp32", "bf16"),
    )
    classifier_path: str = setting(SCORE_CLASSIFIER, "Classifier that scores the images.", kind="path")
    devices: str = setting("0", "CUDA device number such as 0, or cpu.", pattern=DEVICES_PATTERN)
    resume: bool = setting(
        True,
        "Keep what output_dir already has and the same settings made; false: unlearn every concept anew.",
    )
    output_dir: str = setting(f"{OUTPUTS}/benchmark", "Folder of the table and of all its runs.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        for name in self.concepts or ():
            if name not in STYLES + OBJECTS:
                known = ", ".join(STYLES + OBJECTS)
                yield ("concepts",), f"{name!r} is not one of: {known}.{nearest(name, STYLES + OBJECTS)}"

    def disk_problems(self) -> Iterator[Problem]:
        recipes: tuple[tuple[str, type[Config]], ...] = (
            ("style_mask", MaskConfig),
            ("style_train", TrainConfig),
            ("object_mask", MaskConfig),
            ("object_train", TrainConfig),
        )
        for key, cls in recipes:
            try:
                load_config(cls, config_path=getattr(self, key), packaged=PACKAGED)
            except ConfigError as error:
                for mistake in error.mistakes:
                    yield (key,), mistake
        yield from _classifier_problems(self.classifier_path)
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem


def _classifier_problems(path: str) -> Iterator[Problem]:
    return file_problems("classifier_path", path, advice="leave the key out for EmojiCanvas' own classifier")
