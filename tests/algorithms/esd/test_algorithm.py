"""ESD from its settings to its files, on a model that is small enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mu.algorithms.esd.algorithm import ESDAlgorithm
from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.esd.scripts.train import main
from mu.config import dump, load_config
from mu.ldm import LatentDiffusion, save_checkpoint
from mu.ldm.patch import patch_checkpoint
from mu.ldm.tensor_file import read_state_dict
from mu.unlearning.moving import names_of

UNET = "model.diffusion_model."


@pytest.fixture
def wanted(tiny_model: LatentDiffusion, tiny_yaml: Path, tmp_path: Path) -> dict[str, Any]:
    """Keys of a short run: one style with 2 objects; no pictures."""
    save_checkpoint(tiny_model, tmp_path / "base.safetensors")
    return {
        "ckpt_path": str(tmp_path / "base.safetensors"),
        "model_config_path": str(tiny_yaml),
        "devices": "cpu",
        "template": "style",
        "template_name": "Noto",
        "prompts": ("A {object} image in {style} style.",),
        "objects": ("Cats", "Dogs"),
        "iterations": 4,
        "batch_size": 2,
        "ddim_steps": 3,
        "lr": 1e-3,
        "sample_prompts": (),
        "sample_steps": 2,
        "output_dir": str(tmp_path / "runs"),
    }


def changed_names(before: Path, after: Path) -> set[str]:
    old, new = (read_state_dict(path)[0] for path in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("train_method", ["xattn", "noxattn"])
def test_promise_23_only_weights_of_the_train_method_differ(
    wanted: dict[str, Any], tmp_path: Path, tiny_model: LatentDiffusion, train_method: str
) -> None:
    result = ESDAlgorithm(ESDConfig(**wanted), train_method=train_method).run()
    changed = changed_names(tmp_path / "base.safetensors", result["checkpoint"])
    assert changed == {UNET + name for name in names_of(tiny_model.unet, train_method)}
    assert result["steps"] == 4
    assert result["loss"] == result["forget_loss"] > 0 == result["retain_loss"]

    patched = tmp_path / "patched.safetensors"
    patch_checkpoint(tmp_path / "base.safetensors", patched, [result["patch"]])
    assert not changed_names(patched, result["checkpoint"])


def test_promise_19_a_run_that_was_stopped_comes_to_the_same_weights(
    wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ESDAlgorithm(ESDConfig(**wanted)).run()

    def stop(self: Any, step: int) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return get(self, step)

    from mu.algorithms.esd.objective import EraseBatches

    get = EraseBatches.__getitem__
    parts = {**wanted, "output_dir": str(tmp_path / "parts"), "checkpoint_every_steps": 1}
    with monkeypatch.context() as patched:
        patched.setattr(EraseBatches, "__getitem__", stop)
        with pytest.raises(KeyboardInterrupt):
            ESDAlgorithm(ESDConfig(**parts)).run()
    resumed = ESDAlgorithm(ESDConfig(**parts), resume="newest").run()
    assert not changed_names(whole["checkpoint"], resumed["checkpoint"])


def test_the_command_does_the_same_and_its_dry_run_nothing(
    wanted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump(ESDConfig(**wanted)))
    words = ["--config_path", str(tmp_path / "config.yaml")]
    assert main([*words, "--dry_run"]) == 0
    assert "steps       4" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--validate_every_steps", "2"]) == 0
    (run,) = (tmp_path / "runs").glob("style-Noto-*")
    assert len((run / "validation.csv").read_text().splitlines()) == 1 + 3
    assert "Noto" in (run / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "Made the model forget the style Noto by 4 steps, in " in printed
    assert f"\n  report   {run / 'report.html'}\n" in printed
    assert "Forgetting" in (run / "report.html").read_text(encoding="utf-8")
    assert main([*words, "--prompts", "a {stile}"]) == 2
    assert "only {concept}, {style} and {object} are filled in" in capsys.readouterr().err


def test_the_packaged_recipes_name_one_concept_in_their_prompts() -> None:
    style = load_config(ESDConfig, config_path="emoji_canvas/esd_style.yaml")
    assert all("Noto" in prompt for prompt in style.concept_prompts())
    object = load_config(ESDConfig, config_path="emoji_canvas/esd_object.yaml")
    assert all("Cats" in prompt for prompt in object.concept_prompts())
