"""UCE from its settings to its files, on a model that is small enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mu.algorithms.uce.algorithm import UCEAlgorithm
from mu.algorithms.uce.configs import UCEConfig
from mu.algorithms.uce.scripts.train import main
from mu.config import ConfigError, dump, load_config
from mu.ldm import LatentDiffusion, load_model, save_checkpoint
from mu.ldm.patch import patch_checkpoint
from mu.ldm.tensor_file import read_state_dict
from mu.unlearning import output
from mu.unlearning.moving import TrainingError

UNET = "model.diffusion_model."


@pytest.fixture
def wanted(tiny_yaml: Path, tmp_path: Path) -> dict[str, Any]:
    """Keys of a run: 2 styles x 2 objects, Noto becomes Blob; no pictures."""
    torch.manual_seed(0)
    model: LatentDiffusion = load_model(tiny_yaml)
    save_checkpoint(model, tmp_path / "base.safetensors")
    return {
        "ckpt_path": str(tmp_path / "base.safetensors"),
        "model_config_path": str(tiny_yaml),
        "devices": "cpu",
        "template": "style",
        "template_name": "Noto",
        "prompts": ("A {object} image in {style} style.",),
        "styles": ("Noto", "Blob", "Fluent_Flat"),
        "objects": ("Cats", "Dogs"),
        "sample_prompts": (),
        "sample_steps": 2,
        "output_dir": str(tmp_path / "runs"),
        "lamb": 0.1,
    }


def test_promise_23_nothing_but_keys_and_values_of_prompts_differs_in_the_file(
    wanted: dict[str, Any], tmp_path: Path
) -> None:
    result = UCEAlgorithm(UCEConfig(**wanted)).run()
    before, after = (
        read_state_dict(path)[0] for path in (tmp_path / "base.safetensors", result["checkpoint"])
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert before.keys() == after.keys()
    assert result["weights_selected"] == sum(before[name].numel() for name in changed)
    differing = sum(int((before[name] != after[name]).sum()) for name in changed)
    assert result["weights_changed"] == differing > 0.9 * result["weights_selected"]
    assert (result["prompts_edited"], result["prompts_preserved"]) == (2, 4)
    assert json.loads((result["run"] / "metrics.json").read_text())["weights_changed"] == differing


def test_promise_23_another_weight_that_moved_stops_the_run(
    wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of a query, as a defect of the method might move it."""
    write = output.write_unlearned

    def write_moved(ldm: LatentDiffusion, *args: Any, **options: Any) -> Path:
        name = next(name for name, _ in ldm.unet.named_parameters() if name.endswith("attn2.to_q.weight"))
        with torch.no_grad():
            ldm.unet.get_parameter(name)[0, 0] += 1e-3
        return write(ldm, *args, **options)

    monkeypatch.setattr(output, "write_unlearned", write_moved)
    with pytest.raises(TrainingError, match=r"attn2\.to_q\.weight differs from .* outside what may move"):
        UCEAlgorithm(UCEConfig(**wanted)).run()
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_the_patch_makes_the_checkpoint_and_pictures_are_taken(
    wanted: dict[str, Any], tmp_path: Path
) -> None:
    config = UCEConfig(**{**wanted, "sample_prompts": None, "sample_seeds": (3,)})
    result = UCEAlgorithm(config).run()
    assert result["pictures"].is_file()
    patch_checkpoint(tmp_path / "base.safetensors", tmp_path / "patched.safetensors", [result["patch"]])
    patched, written = (
        read_state_dict(path)[0] for path in (tmp_path / "patched.safetensors", result["checkpoint"])
    )
    assert all(torch.equal(patched[name], written[name]) for name in written)


def test_the_command_does_the_same_and_its_dry_run_nothing(
    wanted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump(UCEConfig(**wanted)))
    words = ["--config_path", str(tmp_path / "config.yaml")]
    assert main([*words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "# plan: uce on cpu" in printed
    assert "metrics" in printed
    assert "report.html" not in printed  # `unlearn_diff report` writes it
    assert "images" not in printed.splitlines()[2]
    assert not (tmp_path / "runs").exists()
    assert main(words) == 0
    (checkpoint,) = (tmp_path / "runs").glob("style-Noto-*/model.safetensors")
    assert f"\n  model    {checkpoint}\n" in capsys.readouterr().out
    assert main([*words, "--dry_run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["stage"], plan["can_run"], plan["problems"]) == ("uce", True, [])
    assert {"what", "folder", "bytes"} <= plan["files"][0].keys()
    assert main([*words, "--substitute", "Noto"]) == 2
    assert "substitute: 'Noto' is itself to be forgotten" in capsys.readouterr().err


def test_promise_17_too_little_disk_stops_a_run_before_the_model_loads(
    wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(ConfigError, match=r"output_dir: this run writes .* MB; 1\.0 MB are free there"):
        UCEAlgorithm(UCEConfig(**wanted)).run()
    assert not (tmp_path / "runs").exists()


# ---- which prompts


def test_a_concept_becomes_the_next_of_its_kind_and_the_others_stay() -> None:
    config = load_config(UCEConfig, config_path="emoji_canvas/uce_object.yaml")
    pairs = config.pairs()
    assert len(pairs) == 7
    assert ("A Cats image in Noto style.", "A Dogs image in Noto style.") in pairs
    assert len(config.preserved()) == 77
    assert not {prompt for prompt, _ in pairs} & set(config.preserved())


def test_prompts_that_come_to_the_same_are_paired_once() -> None:
    config = UCEConfig(template_name="Noto", prompts=("{concept}", "Blob"))
    assert config.pairs() == [("Noto", "Blob"), ("Blob", "Blob")]


def test_an_artist_becomes_art() -> None:
    config = UCEConfig(template_name="Van Gogh", substitute="art", prompts=("{concept}", "by {concept}"))
    assert config.pairs() == [("Van Gogh", "art"), ("by Van Gogh", "by art")]
    assert config.preserved() == []
    assert UCEConfig(template_name="Van Gogh", substitute="art", preserve_prompts=("Monet",)).preserved() == [
        "Monet"
    ]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"template_name": "Van Gogh"}, "'Van Gogh' has no next style that could take its place"),
        ({"template_name": "Noto", "styles": ("Noto",)}, "'Noto' has no next style"),
        ({"template_name": "Noto", "devices": "cpu,cpu"}, "devices: cpu,cpu are several"),
        ({"template_name": "Noto", "substitute": "Noto"}, "'Noto' is itself to be forgotten"),
        ({"prompts": ("a noto emoji",)}, "no prompt differs from its substitute's"),
        ({"template_name": "Van_Gogh", "substitute": "Van Gogh"}, "no prompt differs from its substitute's"),
        ({"prompts": ("{concept.upper}",)}, r"only \{concept\}, \{style\} and \{object\} are filled in"),
        (
            {"template_name": "Notto", "substitute": "Blob", "prompts": ("in {style} style",)},
            "'Notto' is none of the styles .* Did you mean 'Noto'",
        ),
    ],
)
def test_what_cannot_be_is_said(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        UCEConfig(**keys)
