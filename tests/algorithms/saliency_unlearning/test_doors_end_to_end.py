"""The four commands one after the other on a tiny model, as a user would type them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.algorithms.saliency_unlearning.scripts import evaluate, generate_mask, sample, train
from mu.config import dump
from mu.evaluation.emoji_classifier import EmojiClassifier, save_classifier


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The result that a command printed, which its run folder's metrics.json has too."""
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    kept = json.loads((Path(said["run"]) / "metrics.json").read_text())
    assert {"seconds"} <= kept.keys()
    if "models" not in kept:  # evaluate's numbers stand there by model
        assert said.items() >= kept.items()
        assert said.keys() - kept.keys() <= {"report"}
    return said


def test_mask_train_sample_and_evaluate(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_runs.checkpoint(), "base.ckpt.safetensors")
    (tmp_path / "mask.yaml").write_text(dump(tiny_runs.mask_config(output_dir="masks")))
    (tmp_path / "train.yaml").write_text(
        dump(tiny_runs.train_config(output_dir="models", mask_path="masks", epochs=1))
    )
    base = ["--ckpt_path", "base.ckpt.safetensors"]

    assert generate_mask.main(["--config_path", "mask.yaml", *base, "--threshold", "0.4", "--json"]) == 0
    said = printed(capsys)
    assert "threshold: 0.4\n" in (Path(said["run"]) / "config.yaml").read_text()
    (mask,) = Path("masks").rglob("mask_0.4.safetensors")
    assert mask.parent == Path(said["run"])
    assert {"run", "masks", "kept", "total", "images", "seconds"} <= said.keys()

    argv = ["--config_path", "train.yaml", *base, "--threshold", "0.4", "--lr", "0.01", "--json"]
    assert train.main(argv) == 0
    said = printed(capsys)
    assert Path(said["checkpoint"]).is_file()
    assert Path(said["mask"]) == mask
    report = Path(said["report"]).read_text()
    assert "No pictures: the run sampled none" in report
    assert re.search(r'<th scope="row">input 0</th>.*?<td>[\d.]+ %</td>', report)
    assert said["steps"] == 2
    assert said["retain_loss"] > 0

    model = ["--model_config_path", str(tiny_runs.model_config), "--devices", "cpu"]
    few = ["--sample_steps", "2", "--guidance_scale", "3"]
    argv = ["--ckpt_path", "models", *model, *few, "--prompts", "A Cats image, in Noto style."]
    assert sample.main([*argv, "--seeds", "3,4", "--output_dir", "samples", "--json"]) == 0
    said = printed(capsys)
    assert said["images"] == 2
    assert Path(said["grid"]).is_file()

    torch.manual_seed(3)
    classifier = EmojiClassifier("conv", ("Noto", "Blob"), ("Cats", "Dogs"), width=8, input_size=16)
    save_classifier(classifier, "classifier.safetensors", style_accuracy=1.0, object_accuracy=1.0, seed=3)  # type: ignore[arg-type]
    argv = ["--ckpt_path", "models", "--base_ckpt_path", "base.ckpt.safetensors", *model, *few]
    argv += ["--classifier_path", "classifier.safetensors", "--styles", "Noto,Blob", "--objects", "Cats,Dogs"]
    assert evaluate.main([*argv, "--seeds", "188", "--output_dir", "evaluations", "--json"]) == 0
    said = printed(capsys)
    assert {"UA", "IRA", "CRA", "object accuracy on Noto's own prompts"} <= said.keys()
    assert {"before, %", "after, %"} <= said["UA"].keys()
    assert said["images of each model"] == 4
    (checkpoint,) = Path("models").rglob("model.safetensors")
    assert said["checkpoint"] == str(checkpoint)
    assert Path(said["picture"]).is_file()
    assert Path(said["report"]).parent == Path(said["run"])
    report = Path(said["report"]).read_text()
    for part in (
        "Noto – forgotten",
        "Forget term",
        "Settings: mask",
        "The evaluation took <data",
    ):
        assert part in report


def test_a_run_that_fails_says_so_in_one_line(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.ckpt").write_bytes(tiny_runs.checkpoint().read_bytes()[:1000])
    (tmp_path / "mask.yaml").write_text(dump(tiny_runs.mask_config(output_dir="masks")))
    assert generate_mask.main(["--config_path", "mask.yaml", "--ckpt_path", "broken.ckpt"]) == 2
    said = capsys.readouterr()
    (error,) = [line for line in said.err.splitlines() if "error: " in line]
    assert "broken.ckpt" in error
    assert "Traceback" not in said.err
