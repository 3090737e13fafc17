"""Unified Concept Editing (Gandikota et al. 2024), from a config to the files of a run.

UCEAlgorithm(uce_emoji_canvas, template_name="Noto").run()
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from mu.algorithms.uce.configs import UCEConfig
from mu.algorithms.uce.editing import edit_, edited_names
from mu.config import config_of, require_paths
from mu.launch import on_ranks
from mu.unlearning.inspection import Inspection
from mu.unlearning.output import write_and_prove
from mu.unlearning.plan import Plan
from mu.unlearning.progress_pictures import ProgressPictures
from mu.unlearning.run import decorate, draw, load
from mu.unlearning.runs import Result, open_run


class UCEAlgorithm:
    """Edit the keys and values of a concept's prompts into those of a substitute.

    Args:
        config: a UCEConfig, or a mapping of some of its keys (an OmegaConf DictConfig too); it is not changed.
        overrides: keys of the config with other values.

    Raises:
        ConfigError: a key is unknown, or a value wrong.
    """

    def __init__(self, config: UCEConfig | Mapping[str, Any], **overrides: Any) -> None:
        self.config = config_of(UCEConfig, config, **overrides)

    def plan(self) -> Plan:
        """What `run` would do and write, with sizes; nothing is made. All that it would fail of is in the plan.

        Raises:
            ConfigError: a path is missing.
            ModelConfigError: the model's YAML cannot be used.
        """
        require_paths(self.config)
        return plan_uce(self.config).examined()

    def run(self) -> Result:
        """Edit, check that nothing but keys and values of cross-attention changed, and write the unlearned checkpoint.

        Returns:
            `run`, the run's folder; `checkpoint`; `patch`, its path (None without); `pictures`, before and after (None
            without); `weights_selected`, of keys and values; `weights_changed`, that differ from the original in the
            file; `weights_moved`, that did so before they were rounded to the file's dtype, and `weights_rounded_back`,
            the others of them; `weights_total`; `prompts_edited`, `prompts_preserved`; `edit_norm`, |M - I| of
            `editing.context_edit`; `edit_seconds`; `seconds`; `peak_memory_bytes`, of the process so far.

        Raises:
            ConfigError: a path is missing, or the files do not fit on the disk.
            TrainingError: a weight that is none of keys and values changed.
            MuError: the checkpoint cannot be used; see the message.
        """
        require_paths(self.config)
        return on_ranks(_unlearning, self.config, self.config.devices)


def plan_uce(config: UCEConfig) -> Plan:
    """The plan of a run; see `mu.unlearning.inspection`.

    Raises:
        ModelConfigError: the model's YAML cannot be used; all else is in the plan's `problems`.
    """
    seen = Inspection(config)
    seen.prompts += [prompt for pair in config.pairs() for prompt in pair] + config.preserved()
    names = seen.noting(lambda: edited_names(seen.unet)) or []
    selected = {name: seen.numel[name] for name in names}
    return seen.plan(
        "uce",
        weights={"total": sum(seen.numel.values()), "selected": sum(selected.values())},
        files=[*seen.output_files(selected)],
    )


def _unlearning(config: UCEConfig) -> Result:
    started = time.monotonic()

    # 1. What stops the run is found before anything is loaded or made.
    plan = plan_uce(config).require()
    with open_run(config) as folder:
        plan.say_warnings(folder.logger)

        # 2. Load.
        loaded = load(config)
        ldm = loaded.ldm
        names = edited_names(ldm.unet)
        pairs, preserved = config.pairs(), config.preserved()
        pictures = ProgressPictures(config, ldm, [prompt for prompt, _ in pairs], preserved)
        draw(pictures, "before")

        # 3. Edit.
        begun = time.monotonic()
        scales = {key: getattr(config, key) for key in ("erase_scale", "preserve_scale", "lamb")}
        norm = edit_(ldm, pairs, preserved, **scales)
        seconds = time.monotonic() - begun
        folder.logger.info(
            "%d prompts edited, %d preserved, in %.1f s: %s -> %s",
            len(pairs),
            len(preserved),
            seconds,
            *pairs[0],
        )

        # 4. Write, and prove that nothing but keys and values changed.
        every = torch.ones((), dtype=torch.bool)
        written = write_and_prove(
            ldm,
            config,
            folder,
            source=loaded.source,
            original=loaded.original,
            selected={name: every.expand(ldm.unet.get_parameter(name).shape) for name in names},
            metadata={"method": "uce", **scales},
        )

        # 5. Pictures after, drawn from what was written, and metrics.json.
        result = {
            **written,
            "weights_selected": plan.weights["selected"],
            "weights_total": plan.weights["total"],
            "prompts_edited": len(pairs),
            "prompts_preserved": len(preserved),
            "edit_norm": norm,
            "edit_seconds": seconds,
        }
        return decorate(folder, pictures, result, started=started)
