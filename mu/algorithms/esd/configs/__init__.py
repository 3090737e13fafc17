"""Settings of ESD: the config class, and ready-made configs. Importing this loads neither torch nor transformers."""

from __future__ import annotations

from typing import ClassVar

from mu.config import load_config, setting
from mu.unlearning.concept_prompts import PromptKeys
from mu.unlearning.config import TRAIN_METHOD_HELP, TRAIN_METHODS
from mu.unlearning.training_config import TrainingKeys


class ESDConfig(TrainingKeys, PromptKeys):
    """How a concept is erased. The defaults are the paper's, of ESD-x."""

    MODULE: ClassVar[str] = "mu.algorithms.esd.scripts.train"

    train_method: str = setting(
        "xattn",
        f"Which UNet weights may move: xattn is ESD-x, for styles; noxattn is ESD-u, for objects and nudity. "
        f"{TRAIN_METHOD_HELP}",
        choices=TRAIN_METHODS,
    )
    iterations: int = setting(1000, "Training steps.", ge=1, le=1_000_000)
    batch_size: int = setting(1, "Prompts in a step, each with noise of its own.", ge=1, le=100_000)
    negative_guidance: float = setting(
        1.0,
        "eta: how far the prediction for the concept is pushed beyond the unconditional one, away from the original's.",
        ge=0,
        le=100,
    )
    start_guidance: float = setting(
        3.0, "Classifier-free guidance of the partly sampled images that are trained on.", ge=0, le=100
    )
    ddim_steps: int = setting(
        50, "DDIM steps of a whole image; they are stopped at a random one.", ge=1, le=1000
    )
    wandb_project: str = setting("esd", "Project at Weights & Biases.", kind="name")
    output_dir: str = setting("outputs/esd", "The run's folder is made in it.", kind="path")


esd_emoji_canvas = load_config(ESDConfig, config_path="emoji_canvas/esd_style.yaml")
