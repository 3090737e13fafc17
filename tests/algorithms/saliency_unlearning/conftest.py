"""A model whose losses and gradients can be written down by hand; and configs of whole runs of a tiny one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import Mask
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.ldm import LatentDiffusion, load_model, save_checkpoint
from mu.ldm.tensor_file import read_state_dict
from mu.unlearning.output import verify_tensors
from tests.conftest import randomise

CHANNELS, SIDE, WIDTH = 4, 3, 5


class LinearUNet(nn.Module):
    """prediction = dropout(signal * x) + prompt @ mean over L of the context."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.signal = nn.Parameter(torch.randn(CHANNELS, generator=generator))
        self.prompt = nn.Parameter(torch.randn(CHANNELS, WIDTH, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        shift = torch.einsum("cd,bd->bc", self.prompt, context.mean(1))  # (B, C)
        return self.dropout(self.signal[:, None, None] * x) + shift[:, :, None, None]  # (B, C, H, W)


class LinearModel(nn.Module):
    """Stands in for `LatentDiffusion`: z_t = 0.8 z + (0.6 + t / 1000) eps. Notes the contexts it is called with."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.unet = LinearUNet(torch.Generator().manual_seed(seed))
        self.first_stage_model = nn.Linear(2, 2)
        self.calls: list[tuple[Tensor, bool]] = []

    def q_sample(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        return 0.8 * latents + (0.6 + timesteps.view(-1, 1, 1, 1) / 1000) * noise

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        assert len(noisy_latents) == len(timesteps) == len(context)
        self.calls.append((context.detach(), torch.is_grad_enabled()))
        dtype = self.unet.signal.dtype
        return self.unet(noisy_latents.to(dtype), context.to(dtype)).float()

    def prediction_target(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        return noise.float()


def linear_batch(images: int, lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    timesteps = torch.randint(0, 1000, (images,), generator=generator)
    latents, noise = normal(images, CHANNELS, SIDE, SIDE), normal(images, CHANNELS, SIDE, SIDE)
    return latents, timesteps, noise, *(normal(images, length, WIDTH) for length in lengths)


def verify_unmasked(model: SaliencyUnlearnModel, original: LatentDiffusion) -> None:
    """The run's own check, on weights in memory: only selected entries differ from those of the model from before."""
    old, new = original.state_dict(), model.ldm.state_dict()
    verify_tensors(old, new, model.selected, before=Path("original"), after=Path("trained"))


def verify_written(before: Path, after: Path, selected: Mask) -> int:
    """The run's own check, on two CompVis files."""
    old, new = read_state_dict(before)[0], read_state_dict(after)[0]
    return verify_tensors(old, new, selected, before=before, after=after)


@pytest.fixture
def linear_model() -> Any:
    return LinearModel()


@pytest.fixture
def make_batch() -> Callable[..., tuple[Tensor, ...]]:
    """make_batch(images, (L, L', ...), seed): latents (B, C, H, W), timesteps, noise, a context of each length."""
    return linear_batch


@dataclass(frozen=True)
class TinyRuns:
    """Configs of runs that take about a second: 2 styles x 2 objects of 16 px, sampled in 2 steps.

    Sampled images and latents are shared by all tests of a session, below `folder`.
    """

    folder: Path
    model_config: Path

    def checkpoint(self, name: str = "tiny") -> Path:
        """`tiny`, `other` (other weights), or `half` (those of `tiny` in fp16)."""
        return self.folder / f"{name}.safetensors"

    def keys(self, **changes: Any) -> dict[str, Any]:
        """Keys that mask and training share: the style Noto is forgotten, 4 images; 2 are retained."""
        return {
            "ckpt_path": str(self.checkpoint()),
            "model_config_path": str(self.model_config),
            "devices": "cpu",
            "dataset_type": "generated",
            "template": "style",
            "template_name": "Noto",
            "styles": ("Noto", "Blob"),
            "objects": ("Cats", "Dogs"),
            "images_per_prompt": 2,
            "retain_images_per_prompt": 1,
            "raw_dataset_dir": None,
            "processed_dataset_dir": str(self.folder / "processed"),
            "image_size": None,
            "sample_steps": 2,
            "guidance_scale": 3.0,
            **changes,
        }

    def mask_config(self, **changes: Any) -> MaskConfig:
        return MaskConfig(**self.keys(**{"output_dir": str(self.folder / "masks"), **changes}))

    def train_config(self, **changes: Any) -> TrainConfig:
        """2 epochs of 2 steps, of 3 images and of 1; no pictures."""
        wanted = {
            "epochs": 2,
            "batch_size": 3,
            "lr": 1e-3,
            "sample_prompts": (),
            "output_dir": str(self.folder / "finetuned_models"),
            **changes,
        }
        return TrainConfig(**self.keys(**wanted))


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path) -> TinyRuns:
    runs = TinyRuns(tmp_path_factory.mktemp("tiny_runs"), tiny_yaml)
    model = load_model(tiny_yaml)
    for name, seed in (("other", 1), ("tiny", 0)):
        randomise(model, seed)
        save_checkpoint(model, runs.checkpoint(name))
    save_checkpoint(model.cast_weights(torch.float16), runs.checkpoint("half"))
    return runs
