"""Tiny models and a classifier to attack; also those of the tests of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.emoji_classifier import EmojiClassifier, save_classifier
from mu.ldm import LatentDiffusion, save_checkpoint

STYLES = ("Noto", "Fluent_Flat")
OBJECTS = ("Cats", "Cars")


@pytest.fixture
def config(make_tiny_model: Callable[..., LatentDiffusion], tiny_yaml: Path, tmp_path: Path) -> AttackConfig:
    """An attack of a few steps on a tiny model, with another one for its base."""
    for seed, name in enumerate(("base", "unlearned")):
        save_checkpoint(make_tiny_model(seed), tmp_path / f"{name}.safetensors")
    torch.manual_seed(3)
    classifier = EmojiClassifier("conv", STYLES, OBJECTS, width=8, input_size=16)
    for head in (classifier.style_head, classifier.object_head):
        torch.nn.init.normal_(head.weight)
        torch.nn.init.zeros_(head.bias)
    path = tmp_path / "classifier.safetensors"
    save_classifier(classifier.eval(), path, style_accuracy=1.0, object_accuracy=1.0, seed=3)
    return AttackConfig(
        ckpt_path=str(tmp_path / "unlearned.safetensors"),
        base_ckpt_path=str(tmp_path / "base.safetensors"),
        model_config_path=str(tiny_yaml),
        styles=STYLES,
        objects=OBJECTS,
        seeds=(188, 288),
        target_seeds=(901, 902),
        sample_steps=2,
        guidance_scale=3.0,
        batch_size=6,
        classifier_path=str(path),
        output_dir=str(tmp_path / "evaluations"),
        devices="cpu",
        inversion_vectors=2,
        inversion_steps=6,
        inversion_batch_size=4,
        prompt_tokens=2,
        prompt_steps=3,
        prompt_batch_size=3,
        prompt_candidates=2,
        ring_tokens=3,
        ring_population=6,
        ring_generations=4,
        relearn_steps=(1, 3),
        relearn_images=4,
        relearn_batch_size=2,
        noised_strengths=(0.5, 1.0),
    )
