"""Unified Concept Editing (Gandikota et al. 2024), from a config to the files of a run.

UCEAlgorithm(uce_emoji_canvas, template_name="Noto").run()
"""

from __future__ import annotations

import time

import torch

from mu.algorithms.uce.configs import UCEConfig
from mu.algorithms.uce.editing import edit_, edited_names
from mu.unlearning.inspection import Inspection
from mu.unlearning.method import Method, load, tell
from mu.unlearning.output import write_and_prove
from mu.unlearning.plan import Plan
from mu.unlearning.progress import ProgressPictures
from mu.unlearning.runs import Result, open_run


class UCEAlgorithm(Method[UCEConfig]):
    """Edit the keys and values of a concept's prompts into those of a substitute."""

    config_class = UCEConfig

    def make_plan(self) -> Plan:
        seen = Inspection(self.config)
        seen.prompts += [prompt for pair in self.config.pairs() for prompt in pair] + self.config.preserved()
        names = seen.noting(lambda: edited_names(seen.unet)) or []
        selected = {name: seen.numel[name] for name in names}
        return seen.plan(
            "uce",
            weights={"total": sum(seen.numel.values()), "selected": sum(selected.values())},
            files=[*seen.output_files(selected)],
        )

    def run_here(self) -> Result:
        """Edit, check that nothing but keys and values of cross-attention changed, and write the unlearned checkpoint.

        Returns:
            As `TrainingMethod.run_here`, without what is of steps; and `prompts_edited`, `prompts_preserved`;
            `edit_norm`, |M - I| of `editing.context_edit`; `edit_seconds`.

        Raises:
            TrainingError: a weight that is none of keys and values changed.
        """
        config, started = self.config, time.monotonic()

        # 1. What stops the run is found before anything is loaded or made.
        plan, _ = self.required_plan()
        assert plan is not None  # see `UCEConfig.conflicts`
        with open_run(config) as folder:
            plan.say_warnings(folder.logger)

            # 2. Load.
            loaded = load(config)
            ldm = loaded.ldm
            names = edited_names(ldm.unet)
            pairs, preserved = config.pairs(), config.preserved()
            pictures = ProgressPictures(config, ldm, [prompt for prompt, _ in pairs], preserved)
            pictures.draw("before")

            # 3. Edit.
            begun = time.monotonic()
            scales = {key: getattr(config, key) for key in ("erase_scale", "preserve_scale", "lamb")}
            norm = edit_(ldm, pairs, preserved, **scales)
            seconds = time.monotonic() - begun
            folder.logger.info(
                "prompts edited: %d, preserved: %d and the empty one, in %.1f s: %s -> %s",
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
            return tell(folder, pictures, result, started=started)
