"""Settings of saliency unlearning: the config classes, and ready-made configs.

A ready-made config is immutable; `mu.config.override(config, lr=2e-5)`, or a keyword argument of the algorithm, makes
a new one. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from mu.algorithms.saliency_unlearning.configs.unlearning import MaskConfig, TrainConfig, mask_command
from mu.config import Config, load_config
from mu.config_file import packaged_configs

__all__ = [
    "PACKAGED",
    "MaskConfig",
    "SaliencyUnlearningConfig",
    "SaliencyUnlearningMaskConfig",
    "TrainConfig",
    "mask_command",
    "saliency_unlearning_generate_mask_emoji_canvas",
    "saliency_unlearning_generate_mask_i2p",
    "saliency_unlearning_generate_mask_mu",
    "saliency_unlearning_train_emoji_canvas",
    "saliency_unlearning_train_i2p",
    "saliency_unlearning_train_mu",
]

PACKAGED = Path(__file__).parent
"""Folder of this method's own YAML files, and of those of the models."""

C = TypeVar("C", bound=Config)
_FILES = packaged_configs()

SaliencyUnlearningConfig = TrainConfig
SaliencyUnlearningMaskConfig = MaskConfig


def _packaged(cls: type[C], name: str) -> C:
    return load_config(cls, config_path=_FILES[name])


saliency_unlearning_generate_mask_mu = _packaged(MaskConfig, "mask_config.yaml")
saliency_unlearning_train_mu = _packaged(TrainConfig, "train_config.yaml")
saliency_unlearning_generate_mask_i2p = _packaged(MaskConfig, "i2p/mask_category.yaml")
saliency_unlearning_train_i2p = _packaged(TrainConfig, "i2p/train_category.yaml")
saliency_unlearning_generate_mask_emoji_canvas = _packaged(MaskConfig, "emoji_canvas/mask_style.yaml")
saliency_unlearning_train_emoji_canvas = _packaged(TrainConfig, "emoji_canvas/train_style.yaml")
