"""The methods of the results table: for each, how a checkpoint is made that has forgotten one concept.

A method is an entry of `METHODS`. Its algorithm is a class whose `run()` returns a mapping with `checkpoint`, the path
of the unlearned model; its recipe is a packaged YAML for each kind of concept.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mu.config import Config, load_config, resolve_path


@dataclass(frozen=True)
class Stage:
    """One command of a method.

    Attributes:
        package: such as mu.algorithms.saliency_unlearning.
        config: name of the config class in `<package>.configs`.
        algorithm: name of the class in `<package>.algorithm`.
        recipe: name of a YAML as `--config_path` takes it, with {kind} for "style" or "object".
    """

    package: str
    config: str
    algorithm: str
    recipe: str

    def run(self, config: Config) -> Mapping[str, Any]:
        """What the algorithm returns."""
        algorithm = getattr(importlib.import_module(f"{self.package}.algorithm"), self.algorithm)
        result: Mapping[str, Any] = algorithm(config).run()
        return result

    def recipe_path(self, kind: str, recipes: str | None = None) -> str:
        """The recipe of a kind: that in the folder `recipes`, where it has one, else the packaged one's name."""
        name = self.recipe.format(kind=kind)
        own = None if recipes is None else resolve_path(recipes) / name
        return name if own is None or not own.is_file() else str(own)

    def load(self, kind: str, recipes: str | None = None) -> Config:
        """The recipe of a kind. Raises ConfigError with all mistakes in it."""
        configs = importlib.import_module(f"{self.package}.configs")
        cls: type[Config] = getattr(configs, self.config)
        return load_config(cls, config_path=self.recipe_path(kind, recipes))


@dataclass(frozen=True)
class Method:
    """One way to forget a concept.

    Attributes:
        train: makes the unlearned checkpoint.
        mask: makes the mask that `train` finds at `mask_path`, for methods with one.
        changes: keys of `train` that have other values than the recipe's.
        size_key: key of `train`, the fraction of the weights in its mask, for methods with one: that of SalUn's recipe.
        seed_key: key of `train` to which the number of the concept is added, so that no two share the luck of one draw.
    """

    train: Stage
    mask: Stage | None = None
    changes: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    size_key: str | None = None
    seed_key: str | None = None


_SALUN = "mu.algorithms.saliency_unlearning"
_MASK = Stage(_SALUN, "MaskConfig", "MaskingAlgorithm", "emoji_canvas/mask_{kind}.yaml")
_TRAIN = Stage(_SALUN, "TrainConfig", "SaliencyUnlearningAlgorithm", "emoji_canvas/train_{kind}.yaml")

METHODS: Mapping[str, Method] = {
    "salun": Method(_TRAIN, mask=_MASK, size_key="threshold"),
    "esd": Method(Stage("mu.algorithms.esd", "ESDConfig", "ESDAlgorithm", "emoji_canvas/esd_{kind}.yaml")),
    "uce": Method(Stage("mu.algorithms.uce", "UCEConfig", "UCEAlgorithm", "emoji_canvas/uce_{kind}.yaml")),
    # Controls: SalUn's recipe but for one thing.
    "none": Method(_TRAIN, changes={"masking": "none"}),
    "random": Method(
        _TRAIN,
        changes={"masking": "random", "threshold": None},
        size_key="random_fraction",
        seed_key="seed",
    ),
    "ascent": Method(_TRAIN, changes={"masking": "none", "objective": "ascent"}),
    "retain": Method(_TRAIN, changes={"masking": "none", "objective": "retain"}),
}
"""Name in the table -> method."""
