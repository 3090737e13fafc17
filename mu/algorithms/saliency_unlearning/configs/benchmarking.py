"""The keys of the results table, and the methods it compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mu.algorithms.saliency_unlearning.configs.unlearning import MaskConfig, TrainConfig
from mu.config import Config, ConfigError, load_config, nearest, setting
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.devices import DEVICE_PATTERN
from mu.evaluation.config import ScoringKeys
from mu.run_folder import writable_problem
from mu.unlearning.config import (
    OUTPUTS,
)
from mu.unlearning.find_checkpoint import Problem

METHODS: Mapping[str, Mapping[str, str]] = {
    "salun": {},
    "none": {"masking": "none"},
    "random": {"masking": "random"},
    "ascent": {"masking": "none", "objective": "ascent"},
    "retain": {"masking": "none", "objective": "retain"},
}
"""Method of a row of the table -> the keys in which it differs from the training recipe."""


class BenchmarkConfig(ScoringKeys):
    """Every concept of EmojiCanvas in turn: mask, unlearning, evaluation; a row for each method of one table."""

    concepts: tuple[str, ...] | None = setting(
        None, "Styles and objects to forget, one after the other; null: all.", kind="name"
    )
    methods: tuple[str, ...] = setting(
        ("salun",),
        "Rows of each concept. salun: the recipe as it is. Controls, the recipe but for this; none: without a mask; "
        "random: a random mask of equal size; ascent: gradient ascent on the images to forget, retain: fine-tuning on "
        "those to retain alone, both without a mask.",
        choices=tuple(METHODS),
    )
    thresholds: tuple[float, ...] | None = setting(
        None,
        "salun and random: a row for each of these fractions of the weights, all masks of a concept from one pass of "
        "gradients; null: the recipe's.",
        gt=0,
        le=1,
    )
    style_mask: str = setting("emoji_canvas/mask_style.yaml", "Recipe of the mask of a style.", kind="path")
    style_train: str = setting("emoji_canvas/train_style.yaml", "Recipe of forgetting a style.", kind="path")
    object_mask: str = setting(
        "emoji_canvas/mask_object.yaml", "Recipe of the mask of an object.", kind="path"
    )
    object_train: str = setting(
        "emoji_canvas/train_object.yaml", "Recipe of forgetting an object.", kind="path"
    )
    fid_reference_seeds: tuple[int, ...] = setting(
        (1188, 1288, 1588, 1688, 1888),
        "FID of the retained prompts, by the classifier's features, is measured to the base model's images of these "
        "seeds; so the base's own FID is from seed to seed. []: no FID.",
        ge=0,
        lt=1_000_000,
        may_be_empty=True,
    )
    devices: tuple[str, ...] = setting(
        ("0",), "CUDA device numbers such as 0, or cpu; workers take them in turn.", pattern=DEVICE_PATTERN
    )
    workers: int | None = setting(
        None,
        "Processes, each of which takes the next free concept; on the CPU they share its threads. null: one for each "
        "device. The same command, begun a second time beside the first, shares the concepts with it too.",
        ge=1,
        le=1000,
    )
    resume: bool = setting(
        True,
        "Keep what output_dir already has and the same settings made; false: unlearn every concept anew.",
    )
    table_name: str = setting(
        "table", "Name of the table's files; tables in one folder share their rows.", kind="name"
    )
    output_dir: str = setting(f"{OUTPUTS}/benchmark", "Folder of the table and of all its runs.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        if same := set(self.seeds) & set(self.fid_reference_seeds):
            yield (
                ("fid_reference_seeds", "seeds"),
                f"both have {min(same)}; the reference's must be others",
            )
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
        loaded: dict[str, Config] = {}
        for key, cls in recipes:
            try:
                loaded[key] = load_config(cls, config_path=getattr(self, key))
            except ConfigError as error:
                for mistake in error.mistakes:
                    yield (key,), mistake
        for kind in ("style", "object"):
            mask, train = loaded.get(f"{kind}_mask"), loaded.get(f"{kind}_train")
            if isinstance(mask, MaskConfig) and isinstance(train, TrainConfig):
                yield from self._size_problems(kind, mask, train)
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem

    def _size_problems(self, kind: str, mask: MaskConfig, train: TrainConfig) -> Iterator[Problem]:
        """Why thresholds would have no effect, or a random mask would move more or fewer weights than the other."""
        if self.thresholds and "salun" in self.methods and train.masking == "none":
            yield (
                ("thresholds", f"{kind}_train"),
                f"{getattr(self, f'{kind}_train')} has masking none; leave thresholds out, or "
                "give a recipe with a mask",
            )
        ranked = mask.train_method if mask.pool == "train_method" else "full"
        if "random" in self.methods and ranked != train.train_method:
            yield (
                ("methods", f"{kind}_mask", f"{kind}_train"),
                f"of {train.train_method}, which moves, a random mask would select another number of weights than the "
                f"saliency mask, which ranks {ranked}; give {kind}_mask pool: train_method and train_method: "
                f"{train.train_method}",
            )
