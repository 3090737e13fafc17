"""Erased Stable Diffusion (Gandikota et al. 2023), from a config to the files of a run.

ESDAlgorithm(esd_emoji_canvas, template_name="Noto").run()
"""

from __future__ import annotations

from typing import Any

from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.esd.objective import ESD, EraseBatches
from mu.config import ConfigError
from mu.ldm.sampler import ddim_timesteps
from mu.unlearning.embedding import embedded
from mu.unlearning.inspection import Inspection
from mu.unlearning.method import Loaded, TrainingMethod
from mu.unlearning.moving import FrozenOriginal, MovingModel
from mu.unlearning.plan import Plan


class ESDAlgorithm(TrainingMethod[ESDConfig]):
    """Turn the model's own guidance for the concept's prompts against them; no images are needed, and none retained."""

    config_class = ESDConfig

    def make_plan(self) -> Plan:
        config, seen = self.config, Inspection(self.config)
        seen.prompts += config.concept_prompts()
        most = seen.ldm.num_timesteps
        if config.ddim_steps > most:
            seen.problems.append(
                ConfigError([f"ddim_steps: {config.ddim_steps}; the model has {most} timesteps"])
            )
        return seen.training_plan(steps=config.iterations)

    def data(self, loaded: Loaded, plan: Plan | None) -> Prompts:  # noqa: ARG002
        return Prompts(self.config, loaded)

    def described(self) -> dict[str, Any]:
        config = self.config
        own = {key: getattr(config, key) for key in ("negative_guidance", "start_guidance", "ddim_steps")}
        return {"method": "esd", **super().described(), **own}

    def objective(self, model: MovingModel) -> ESD:
        config = self.config
        return ESD(
            FrozenOriginal(model),
            negative_guidance=config.negative_guidance,
            start_guidance=config.start_guidance,
            ddim_steps=config.ddim_steps,
        )


class Prompts:
    """The prompts to erase, embedded by the model as it was loaded."""

    retained: tuple[str, ...] = ()

    def __init__(self, config: ESDConfig, loaded: Loaded) -> None:
        self.forgotten = config.concept_prompts()
        ldm = loaded.ldm
        contexts = embedded(ldm, ["", *self.forgotten])  # (1 + N, L, D)
        self.train_batches = EraseBatches(
            self.forgotten,
            contexts[1:],
            contexts[0],
            latent_shape=ldm.latent_shape(config.image_size),
            stops=len(ddim_timesteps(ldm.num_timesteps, config.ddim_steps)),
            seed=config.seed,
            batch_size=config.batch_size,
            total_steps=config.iterations,
        )

    def listed(self) -> list[str]:
        """What tells it from another run's."""
        return self.forgotten
