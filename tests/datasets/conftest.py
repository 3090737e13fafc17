"""A tiny latent diffusion model that embeds prompts without transformers, and folders of drawn images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.model_config import AutoencoderParams, LatentDiffusionParams, UNetParams


class HashedPrompts(nn.Module):
    """A prompt's embedding (7, 8) is random numbers seeded by its text; counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.calls: list[str] = []

    def forward(self, prompts: list[str]) -> Tensor:
        self.calls += prompts
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little") for prompt in prompts]
        return self.gain * torch.stack(
            [torch.randn(7, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )


def build_model(seed: int = 0) -> LatentDiffusion:
    """Images of 16 px, latents of 4 x 8 x 8, 20 timesteps."""
    torch.manual_seed(seed)
    params = LatentDiffusionParams(
        unet=UNetParams(
            in_channels=4,
            out_channels=4,
            model_channels=32,
            attention_resolutions=(1,),
            num_res_blocks=1,
            channel_mult=(1,),
            num_heads=2,
            context_dim=8,
            image_size=8,
        ),
        first_stage=AutoencoderParams(
            embed_dim=4,
            z_channels=4,
            resolution=16,
            in_channels=3,
            out_ch=3,
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
        ),
        cond_stage=None,
        timesteps=20,
        scale_factor=0.5,
    )
    model = LatentDiffusion(params)
    for name, parameter in model.unet.named_parameters():
        if name.startswith("out."):  # zero at first: without this all predictions would be zero
            nn.init.normal_(parameter, std=0.1)
    model.cond_stage_model = HashedPrompts()
    return model.eval()


@pytest.fixture
def model() -> LatentDiffusion:
    return build_model()


@pytest.fixture
def other_model() -> LatentDiffusion:
    return build_model(seed=1)


@pytest.fixture
def draw_canvas(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder <Style>/<Class>/<n>.jpg, each image of another colour."""

    def draw(styles: list[str], objects: list[str], count: int, size: int = 20) -> Path:
        root = tmp_path / "canvas"
        number = 0
        for style in styles:
            for object in objects:
                (root / style / object).mkdir(parents=True)
                for n in range(1, count + 1):
                    number += 1
                    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
                    Image.new("RGB", (size, size + 4), colour).save(root / style / object / f"{n}.jpg")
        return root

    return draw
