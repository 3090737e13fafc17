"""What a training run shows of itself at chosen steps: validation losses, and pictures of fixed prompts and seeds.

Neither touches what is trained: nothing is drawn from a random stream that training reads, and no gradient is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from mu import ranks
from mu.algorithms.saliency_unlearning.trainer import (
    ForgetBatch,
    RetainBatch,
    SaliencyUnlearnTrainer,
    salun_loss,
)
from mu.arithmetic import products
from mu.datasets.encoded import EncodedRows
from mu.datasets.streams import order
from mu.run_folder import MetricsCsv, RunFolder
from mu.unlearning.batches import TrainSteps
from mu.unlearning.compute import encoders_at_hand
from mu.unlearning.progress_pictures import ProgressPictures
from mu.unlearning.runs import decorating
from mu.unlearning.training_config import TrainingKeys

TERMS = ("loss", "forget", "retain")


class Progress(pl.Callback):
    """Validation losses into `validation.csv`, pictures into `pictures/step_<step>.png`, both into the run's loggers.

    Args:
        config: `validate_every_steps` and `validation_draws`, `sample_every_steps`, `wandb_unsafe_pictures`.
        steps: the images that validation reads; only asked for where it is on.
        pictures: takes the pictures, at the trained weights of that step.
        folder: of the run.
    """

    def __init__(
        self, config: TrainingKeys, steps: TrainSteps, pictures: ProgressPictures, folder: RunFolder
    ) -> None:
        self.config = config
        self.pictures = pictures
        self.folder = folder
        self.csv = MetricsCsv(folder.path / "validation.csv", writes=ranks.is_main())
        self.batches = (
            fixed_batches(steps, draws=config.validation_draws, batch_size=config.batch_size)
            if config.validate_every_steps is not None
            else []
        )

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if self.batches and trainer.global_step == 0:
            self._validate(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.batches and _is_due(step, self.config.validate_every_steps):
            self._validate(trainer, module)
        if _is_due(step, self.config.sample_every_steps):
            path = self.folder.path / "pictures" / f"step_{step:06d}.png"
            drawn = False
            with decorating(f"pictures/{path.name}"), encoders_at_hand(self.pictures.model):
                self.pictures.snapshot(f"step {step}", path)
                drawn = True
            for logger in trainer.loggers if drawn else ():
                with decorating(f"pictures in {type(logger).__name__}"):
                    self._send(logger, path, step)

    def _send(self, logger: Logger, path: Path, step: int) -> None:
        """Pictures to a logger; those that may be unsafe leave this machine only when asked."""
        if isinstance(logger, WandbLogger):
            if self.config.template != "i2p" or self.config.wandb_unsafe_pictures:
                logger.log_image("pictures", [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB"))  # (H, W, 3)
            logger.experiment.add_image("pictures", pixels, step, dataformats="HWC")

    def _validate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, SaliencyUnlearnTrainer)
        losses: dict[str, float] = {}
        with decorating(f"validation at step {trainer.global_step}"), products(tf32=False):
            losses = validation_losses(module, self.batches)
            self.csv.append(trainer.global_step, **losses)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"validation/{name}": value for name, value in losses.items()}, step=trainer.global_step
            )


def fixed_batches(steps: TrainSteps, *, draws: int, batch_size: int) -> list[tuple[ForgetBatch, RetainBatch]]:
    """The batches of a validation, the same at every step.

    Args:
        steps: what training reads. Images are taken evenly from those to forget and from those to retain, with
            timesteps evenly over the whole schedule, and with noise that training does not draw.
        draws: (image, timestep, noise) of each of the two losses.
        batch_size: draws at once; not what comes out.
    """
    spaced = [(2 * i + 1) * steps.num_timesteps // (2 * draws) for i in range(draws)]
    # In another order than the images, which are sorted by concept.
    timesteps = torch.tensor([spaced[i] for i in order(steps.seed, "validation", 0, draws)])  # (draws,)
    forget, retain = _spread(steps.forget, draws), _spread(steps.retain, draws)
    batches = []
    for first in range(0, draws, batch_size):
        part = slice(first, first + batch_size)
        drawn = []
        for rows, wanted in ((steps.forget, forget[part]), (steps.retain, retain[part])):
            latents, _, noise = rows.batch(
                wanted, seed=steps.seed, stage="validation", num_timesteps=steps.num_timesteps
            )  # (B, C, h, w), (B,), (B, C, h, w)
            drawn.append((latents, timesteps[part], noise, rows.context(wanted)))
        batches.append(((*drawn[0], steps.forget.substitute_context(forget[part])), drawn[1]))
    return batches


@torch.no_grad()
def validation_losses(
    trainer: SaliencyUnlearnTrainer, batches: Sequence[tuple[ForgetBatch, RetainBatch]]
) -> dict[str, float]:
    """`loss`, `forget` and `retain` as `salun_loss`, means over all draws; in fp32, with the weights as they are."""
    device = trainer.model.ldm.device
    sums = torch.zeros(len(TERMS), dtype=torch.float64)
    for forget, retain in batches:
        terms = salun_loss(
            trainer.model.ldm,
            _to(forget, device),
            _to(retain, device),
            trainer.alpha,
            trainer.target_model,
            retain_model=trainer.retain_model,
        )
        sums += len(forget[0]) * torch.stack(terms).double().cpu()
    means = sums / sum(len(forget[0]) for forget, _ in batches)
    return dict(zip(TERMS, means.tolist(), strict=True))


def _spread(rows: EncodedRows, draws: int) -> list[tuple[int, int]]:
    """(epoch, place) of so many draws, evenly over the encoded rows; with fewer rows, each in several epochs."""
    places = sorted(rows.slots)
    count = min(draws, len(places))
    chosen = [places[i * len(places) // count] for i in range(count)]
    return [(i // count, chosen[i % count]) for i in range(draws)]


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _to(batch: Any, device: torch.device) -> Any:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return tuple(map(moved, batch))
