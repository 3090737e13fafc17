"""Pictures of a run: the same prompts and seeds before and after, the forgotten prompts marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from mu.datasets.images import to_picture
from mu.datasets.index import concept_label
from mu.ldm import LatentDiffusion
from mu.ldm.text_to_image import sample_images
from mu.pictures import image_grid
from mu.unlearning.config import OutputKeys
from mu.verbosity import bars_off

_PROMPTS_OF_EACH_KIND = 4


class ProgressPictures:
    """Samples a few prompts whenever asked, and writes them side by side.

    Args:
        config: `sample_prompts` (null: some of those given here), `sample_seeds`, and how to sample.
        model: sampled as it is at the time of `take`.
        forget, retain: all prompts that are forgotten, and those that are retained.
    """

    def __init__(
        self, config: OutputKeys, model: LatentDiffusion, forget: Sequence[str], retain: Sequence[str]
    ) -> None:
        self.config = config
        self.model = model
        forgotten = set(forget)
        own = config.sample_prompts
        chosen = _spread(forget) + _spread(retain) if own is None else list(own)
        # Forgotten prompts first, so that one frame marks them all.
        self.prompts = sorted(chosen, key=lambda prompt: prompt not in forgotten)
        self._forgotten = sum(prompt in forgotten for prompt in chosen)
        self._taken: dict[str, list[Tensor]] = {}  # moment -> prompts x seeds images, row-major

    def take(self, moment: str) -> None:
        """Sample all prompts with all seeds, under the name of a moment such as "before"."""
        if self.prompts:
            self._taken[moment] = self._sample(moment)

    def save(self, path: Path) -> Path | None:
        """Write one row a prompt, one column a moment and seed. Returns the path, None when there are no prompts."""
        return self._write(self._taken, path) if self._taken else None

    def snapshot(self, moment: str, path: Path) -> Path:
        """Sample all prompts with all seeds, and write them by themselves; nothing of it is kept for `save`."""
        return self._write({moment: self._sample(moment)}, path)

    def _sample(self, moment: str) -> list[Tensor]:
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.config.sample_seeds]
        sampled = sample_images(
            self.model,
            pairs,
            steps=self.config.sample_steps,
            guidance_scale=self.config.guidance_scale,
            image_size=self.config.image_size,
            precision=self.config.sample_precision,
        )
        return list(tqdm(sampled, total=len(pairs), desc=f"pictures {moment}", disable=bars_off()))

    def _write(self, taken: Mapping[str, Sequence[Tensor]], path: Path) -> Path:
        seeds = self.config.sample_seeds
        rows = [
            [to_picture(image) for images in taken.values() for image in images[first : first + len(seeds)]]
            for first in range(0, len(self.prompts) * len(seeds), len(seeds))
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(
            rows,
            self.prompts,
            [moment for moment in taken for _ in seeds],
            mark_row=range(self._forgotten),
            title=f"{self.config.template} {concept_label(self.config.template_name)} forgotten; "
            f"seeds {', '.join(map(str, seeds))}",
            cell_px=max(64, min(256, rows[0][0].width)),
        ).save(path)
        return path


def _spread(prompts: Sequence[str]) -> list[str]:
    """A few different ones, evenly over all."""
    prompts = list(dict.fromkeys(prompts))
    count = min(_PROMPTS_OF_EACH_KIND, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]
