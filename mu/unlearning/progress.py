"""What a run shows of itself: validation losses, and pictures of fixed prompts and seeds.

Neither touches what is trained: nothing is drawn from a random stream that training reads, and no gradient is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mu import ranks
from mu.arithmetic import products
from mu.bars import bar
from mu.datasets.images import to_picture
from mu.datasets.index import concept_label
from mu.ldm import LatentDiffusion
from mu.ldm.text_to_image import sample_images
from mu.pictures import image_grid
from mu.run_folder import MetricsCsv, RunFolder
from mu.unlearning.batches import Batch, Batches
from mu.unlearning.compute import encoders_at_hand
from mu.unlearning.config import OutputKeys
from mu.unlearning.loggers import LossLog, RunLogger
from mu.unlearning.runs import decorating
from mu.unlearning.training_config import TrainingKeys

_PROMPTS_OF_EACH_KIND = 4

Losses = Callable[[Batch], Mapping[str, Tensor]]
"""Gives `loss` and its terms of a batch, without gradient."""


class Progress:
    """Validation losses into `validation.csv`, pictures into `pictures/step_<step>.png`, both into the run's logger.

    Args:
        config: `validate_every_steps` and `sample_every_steps`.
        batches: of the training; their validation batches are only asked for where validation is on.
        pictures: takes the pictures, at the trained weights of a step.
        folder: of the run.
        logger: of the run.
    """

    def __init__(
        self,
        config: TrainingKeys,
        batches: Batches,
        pictures: ProgressPictures,
        *,
        folder: RunFolder,
        logger: RunLogger,
    ) -> None:
        self.pictures = pictures
        self.folder = folder
        self.logger = logger
        self.validate_every = config.validate_every_steps
        self.sample_every = config.sample_every_steps
        self.csv = MetricsCsv(folder.path / "validation.csv")
        self.batches = batches.validation() if self.validate_every is not None else ()

    def look(self, step: int, losses: Losses) -> None:
        """Look at the model after so many steps, if it is time; in the main process alone."""
        if not ranks.is_main():
            return
        if self.batches and self.validate_every is not None and step % self.validate_every == 0:
            self._validate(step, losses)
        if step and self.sample_every is not None and step % self.sample_every == 0:
            self._sample(step)

    def _validate(self, step: int, losses: Losses) -> None:
        means: dict[str, float] = {}
        with decorating(f"validation at step {step}"), products(tf32=False):
            means = validation_losses(losses, self.batches)
            self.csv.append(step, **means)
        self.logger.metrics({f"validation/{name}": value for name, value in means.items()}, step)

    def _sample(self, step: int) -> None:
        path, drawn = self.folder.path / "pictures" / f"step_{step:06d}.png", False
        with decorating(f"pictures/{path.name}"), encoders_at_hand(self.pictures.model):
            self.pictures.snapshot(f"step {step}", path)
            drawn = True
        if drawn:
            with decorating("pictures in the logger"):
                self.logger.picture(path, step)


def validation_losses(losses: Losses, batches: Sequence[Batch]) -> dict[str, float]:
    """`loss`, `forget` and `retain`, means over all images of the batches; a term that the method has not is 0."""
    sums = torch.zeros(len(LossLog.TERMS), dtype=torch.float64)
    with bar("validating", total=len(batches), unit="batches") as progress:
        for batch in batches:
            found = losses(batch)
            terms = [found.get(name, found["loss"].new_zeros(())) for name in LossLog.TERMS]
            sums += len(batch.forget[0]) * torch.stack(terms).double().cpu()
            progress.update()
    means = sums / sum(len(batch.forget[0]) for batch in batches)
    return dict(zip(LossLog.TERMS, means.tolist(), strict=True))


class ProgressPictures:
    """Samples a few prompts whenever asked, and writes them side by side, the forgotten prompts marked.

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

    def draw(self, moment: str) -> None:
        """`take`, whose failure is a warning."""
        with decorating(f"pictures {moment}"):
            self.take(moment)

    def save(self, path: Path) -> Path | None:
        """Write one row a prompt, one column a moment and seed; a failure is a warning.

        Returns:
            The path; None where nothing was taken, or written.
        """
        written = None
        if self._taken:
            with decorating(path.name):
                written = self._write(self._taken, path)
        return written

    def snapshot(self, moment: str, path: Path) -> Path:
        """Sample all prompts with all seeds, and write them by themselves; nothing of it is kept for `save`."""
        return self._write({moment: self._sample(moment)}, path)

    def _sample(self, moment: str) -> list[Tensor]:
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.config.sample_seeds]
        with bar(f"drawing pictures {moment}", total=len(pairs), unit="images") as progress:
            return list(
                sample_images(
                    self.model,
                    pairs,
                    steps=self.config.sample_steps,
                    guidance_scale=self.config.guidance_scale,
                    image_size=self.config.image_size,
                    precision=self.config.sample_precision,
                    done=progress.update,
                )
            )

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
            title=f"{self.config.template} {concept_label(self.config.template_name).replace('_', ' ')} forgotten; "
            f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
            cell_px=max(64, min(256, rows[0][0].width)),
        ).save(path)
        return path


def _spread(prompts: Sequence[str]) -> list[str]:
    prompts = list(dict.fromkeys(prompts))
    count = min(_PROMPTS_OF_EACH_KIND, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]
