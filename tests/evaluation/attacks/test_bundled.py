"""On the bundled model: an attack on the base finds the concept, and one on random weights does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mu.config import load_config, override, resolve_path
from mu.evaluation.attacks import attack
from mu.evaluation.attacks.config import AttackConfig
from mu.ldm import load_model, save_checkpoint
from mu.unlearning.config import EMOJI_CHECKPOINT, EMOJI_MODEL_CONFIG
from tests.conftest import randomise


def success(config: AttackConfig, stage: str = "attacked") -> float:
    metrics = json.loads((Path(str(attack.run(config)["run"])) / "metrics.json").read_text())
    return float(metrics["models"]["after"]["stages"][stage]["success"]["value"])


@pytest.fixture
def base(tmp_path: Path) -> AttackConfig:
    """An attack on the bundled model itself."""
    return load_config(
        AttackConfig,
        config_path="emoji_canvas/attack_style.yaml",
        overrides={
            "ckpt_path": EMOJI_CHECKPOINT,
            "seeds": (188,),
            "inversion_word": "photograph",
            "output_dir": str(tmp_path / "evaluations"),
            "devices": "cpu",
        },
    )


@pytest.mark.slow
def test_an_attack_on_the_base_finds_the_concept(base: AttackConfig) -> None:
    """From another word: the concept's name is not in its prompts."""
    assert success(base) >= 0.9
    assert success(override(base, inversion_steps=1)) <= 0.5


@pytest.mark.slow
def test_an_attack_on_random_weights_fails(base: AttackConfig, tmp_path: Path) -> None:
    model = load_model(resolve_path(EMOJI_MODEL_CONFIG), resolve_path(EMOJI_CHECKPOINT))
    randomise(model.unet, 0)
    path = tmp_path / "random.safetensors"
    save_checkpoint(model, path)
    both = override(base, ckpt_path=str(path), inversion_steps=60)
    metrics = json.loads((Path(str(attack.run(both)["run"])) / "metrics.json").read_text())
    assert metrics["models"]["after"]["stages"]["attacked"]["both"]["value"] <= 0.25
    assert metrics["models"]["before"]["stages"]["plain"]["both"]["value"] >= 0.75
