"""What the written file draws, beside what the model drew before: same prompts, same noise; and how far they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mu.bars import bar
from mu.config import override
from mu.datasets.images import to_picture
from mu.ldm.text_to_image import sample_images
from mu.pictures import image_grid, write_png
from mu.unlearning.config import OutputKeys, model_of

MOST_FORGOTTEN, MOST_KEPT = 6, 10
SEEDS = (188, 288)


@dataclass(frozen=True)
class Moved:
    """How far pictures moved: the root mean square of the difference of pixels in [-1, 1], so from 0 to 2.

    It says that something changed, and not what: whether a concept is still to be seen, eyes or a classifier tell.
    """

    forgotten: dict[str, float]
    """Prompt -> mean over its seeds."""
    kept: dict[str, float]
    yardstick: float
    """As far apart two pictures of one prompt were before, that begin from different noise."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "forgotten": _mean(self.forgotten.values()),
            "kept": _mean(self.kept.values()),
            "two_seeds_of_one_prompt_before": self.yardstick,
            "n_pictures": {
                "forgotten": len(SEEDS) * len(self.forgotten),
                "kept": len(SEEDS) * len(self.kept),
            },
            "by_prompt": {"forgotten": self.forgotten, "kept": self.kept},
        }


def shown_prompts(forgotten: Sequence[str], kept: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts that are drawn, evenly from all."""
    return _evenly(forgotten, MOST_FORGOTTEN), _evenly(kept, MOST_KEPT)


def compare(
    config: OutputKeys,
    written: Path,
    forgotten: Sequence[str],
    kept: Sequence[str],
    *,
    path: Path,
    title: str,
) -> Moved:
    """Draw some prompts by the model as it was and by the written file, and put them side by side into one picture.

    Args:
        config: of the training; the model as it was is its `ckpt_path`.
        written: the unlearned checkpoint.
        path: of the picture, a row a prompt, the forgotten ones first and framed.
    """
    to_forget, to_keep = shown_prompts(forgotten, kept)
    prompts = [*to_forget, *to_keep]
    pairs = [(prompt, seed) for prompt in prompts for seed in SEEDS]
    drawn: dict[str, list[Tensor]] = {}
    for moment, source in (("before", config.ckpt_path), ("after", str(written))):
        # The written file has the model's UNet and, where it is asked for, its EMA copy in it.
        of_moment = override(config, ckpt_path=source, use_ema=config.use_ema and moment == "before")
        model = model_of(of_moment)
        sampled = sample_images(
            model,
            pairs,
            steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
            image_size=config.image_size,
            precision=config.sample_precision,
        )
        with bar(f"drawing pictures {moment}", total=len(pairs), unit="pictures") as shown:
            drawn[moment] = []
            for image in sampled:
                drawn[moment].append(image)
                shown.update()
        del model, sampled

    # How far each moved; and, to compare with, how far apart the seeds of a prompt were.
    count = len(SEEDS)
    before, after = drawn["before"], drawn["after"]
    moved = [_distance(one, other) for one, other in zip(before, after, strict=True)]
    by_prompt = {
        prompt: _mean(moved[count * place : count * (place + 1)]) for place, prompt in enumerate(prompts)
    }
    apart = [_distance(before[count * i], before[count * i + 1]) for i in range(len(prompts))]
    rows = [
        [to_picture(image) for images in (before, after) for image in images[first : first + count]]
        for first in range(0, len(pairs), count)
    ]
    picture = image_grid(
        rows,
        [f"{prompt} (moved {by_prompt[prompt]:.2f})" for prompt in prompts],
        [f"{moment}, {seed}" for moment in drawn for seed in SEEDS],
        mark_row=range(len(to_forget)),
        title=title,
        cell_px=max(64, min(192, rows[0][0].width)),
    )
    write_png(path, picture)
    return Moved(
        {prompt: by_prompt[prompt] for prompt in to_forget},
        {prompt: by_prompt[prompt] for prompt in to_keep},
        _mean(apart),
    )


def _distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference of two images (3, H, W), cut to [-1, 1]."""
    return float((one.clamp(-1, 1) - other.clamp(-1, 1)).square().mean().sqrt())


def _mean(values: Any) -> float:
    found = list(values)
    return math.fsum(found) / len(found) if found else math.nan


def _evenly(prompts: Sequence[str], most: int) -> list[str]:
    different = list(dict.fromkeys(prompts))
    count = min(most, len(different))
    return [different[i * len(different) // count] for i in range(count)]
