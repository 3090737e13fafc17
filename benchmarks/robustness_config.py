"""The keys of the scoreboard of robustness."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.table_config import RowKeys
from mu.config import ConfigError, load_config, resolve_path, setting
from mu.evaluation.attacks.config import ATTACKS, AttackConfig
from mu.unlearning.find_checkpoint import Problem


class RobustnessConfig(RowKeys):
    """Every concept forgotten by each method, and attacked; beside it the base, and the model that never knew it."""

    attacks: tuple[str, ...] = setting(
        tuple(ATTACKS), "Attacks, with the settings of their recipe.", choices=tuple(ATTACKS)
    )
    attack_recipe: str = setting(
        "emoji_canvas/attack_{kind}.yaml",
        "Settings of the attacks, as --config_path takes a YAML; {kind} is style or object. Its concept, checkpoints, "
        "devices and folder are replaced.",
    )
    oracles: str | None = setting(
        None,
        "Folder of models that were trained without a concept, <concept>.safetensors; concepts that it lacks have no "
        "row of them. null: none has.",
        kind="path",
    )
    table_name: str = setting(
        "robustness", "Name of the table's files; tables in one folder share their rows.", kind="name"
    )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        for kind in ("style", "object"):
            try:
                self.attack(kind)
            except ConfigError as error:
                for mistake in error.mistakes:
                    yield ("attack_recipe",), f"{self.attack_recipe.format(kind=kind)}: {mistake}"
        if self.oracles is not None and not resolve_path(self.oracles).is_dir():
            yield ("oracles",), f"there is no folder {self.oracles}; give one of oracles, or null"

    def attack(self, kind: str) -> AttackConfig:
        """The recipe of a kind. Raises ConfigError with all mistakes in it."""
        return load_config(AttackConfig, config_path=self.attack_recipe.format(kind=kind))
