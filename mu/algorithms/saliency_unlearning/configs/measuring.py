"""The keys of sampling, evaluation and the whole table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.algorithms.saliency_unlearning.configs.concept import (
    EMOJI_CHECKPOINT,
    EMOJI_MODEL_CONFIG,
    OUTPUTS,
    PACKAGED,
    SAMPLE_PRECISIONS,
    ModelKeys,
    Problem,
    checkpoint_file,
    checkpoint_problems,
    file_problems,
    is_checkpoint,
)
from mu.algorithms.saliency_unlearning.configs.unlearning import SHOW_UNSAFE_HELP, MaskConfig, TrainConfig
from mu.config import Config, ConfigError, load_config, nearest, resolve_path, setting
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.index import DataError, concept_names
from mu.datasets.prompt_table import Case, read_prompt_table
from mu.devices import DEVICES_PATTERN
from mu.run_folder import writable_problem

# The second classifier: neither the data nor the recipes were made with it.
SCORE_CLASSIFIER = "package:assets/emoji_canvas/classifier_score.safetensors"
SEEDS = (188, 288, 588, 688, 888)
_PRECISION_HELP = "Arithmetic of sampling; bf16 is faster, its images differ a little."


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelKeys):
    """Images from a checkpoint."""

    prompts: tuple[str, ...] = setting(
        (), "Prompts: one, or a YAML list (commas do not separate them).", split=False, may_be_empty=True
    )
    prompts_path: str | None = setting(
        None,
        "Instead of prompts: a text file with one prompt a line, or a .csv with the columns prompt and, as they are "
        "there, case_number, evaluation_seed (or sd_seed), evaluation_guidance (or sd_guidance_scale).",
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
    precision: str = setting("fp32", _PRECISION_HELP, choices=SAMPLE_PRECISIONS)
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
        """The prompts, from the key or from the file, each with the number that its files begin with.

        Raises ConfigError when the file cannot be read, has no prompt, or has wrong rows.
        """
        if self.prompts_path is None:
            return _numbered(self.prompts)
        path = resolve_path(self.prompts_path)
        if path.suffix.lower() == ".csv":
            try:
                table = read_prompt_table(path)
            except DataError as error:
                raise ConfigError([f"prompts_path: {error}"]) from error
            if self.use_row_settings:
                return table
            return tuple(dict.fromkeys(Case(row.case_number, row.prompt) for row in table))
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"prompts_path: {path} cannot be read as text ({error})"]) from error
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise ConfigError([f"prompts_path: {path} has no prompt; write one a line"])
        return _numbered(prompts)


@dataclass(frozen=True, kw_only=True)
class ScoringKeys(Config):
    """How images are sampled and scored, of one model or of a whole table; and how the scores are read."""

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
    precision: str = setting("fp32", _PRECISION_HELP, choices=SAMPLE_PRECISIONS)
    classifier_path: str = setting(
        SCORE_CLASSIFIER, "Classifier with a style and an object head that scores the images.", kind="path"
    )
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

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        yield from file_problems(
            "classifier_path",
            self.classifier_path,
            advice="leave the key out for EmojiCanvas' own classifier",
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


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringKeys, ModelKeys):
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
    report: bool = setting(True, "Also write report.html, one file with numbers, pictures and settings.")
    show_unsafe_pictures: bool = setting(False, SHOW_UNSAFE_HELP)
    output_dir: str = setting(f"{OUTPUTS}/evaluations", "The run's folder is made in it.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        yield from self._left_out_problems(
            self.styles or STYLES, self.objects or OBJECTS, forgotten=concept_names(self.template_name)
        )
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
        if self.base_ckpt_path is not None and not is_checkpoint(resolve_path(self.base_ckpt_path)):
            yield from file_problems(
                "base_ckpt_path", self.base_ckpt_path, advice="give the model before training"
            )
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(ScoringKeys):
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
    devices: str = setting("0", "CUDA device number such as 0, or cpu.", pattern=DEVICES_PATTERN)
    resume: bool = setting(
        True,
        "Keep what output_dir already has and the same settings made; false: unlearn every concept anew.",
    )
    output_dir: str = setting(f"{OUTPUTS}/benchmark", "Folder of the table and of all its runs.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        yield from self._left_out_problems(STYLES, OBJECTS, forgotten=self.concepts or STYLES + OBJECTS)
        for name in self.concepts or ():
            if name not in STYLES + OBJECTS:
                known = ", ".join(STYLES + OBJECTS)
                yield ("concepts",), f"{name!r} is not one of: {known}.{nearest(name, STYLES + OBJECTS)}"

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
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
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem


def _numbered(prompts: Sequence[str]) -> tuple[Case, ...]:
    return tuple(Case(f"{number:04d}", prompt) for number, prompt in enumerate(prompts))
