"""What the stopwatch measures: the settings of one measurement, and what they are at each scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Nothing heavy is imported here: see stopwatch.py.

SD_V1 = "package:algorithms/saliency_unlearning/configs/model_config.yaml"
EMOJI = "package:assets/emoji_canvas/model"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one process measures; the defaults are the bundled model's."""

    part: str = "prepare"
    arm: str | None = None
    device: str = "cpu"
    folder: str
    """Of the model (model.yaml, model.safetensors) and the images (forget/, retain/); see `prepare`."""
    model_config: str = f"{EMOJI}_config.yaml"
    """YAML of the model, as the key `model_config_path` takes it."""
    checkpoint: str | None = f"{EMOJI}.safetensors"
    """None: random weights."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of the UNet's options in the YAML."""
    image_size: int = 64
    images: int = 60
    """To forget, and as many to retain."""
    mask_batch_size: int = 20
    batch_size: int = 12
    retain_batch_size: int = 20
    epochs: int = 5
    train_method: str = "xattn"
    threshold: float = 0.5
    repeats: int = 3
    """Runs that count, after one that does not."""
    matmul_side: int = 2048
    """Of the square matrices whose product gives the device's rate."""
    autocast: bool = True
    """bf16 autocast of careful's and our two stages."""
    budget_s: float = 20.0
    """No further repeat begins after so many seconds of one measurement."""
    threads: int | None = None


_SD: dict[str, Any] = {"model_config": SD_V1, "checkpoint": None, "train_method": "full"}
_SD_ON_CPU = {**_SD, "image_size": 128, "epochs": 2}
# The job for which numbers are published (UnlearnCanvas, table 2): one style of its sample data set.
_SD_ON_CUDA = {**_SD, "image_size": 512, "matmul_side": 8192}
# A width at which the plain arm still fits a machine of 24 GB: 314 million weights, of which it takes 42 bytes each
# to sort, beside the model. At 224 it takes all of such a machine.
_NARROW = {"overrides": {"model_channels": 192}}


def _batches(size: int) -> dict[str, int]:
    return dict.fromkeys(("mask_batch_size", "batch_size", "retain_batch_size"), size)


_TINY: dict[str, Any] = {
    "checkpoint": None,
    "overrides": {"model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [1, 2]},
    "image_size": 16,
    "images": 4,
    **_batches(2),
    "epochs": 1,
    "train_method": "full",
    "repeats": 2,
    "matmul_side": 64,
}
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "emoji": {"cpu": {}, "cuda": {"matmul_side": 8192}},
    "sd1": {"cpu": {**_SD_ON_CPU, "images": 4, **_batches(2)}, "cuda": {**_SD_ON_CUDA, **_batches(4)}},
    "sd1-narrow": {
        "cpu": {**_SD_ON_CPU, **_NARROW, "images": 8, "repeats": 2, **_batches(4)},
        "cuda": {**_SD_ON_CUDA, **_NARROW, **_batches(4)},
    },
    "tiny": {"cpu": _TINY, "cuda": _TINY},  # for the tests: a model of a moment
}
"""Scale -> device -> fields of `Spec` with other values than its own."""
