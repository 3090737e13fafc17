"""The estimate of memory: its parts by hand, and the whole against processes that are measured (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mu.algorithms.saliency_unlearning.configs import PACKAGED
from mu.algorithms.saliency_unlearning.preflight.memory import (
    ALLOCATOR_SHARE,
    LATE_LIBRARIES_BYTES,
    RETAINED_SHARE,
    ModelBytes,
    Moving,
    mask_memory,
    training_memory,
)
from mu.config import resolve_path
from mu.datasets.images import save_png
from mu.ldm import load_model, save_checkpoint
from tests.conftest import randomise

MODEL = ModelBytes(whole=1000, unet=600, file=500)  # 150 weights of the UNet
MOVING = Moving(selected={"a": 50, "b": 20}, numel={"a": 50, "b": 60, "c": 40}, mask=True)
TRAINING: dict[str, Any] = {
    "passes": {"encode": 100},
    "activations": 400,
    "precision": "fp32",
    "optimizer": "adam",
    "frozen": False,
    "channels_last": False,
    "patch": True,
    "resumed": False,
    "file_dtype_bytes": 4,
    "shards": 1,
    "cuda": False,
}


def test_the_parts_of_a_mask() -> None:
    host, device = mask_memory(
        MODEL, passes={"sample": 80}, activations=400, precision="fp32", thresholds=2, shards=1, cuda=False
    )
    assert device == {}
    late = LATE_LIBRARIES_BYTES
    assert host == {
        "load": 1000 + 500,
        "sample": 1000 + int(ALLOCATOR_SHARE * 80) + late,
        "gradients": 1000 + 600 + int(ALLOCATOR_SHARE * 400) + late,
        "thresholds": 1000 + 600 + 2 * 150 + late,
    }
    host, device = mask_memory(
        MODEL, passes={}, activations=400, precision="bf16", thresholds=1, shards=1, cuda=True
    )
    assert device == {"gradients": 300 + 600 + 400, "thresholds": 300 + 600 + 150}
    assert host["write"] == 600 + 150 + late


def test_the_parts_of_training() -> None:
    host, _ = training_memory(MODEL, MOVING, **TRAINING)
    late = LATE_LIBRARIES_BYTES
    moments, index, mask, gradients = 8 * 70, 4 * 20, 150, 4 * (50 + 60)
    held = 1000 + mask + moments + index + gradients
    train, before = held + int(ALLOCATOR_SHARE * 400), 1000 + mask
    update = held + 8 * 70 + 8 * 50
    assert host["load"] == 1500
    assert host["encode"] == before + int(ALLOCATOR_SHARE * 100) + late
    assert host["train"] == train + late
    assert host["update"] == update + late
    kept = int(RETAINED_SHARE * (max(train, update) - before))
    assert host["compare"] == before + 2 * 500 + max(kept, 9 * 70) + late


def test_on_a_gpu_the_mask_stays_in_main_memory() -> None:
    (with_mask, on_gpu), (without, the_same) = (
        training_memory(MODEL, replace(MOVING, mask=mask), **{**TRAINING, "cuda": True})
        for mask in (True, False)
    )
    assert on_gpu == the_same
    assert with_mask["write"] - without["write"] == with_mask["compare"] - without["compare"] == 150


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"frozen": True}, 4 * 20 + 4 * 70),  # places, and values
        ({"channels_last": True}, 4 * 50),  # places also where all entries move
        ({"optimizer": "adam8bit"}, 2 * 70 + 8 * 70 // 256 - 8 * 70),
        ({"resumed": True}, 12 * 70),
        ({"shards": 2}, -(600 + 8 * 70 + 4 * 20 + 4 * 110) // 2),  # weights, moments, places, gradients
        # weights, gradients and values of half the size; full weights, and full copies of what moves, beside them
        ({"precision": "bf16"}, -300 - 2 * 110 + 600 + 4 * 70),
    ],
)
def test_what_a_setting_takes_while_training(change: dict[str, Any], more: int) -> None:
    usual, _ = training_memory(MODEL, MOVING, **TRAINING)
    other, _ = training_memory(MODEL, MOVING, **{**TRAINING, **change})
    assert other["train"] - usual["train"] == more


# ---- measured

WIDE_UNET = {"model_channels": 96, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2}
MEASURED = """
import json, sys
from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.preflight import plan_mask, plan_training

stage, keys, base = json.loads(sys.argv[1])
algorithm, plan = {
    "mask": (MaskingAlgorithm, plan_mask), "train": (SaliencyUnlearningAlgorithm, plan_training),
}[stage]
if base:
    from mu.algorithms.saliency_unlearning.configs import PACKAGED, MaskConfig, TrainConfig
    from mu.config import load_config
    cls = MaskConfig if stage == "mask" else TrainConfig
    keys = load_config(cls, config_path=base, packaged=PACKAGED, overrides=keys)
made = algorithm(keys)
planned = plan(made.config)
made.run()
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
# Not ru_maxrss, which begins at what the process that started this one held.
print(json.dumps([planned.memory, int(status["VmHWM"].split()[0]) * 1024]))
"""


def estimated_and_measured(stage: str, keys: dict[str, Any], base: str | None, cwd: Path) -> float:
    """Estimate / measurement of the peak of a process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps([stage, keys, base])],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    phases, measured = json.loads(done.stdout.splitlines()[-1])
    estimate = max(phases.values())
    told = {name: count // 2**20 for name, count in phases.items()}
    print(f"{stage} {keys}: estimate {estimate / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB; {told}")
    return float(estimate / measured)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys of a model as SD v1 is built, narrower, with its autoencoder and text encoder; 8 images of 128 px each."""
    folder = tmp_path_factory.mktemp("wide")
    content = yaml.safe_load((PACKAGED / "model_config.yaml").read_text(encoding="utf-8"))
    content["model"]["params"]["unet_config"]["params"].update(WIDE_UNET)
    (folder / "model.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    model = load_model(folder / "model.yaml")
    randomise(model.unet, 0)
    save_checkpoint(model, folder / "model.safetensors")
    for kind in ("forget", "retain"):
        for number in range(8):
            save_png(torch.rand(3, 128, 128) * 2 - 1, folder / kind / f"{number}.png")
    return {
        "ckpt_path": str(folder / "model.safetensors"),
        "model_config_path": str(folder / "model.yaml"),
        "devices": "cpu",
        "dataset_type": "folder",
        "template_name": "noise",
        "raw_dataset_dir": str(folder / "forget"),
        "retain_dataset_dir": str(folder / "retain"),
        "forget_prompts": ["a picture"],
        "retain_prompts": ["another picture"],
        "substitute": "something else",
        "processed_dataset_dir": str(folder / "processed"),
        "image_size": 128,
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("stage", ["mask", "full", "xattn"])
def test_the_estimate_is_within_20_percent_for_a_wide_model(
    wide: dict[str, Any], tmp_path: Path, stage: str, batch_size: int
) -> None:
    keys = {**wide, "batch_size": batch_size, "output_dir": str(tmp_path)}
    if stage != "mask":
        keys |= {"train_method": stage, "masking": "random", "epochs": 1, "sample_prompts": []}
        keys["target"] = "frozen" if stage == "xattn" else "current"
    ratio = estimated_and_measured("mask" if stage == "mask" else "train", keys, None, tmp_path)
    assert 0.8 < ratio < 1.2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_the_estimate_is_within_20_percent_for_the_packaged_configs(tmp_path: Path) -> None:
    assert resolve_path("package:assets/emoji_canvas/model.safetensors").exists()
    fewer = {"images_per_prompt": 2, "retain_images_per_prompt": 1, "sample_steps": 2}  # quicker, not smaller
    ratio = estimated_and_measured("mask", fewer, "emoji_canvas/mask_style.yaml", tmp_path)
    assert 0.8 < ratio < 1.2
    keys = {**fewer, "epochs": 2}
    ratio = estimated_and_measured("train", keys, "emoji_canvas/train_style.yaml", tmp_path)
    assert 0.8 < ratio < 1.2
