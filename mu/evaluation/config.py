"""The keys of sampling and evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mu.config import Config, ConfigError, nearest, resolve_path, setting
from mu.datasets.canvas import UNLEARN_CANVAS_OBJECTS, UNLEARN_CANVAS_STYLES
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.index import DataError, concept_names
from mu.datasets.prompt_table import Case, PromptTable, read_prompt_table
from mu.datasets.tables import read_text
from mu.evaluation.quality_config import QualityKeys
from mu.run_folder import writable_problem
from mu.unlearning.config import (
    EMOJI_CHECKPOINT,
    EMOJI_MODEL_CONFIG,
    OUTPUTS,
    SAMPLE_PRECISIONS,
    ModelKeys,
)
from mu.unlearning.find_checkpoint import (
    Problem,
    absence,
    checkpoint_file,
    checkpoint_problems,
    file_problems,
    is_checkpoint,
)
from mu.unlearning.training_config import SHOW_UNSAFE_HELP

# The second classifier: neither the data nor the recipes were made with it.
SCORE_CLASSIFIER = "package:assets/emoji_canvas/classifier_score.safetensors"
SEEDS = (188, 288, 588, 688, 888)
_PRECISION_HELP = (
    "Arithmetic of sampling: fp32; bf16, faster, whose images differ a little; auto: bf16 on a GPU that computes in "
    "it, else fp32."
)


class SampleConfig(ModelKeys):
    """Images from a checkpoint."""

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompts": ("prompts_path",),
        "prompts_path": ("prompts",),
    }

    prompts: tuple[str, ...] = setting(
        (), "Prompts: one, or a YAML list (commas do not separate them).", split=False, may_be_empty=True
    )
    prompts_path: str | None = setting(
        None,
        "Instead of prompts: a text file with one prompt a line, or a .csv with the columns prompt and, as they are "
        "there, case_number (or image_id), evaluation_seed (or sd_seed), evaluation_guidance (or sd_guidance_scale).",
        kind="path",
    )
    use_row_settings: bool = setting(
        True,
        "prompts_path .csv: a row's own seed and guidance are used where it has them; false: seeds and "
        "guidance_scale are, for every row.",
    )
    seeds: tuple[int, ...] = setting((188,), "Seeds of the images of each prompt.", ge=0, lt=2**32)
    sample_steps: int = setting(50, "DDIM steps.", ge=1, le=1000)
    guidance_scale: float = setting(7.5, "Classifier-free guidance; 1 is none.", ge=0, le=100)
    eta: float = setting(0.0, "Noise of DDIM: 0 deterministic, 1 as DDPM.", ge=0, le=1)
    image_size: int | None = setting(
        None, "Side of the images in pixels; null: what the model was made for.", ge=8, le=4096, multiple_of=8
    )
    batch_size: int = setting(
        8, "Images sampled at once; memory and speed, not the images.", ge=1, le=100_000
    )
    precision: str = setting("auto", _PRECISION_HELP, choices=SAMPLE_PRECISIONS)
    grid: bool = setting(True, "Also write all images in one picture, a row a prompt.")
    run_name: str | None = setting(
        None,
        "Name of the run's folder. A folder that is there is gone on with: its images are kept, and those that are "
        "missing are sampled. null: a new folder for each run.",
        kind="name",
    )
    output_dir: str = setting(f"{OUTPUTS}/samples", "The run's folder is made in it.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        if bool(self.prompts) == (self.prompts_path is not None):
            yield ("prompts", "prompts_path"), "give prompts or prompts_path, one of the two"

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.prompts_path is not None and not self.prompts:
            try:
                self.cases()
            except ConfigError as error:
                yield ("prompts_path",), error.mistakes[0].partition(": ")[2]
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem

    def cases(self) -> tuple[Case, ...]:
        """The cases of `prompt_table`."""
        return self.prompt_table().cases

    def prompt_table(self) -> PromptTable:
        """The prompts, from the key or from the file, each with the number that its files begin with.

        Raises ConfigError when the file cannot be read, has no prompt, or has wrong rows.
        """
        if self.prompts_path is None:
            return PromptTable(_numbered(self.prompts))
        path = resolve_path(self.prompts_path)
        if not path.is_file():
            lacking = absence(path, self.prompts_path)
            raise ConfigError([f"prompts_path: {lacking}; give a .txt or .csv file of prompts"])
        if path.suffix.lower() == ".csv":
            try:
                return read_prompt_table(path, use_row_settings=self.use_row_settings)
            except DataError as error:
                raise ConfigError([f"prompts_path: {error}"]) from error
        try:
            lines = re.split(r"\r\n?|\n", read_text(path))
        except DataError as error:
            raise ConfigError([f"prompts_path: {error}"]) from error
        prompts = tuple(" ".join(line.split()) for line in lines if line.strip())
        if not prompts:
            raise ConfigError([f"prompts_path: {path} has no prompt; write one a line"])
        return PromptTable(_numbered(prompts))


def base_problems(path: str | None) -> Iterator[Problem]:
    """Whether there is no model at `base_ckpt_path`; None is none, and right."""
    if path is not None and not is_checkpoint(resolve_path(path)):
        yield from file_problems("base_ckpt_path", path, advice="give the model before training")


class DrawnKeys(Config):
    """How the images that are scored are sampled, and the file of the classifier that scores them."""

    seeds: tuple[int, ...] = setting(
        SEEDS,
        "Seeds of the images of each prompt; from 1000000 on they belong to training.",
        ge=0,
        lt=1_000_000,
    )
    sample_steps: int = setting(20, "DDIM steps of the images that are scored.", ge=1, le=1000)
    guidance_scale: float = setting(7.5, "Classifier-free guidance of these images; 1 is none.", ge=0, le=100)
    batch_size: int = setting(
        32, "Images sampled at once; memory and speed, not the images.", ge=1, le=100_000
    )
    precision: str = setting("auto", _PRECISION_HELP, choices=SAMPLE_PRECISIONS)
    classifier_path: str = setting(
        SCORE_CLASSIFIER, "Classifier with a style and an object head that scores the images.", kind="path"
    )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        yield from file_problems(
            "classifier_path",
            self.classifier_path,
            advice="leave the key out for EmojiCanvas' own classifier",
        )


class ScoringKeys(DrawnKeys):
    """How images are sampled and scored, and how the scores are read."""

    cra_prompts: str = setting(
        "retained",
        "Of which prompts CRA is counted; retained: all but those of the forgotten concept; all: these too.",
        choices=("retained", "all"),
    )
    left_out: tuple[str, ...] = setting(
        (),
        "Styles and objects whose images do not count in any score, as Seed_Images in some readings of the protocol.",
        kind="name",
        may_be_empty=True,
    )

    def _left_out_problems(
        self, styles: Sequence[str], objects: Sequence[str], *, forgotten: Sequence[str]
    ) -> Iterator[Problem]:
        """Names that are not on the grid, or without which a concept could not be scored."""
        keys = ("left_out", "styles", "objects", "concepts", "template_name")
        grid = (*styles, *objects)
        for kind, names in (("style", styles), ("object", objects)):
            if self.left_out and len(set(names) - set(self.left_out)) < 2:
                yield keys, f"fewer than two {kind}s would be counted; leave out fewer"
        for name in self.left_out:
            if name not in grid:
                message = f"{name!r} is not on the grid, which has: {', '.join(grid)}.{nearest(name, grid)}"
                yield keys, message
            elif name in forgotten:
                yield keys, f"{name!r} is forgotten and must be counted; leave out others, or forget others"


class EvaluateConfig(QualityKeys, ScoringKeys, ModelKeys):
    """What a checkpoint, or a folder of images, forgot and what it kept, on the grid of styles x objects."""

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ckpt_path": ("images_dir", "base_images_dir"),
        "base_ckpt_path": ("base_images_dir",),
        "base_images_dir": ("base_ckpt_path",),
    }

    ckpt_path: str = setting(
        EMOJI_CHECKPOINT,
        "Checkpoint to measure, or the folder of a training run, or a folder of runs, of which the newest that forgot "
        "this concept is taken.",
        kind="path",
    )
    base_ckpt_path: str | None = setting(
        None, "Checkpoint before unlearning, measured beside it on the same prompts and seeds.", kind="path"
    )
    images_dir: str | None = setting(
        None,
        "Measure these images, all that are there, instead of ckpt_path's: <Style>/<Object>/<seed>.png, "
        "<Style>_<Object>_seed<seed>.png (also in folders <Style>), or a folder of the command sample; with classifier "
        "none, any images.",
        kind="path",
    )
    base_images_dir: str | None = setting(
        None, "Likewise instead of base_ckpt_path, of the same styles, objects and seeds.", kind="path"
    )
    model_config_path: str = setting(
        EMOJI_MODEL_CONFIG, "CompVis YAML with the structure of both models.", kind="path"
    )
    template: str = setting("style", "Kind of the forgotten concept.", choices=("style", "object"))
    template_name: str | tuple[str, ...] = setting(
        "Noto", "Name of the forgotten concept, or of several that were forgotten together.", kind="name"
    )
    styles: tuple[str, ...] | None = setting(
        None,
        "Styles of the grid; null: EmojiCanvas' seven, with classifier unlearn_canvas its 51, and of images_dir those "
        "that are there.",
        kind="name",
    )
    objects: tuple[str, ...] | None = setting(
        None,
        "Objects of the grid; null: as of styles, EmojiCanvas' twelve or UnlearnCanvas' 20.",
        kind="name",
    )
    report: bool = setting(True, "Also write report.html, one file with numbers, pictures and settings.")
    show_unsafe_pictures: bool = setting(False, SHOW_UNSAFE_HELP)
    output_dir: str = setting(f"{OUTPUTS}/evaluations", "The run's folder is made in it.", kind="path")

    def all_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The styles and objects of the grid; of images_dir, those that may be there."""
        styles, objects = STYLES, OBJECTS
        if self.classifier == "unlearn_canvas":
            styles, objects = UNLEARN_CANVAS_STYLES, UNLEARN_CANVAS_OBJECTS
        return self.styles or styles, self.objects or objects

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        if self.base_ckpt_path is not None and self.base_images_dir is not None:
            yield ("base_ckpt_path", "base_images_dir"), "give one of the two"
        if self.base_images_dir is not None and self.images_dir is None:
            yield (
                ("base_images_dir", "images_dir"),
                "goes with images_dir; for a checkpoint give base_ckpt_path",
            )
        needed = {
            "base": ("base_ckpt_path", "base_images_dir"),
            "base_other_seeds": ("base_ckpt_path",),
        }.get(self.fid_reference, ())
        if needed and all(getattr(self, key) is None for key in needed):
            yield ("fid_reference", *needed), f"{self.fid_reference} needs {' or '.join(needed)}"
        if self.fid_reference == "base_other_seeds" and (
            same := set(self.seeds) & set(self.fid_reference_seeds)
        ):
            yield ("fid_reference_seeds", "seeds"), f"both have {min(same)}; the reference's must be others"
        if self.classifier == "none" and self.images_dir is not None:
            if self.base_ckpt_path is not None:
                cure = "give base_images_dir"
                if not needed:
                    cure += ", or --base_ckpt_path null"
                yield (
                    ("base_ckpt_path", "classifier"),
                    f"without a classifier, images_dir says no styles and objects; {cure}",
                )
            return
        styles, objects = self.all_names()
        if ":" not in self.classifier or (self.styles and self.objects):
            yield from self._concept_problems(styles, objects)

    def _concept_problems(self, styles: tuple[str, ...], objects: tuple[str, ...]) -> Iterator[Problem]:
        yield from self._left_out_problems(styles, objects, forgotten=concept_names(self.template_name))
        names = styles if self.template == "style" else objects
        unknown = [name for name in concept_names(self.template_name) if name not in names]
        for name in unknown[:1]:
            message = f"there is no {self.template} {name!r}; the grid has: {', '.join(names)}."
            yield ("template_name", "template", "styles", "objects"), message + nearest(name, names)

    def checkpoint(self) -> Path:
        """The file that `ckpt_path` leads to."""
        return checkpoint_file(self.ckpt_path, template=self.template, template_name=self.template_name)

    def _checkpoint_problems(self) -> Iterator[Problem]:
        if self.images_dir is None:
            yield from checkpoint_problems(
                "ckpt_path", self.ckpt_path, template=self.template, template_name=self.template_name
            )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        yield from base_problems(self.base_ckpt_path)
        for key in ("images_dir", "base_images_dir"):
            folder = getattr(self, key)
            if folder is not None and not resolve_path(folder).is_dir():
                yield (key,), f"there is no folder {folder}; give one of images, or leave the key out"
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem


def _numbered(prompts: Sequence[str]) -> tuple[Case, ...]:
    return tuple(Case(f"{number:04d}", prompt) for number, prompt in enumerate(prompts))
