"""What the stopwatch measures at each scale, where no flag says otherwise."""

from __future__ import annotations

from typing import Any

SD_V1 = "package:algorithms/saliency_unlearning/configs/model_config.yaml"
EMOJI = "package:assets/emoji_canvas/model"
_SD: dict[str, Any] = {
    "model_config": SD_V1,
    "checkpoint": None,
    "overrides": {},
    "train_method": "full",
    "threshold": 0.5,
    "repeats": 3,
    "matmul_side": 2048,
}
_ON_CPU = {"image_size": 128, "mask_batch_size": 4, "batch_size": 4, "retain_batch_size": 4, "epochs": 2}
# The job for which numbers are published (UnlearnCanvas, table 2): one style of its sample data set.
_ON_CUDA = {
    "image_size": 512,
    "matmul_side": 8192, "images": 60, "mask_batch_size": 4, "batch_size": 4, "retain_batch_size": 4, "epochs": 5,
}  # fmt: skip
_EMOJI: dict[str, Any] = {
    "model_config": f"{EMOJI}_config.yaml",
    "checkpoint": f"{EMOJI}.safetensors",
    "overrides": {},
    "image_size": 64,
    "images": 60,
    "mask_batch_size": 20,
    "batch_size": 12,
    "retain_batch_size": 20,
    "epochs": 5,
    "train_method": "xattn",
    "threshold": 0.5,
    "repeats": 3,
}
_TINY: dict[str, Any] = {
    **_EMOJI,
    "checkpoint": None,
    "overrides": {"model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [1, 2]},
    "image_size": 16,
    "images": 4,
    "mask_batch_size": 2,
    "batch_size": 2,
    "retain_batch_size": 2,
    "epochs": 1,
    "train_method": "full",
    "repeats": 2,
    "matmul_side": 64,
}
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "emoji": {"cpu": {**_EMOJI, "matmul_side": 2048}, "cuda": {**_EMOJI, "matmul_side": 8192}},
    "sd1": {
        "cpu": {**_SD, **_ON_CPU, "images": 4, "mask_batch_size": 2, "batch_size": 2, "retain_batch_size": 2},
        "cuda": {**_SD, **_ON_CUDA},
    },
    # A width at which the plain arm still fits a machine of 24 GB: 314 million weights, of which it takes 42 bytes each
    # to sort, beside the model. At 224 it takes all of such a machine.
    "sd1-narrow": {
        "cpu": {**_SD, **_ON_CPU, "images": 8, "repeats": 2, "overrides": {"model_channels": 192}},
        "cuda": {**_SD, **_ON_CUDA, "overrides": {"model_channels": 192}},
    },
    "tiny": {"cpu": _TINY, "cuda": _TINY},  # for the tests: a model of a moment
}
"""Scale -> device -> the fields of `stopwatch_setup.Spec` that are its own."""
