"""The keys of the results table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from benchmarks.methods import METHODS
from mu.config import ConfigError, nearest, resolve_path, setting
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.devices import DEVICE_PATTERN
from mu.evaluation.config import ScoringKeys
from mu.run_folder import writable_problem
from mu.unlearning.find_checkpoint import Problem

CONCEPTS = STYLES + OBJECTS


class TableConfig(ScoringKeys):
    """Every concept of EmojiCanvas in turn: forgotten by each method, and measured."""

    concepts: tuple[str, ...] | None = setting(
        None, "Styles and objects to forget, one after the other; null: all.", kind="name"
    )
    methods: tuple[str, ...] = setting(
        ("salun",),
        "Rows of each concept. salun: its recipe as it is. Controls, that recipe but for one thing; none: without a "
        "mask; random: a random mask of equal size; ascent: gradient ascent on the images to forget, retain: "
        "fine-tuning on those to retain alone, both without a mask. Others: their own recipes.",
        choices=tuple(METHODS),
    )
    thresholds: tuple[float, ...] | None = setting(
        None,
        "Methods with a mask: a row for each of these fractions of the weights, all masks of a concept from one pass "
        "of gradients; null: the recipe's.",
        gt=0,
        le=1,
    )
    recipes: str | None = setting(
        None,
        "Folder with recipes that replace packaged ones of the same name, such as "
        "<recipes>/emoji_canvas/train_style.yaml; those that it lacks are the packaged ones.",
        kind="path",
    )
    fid_reference_seeds: tuple[int, ...] = setting(
        (1188, 1288, 1588, 1688, 1888),
        "FID of the retained prompts, by the classifier's features, is measured to the base model's images of these "
        "seeds; so the base's own FID is from seed to seed. []: no FID.",
        ge=0,
        lt=1_000_000,
        may_be_empty=True,
    )
    devices: str = setting(
        "0",
        "CUDA device number such as 0, or cpu. The same command, begun again beside the first (on another device), "
        "shares the concepts with it.",
        pattern=DEVICE_PATTERN,
    )
    resume: bool = setting(
        True,
        "Keep what output_dir already has and the same settings made; false: unlearn every concept anew.",
    )
    table_name: str = setting(
        "table", "Name of the table's files; tables in one folder share their rows.", kind="name"
    )
    output_dir: str = setting("outputs/benchmark", "Folder of the table and of all its runs.", kind="path")

    def conflicts(self) -> Iterator[Problem]:
        if same := set(self.seeds) & set(self.fid_reference_seeds):
            yield (
                ("fid_reference_seeds", "seeds"),
                f"both have {min(same)}; the reference's must be others",
            )
        yield from self._left_out_problems(STYLES, OBJECTS, forgotten=self.concepts or CONCEPTS)
        for name in self.concepts or ():
            if name not in CONCEPTS:
                yield (
                    ("concepts",),
                    f"{name!r} is not one of: {', '.join(CONCEPTS)}.{nearest(name, CONCEPTS)}",
                )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.recipes is not None and not resolve_path(self.recipes).is_dir():
            yield (
                ("recipes",),
                f"there is no folder {self.recipes}; give one of recipes, or leave the key out",
            )
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem
        for kind, name in product(("style", "object"), self.methods):
            yield from self._recipe_problems(name, kind)

    def _recipe_problems(self, name: str, kind: str) -> Iterator[Problem]:
        """Mistakes in a method's recipes; thresholds without effect; a random mask of another size than SalUn's."""
        method = METHODS[name]
        found: list[Any] = []
        for stage in filter(None, (method.train, METHODS["salun"].mask if method.size_key else None)):
            try:
                found.append(stage.load(kind, self.recipes))
            except ConfigError as error:
                for mistake in error.mistakes:
                    yield ("recipes",), f"{stage.recipe_path(kind, self.recipes)}: {mistake}"
        if len(found) < 2:
            return
        train, mask = found
        if name == "salun" and self.thresholds and train.masking == "none":
            path = method.train.recipe_path(kind, self.recipes)
            yield (
                ("thresholds", "recipes"),
                f"{path} has masking none; leave thresholds out, or give a recipe with a mask",
            )
        ranked, moving = mask.train_method if mask.pool == "train_method" else "full", train.train_method
        if name == "random" and ranked != moving:
            yield (
                ("methods", "recipes"),
                f"of {moving}, which moves, a random mask would select another number of weights than the saliency "
                f"mask, which ranks {ranked}; give the mask's recipe pool: train_method and train_method: {moving}",
            )
