"""Images from a checkpoint: prompts and seeds in, PNG files and a grid out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mu.algorithms.saliency_unlearning.configs import SampleConfig
from mu.algorithms.saliency_unlearning.utils import model_of
from mu.config import require_paths
from mu.datasets.images import save_png, to_picture
from mu.errors import MuError
from mu.ldm import LatentDiffusion
from mu.ldm.sampler import sample_ddim
from mu.pictures import image_grid
from mu.run_folder import RunFolder

_log = logging.getLogger(__name__)


class SamplingError(MuError, ArithmeticError):
    """The model gave an image that is none."""


@torch.no_grad()
def sample_images(
    model: LatentDiffusion,
    pairs: Sequence[tuple[str, int]],
    *,
    steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    batch_size: int = 8,
    image_size: int | None = None,
) -> Iterator[Tensor]:
    """One image for each (prompt, seed). A seed belongs to its image: the batch it is in does not matter.

    Yields:
        (3, H, W), about [-1, 1], on the CPU.
    """
    uncond_context = model.embed([""])  # (1, L, D)
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        latents = sample_ddim(
            model,
            model.embed([prompt for prompt, _ in batch]),
            shape=model.latent_shape(image_size),
            steps=steps,
            guidance_scale=guidance_scale,
            uncond_context=uncond_context,
            eta=eta,
            generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
        )  # (B, C, h, w)
        yield from model.decode(latents).float().cpu()


def run(config: SampleConfig) -> dict[str, Any]:
    """Sample every prompt with every seed into a new run folder.

    Returns:
        `run`, the folder; `images`, how many; `grid`, its path (with `grid: true`).

    Raises:
        ConfigError: a path is missing.
        CheckpointError: the checkpoint cannot be read.
        SamplingError: an image has NaN or Inf; it is not written.
    """
    require_paths(config)
    prompts = config.all_prompts()
    with contextlib.closing(RunFolder.create(config.output_dir, "sample")) as folder:
        folder.save_config(config)
        model = model_of(config)
        pairs = [(prompt, seed) for prompt in prompts for seed in config.seeds]
        images = []
        sampled = sample_images(
            model,
            pairs,
            steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
            eta=config.eta,
            batch_size=config.batch_size,
        )
        names = [f"{i:04d}_{seed}.png" for i, _ in enumerate(prompts) for seed in config.seeds]
        with tqdm(total=len(pairs), desc="sampling", unit="image", disable=None) as progress:
            for name, image, (prompt, seed) in zip(names, sampled, pairs, strict=True):
                if not torch.isfinite(image).all():
                    raise SamplingError(f"the image of {prompt!r} with seed {seed} contains NaN or Inf")
                save_png(image, folder.path / "images" / name)
                images.append(image)
                progress.update()
        index = [
            {"file": f"images/{name}", "prompt": prompt, "seed": seed}
            for name, (prompt, seed) in zip(names, pairs, strict=True)
        ]
        folder.save_json("images.json", index)
        folder.save_environment()
        result: dict[str, Any] = {"run": folder.path, "images": len(images)}
        if config.grid:
            width = len(config.seeds)
            pictures = [to_picture(image) for image in images]
            rows = [pictures[first : first + width] for first in range(0, len(pictures), width)]
            result["grid"] = folder.path / "grid.png"
            headings = [f"seed {seed}" for seed in config.seeds]
            image_grid(rows, prompts, headings, cell_px=max(64, pictures[0].width)).save(result["grid"])
        _log.info("wrote %d images to %s", len(images), folder.path / "images")
        return result
