"""About how long it will take: each kind of work is done once, by the model itself on this machine, and multiplied.

The model that is timed is a copy of its own, and is thrown away: one training step has moved it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mu.algorithms.esd.algorithm import ESDAlgorithm, Prompts
from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.masking import accumulate_saliency
from mu.bars import waiting
from mu.config import override
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.evaluation.config import EvaluateConfig
from mu.evaluation.grid import Grid
from mu.ldm import LatentDiffusion
from mu.ldm.sampler import sample_ddim
from mu.ldm.text_to_image import sampling_precision
from mu.unlearning.batches import Batch, ForgetBatch, RetainBatch
from mu.unlearning.compute import Compute, choose, computing
from mu.unlearning.config import ComputeKeys, OutputKeys, model_of
from mu.unlearning.image_data import SAMPLE_BATCH
from mu.unlearning.method import Loaded
from mu.unlearning.trainer import Trainer
from mu.unlearning.training_config import TrainingKeys

_SLOW_S = 2.0
"""What takes longer for one image is not done for a whole batch, but multiplied."""
_ENOUGH_S = 4.0
"""What has taken so long in all is not timed once more."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of one of each, in the batches that a run has."""

    loading: float
    """The model, from the disk."""
    sampling_step: Mapping[str, float]
    """Precision -> one DDIM step of one image."""
    decoding: float
    encoding: float
    mask_batch: float
    training_step: float
    scored_before: int
    """Pictures of the model before that are scored and lie there already, from another forgetting."""

    def drawing(self, images: int, *, steps: int, precision: str) -> float:
        """Seconds to draw so many images."""
        return images * (steps * self.sampling_step[precision] + self.decoding)


UNTIMED = Timed(
    loading=math.nan,
    sampling_step=defaultdict(lambda: math.nan),
    decoding=math.nan,
    encoding=math.nan,
    mask_batch=math.nan,
    training_step=math.nan,
    scored_before=0,
)
"""Of a model that was not asked."""


def timed(train: OutputKeys, mask: MaskConfig | None = None, scores: EvaluateConfig | None = None) -> Timed:
    """Time one of each kind of work; it takes seconds, for Stable Diffusion on a CPU minutes.

    Args:
        train, mask, scores: the configs of the stages.

    Raises:
        CheckpointError: the model cannot be loaded.
        OutOfMemoryError: memory does not suffice for one image.
    """
    started = time.perf_counter()
    model = model_of(train)
    loading = time.perf_counter() - started
    with waiting("timing one step of each kind"):
        shape = model.latent_shape(train.image_size)

        # 1. Drawing: a DDIM step of a batch, and what is done with each image. What lies there already is told by the
        # model's fingerprint, which the training step changes.
        scored_before = 0 if scores is None else _scored_before(model, scores)
        steps = {}
        for precision in {train.sample_precision, *([] if scores is None else [scores.precision])}:
            batch = _of_a_batch(partial(_sample, model, train, shape, precision), SAMPLE_BATCH, model)
            steps[precision] = batch / SAMPLE_BATCH
        latent = torch.zeros((1, *shape), device=model.device)
        image = torch.zeros((1, 3, *(side * model.params.first_stage.factor for side in shape[1:])))
        with torch.no_grad():
            decoding = _seconds(lambda: model.decode(latent), model)
            encoding = _seconds(lambda: model.encode(image.to(model.device)), model)

        # 2. A batch of the mask.
        mask_batch = 0.0
        if mask is not None:
            compute = choose(mask, model, images=2 * mask.batch_size, latent_shape=shape, reserved=0)
            with computing(model, compute):
                mask_batch = _of_a_batch(
                    lambda count: accumulate_saliency(
                        model, [_forget(model, shape, count)], c_guidance=mask.c_guidance, compute=compute
                    ),
                    mask.batch_size,
                    model,
                )

        # 3. A training step, with the optimizer, under a mask of the same size.
        training_step = _training_step(model, train, shape) if isinstance(train, TrainingKeys) else 0.0
        return Timed(
            loading=loading,
            sampling_step=steps,
            decoding=decoding,
            encoding=encoding,
            mask_batch=mask_batch,
            training_step=training_step,
            scored_before=scored_before,
        )


def _scored_before(model: LatentDiffusion, scores: EvaluateConfig) -> int:
    settings = SampleSettings(scores.sample_steps, scores.guidance_scale, model.image_size, scores.precision)
    images = GeneratedImages(model, scores.output_dir, settings, subfolder="grids").path
    rows = Grid(*scores.all_names(), scores.seeds).rows(images)
    return sum(row.image.is_file() for row in rows)


def _training_step(model: LatentDiffusion, config: TrainingKeys, shape: tuple[int, int, int]) -> float:
    """Seconds of one step, in the mean over a run."""
    if isinstance(config, TrainConfig):
        return _salun_step(model, config, shape)
    assert isinstance(config, ESDConfig)
    algorithm = ESDAlgorithm(config)
    moving = algorithm.moving(model, {})
    batches = Prompts(config, Loaded(model, config.checkpoint(), {})).train_batches
    batch = batches[0]
    half = torch.full((config.batch_size,), batches.stops // 2)  # sampled so far, in the mean

    def erase(count: int) -> Batch:
        return Batch(type(batch.forget)(*(part[:count] for part in batch.forget._replace(steps_done=half))))

    trainer = Trainer(
        moving,
        algorithm.objective(moving),
        lr=config.lr,
        compute=_compute(model, config, shape, batches.part_sizes),
    )
    with computing(model, trainer.compute):
        return _of_a_batch(lambda count: trainer.step(erase(count)), config.batch_size, model)


def _salun_step(model: LatentDiffusion, config: TrainConfig, shape: tuple[int, int, int]) -> float:
    if config.masking == "saliency":
        fraction = config.threshold or TrainConfig().random_fraction
        config = override(config, masking="random", random_fraction=fraction, threshold=None, mask_path=None)
    algorithm = SaliencyUnlearningAlgorithm(config)
    moving = algorithm.moving(model, {})
    sizes = (config.batch_size, config.retain_batch_size or config.batch_size)
    trainer = Trainer(
        moving, algorithm.objective(moving), lr=config.lr, compute=_compute(model, config, shape, sizes)
    )

    def step(count: int) -> object:
        forget = _forget(model, shape, count)
        retain = RetainBatch(*_forget(model, shape, math.ceil(count * sizes[1] / sizes[0]))[:4])
        return trainer.step(Batch(forget, retain))

    with computing(model, trainer.compute):
        return _of_a_batch(step, sizes[0], model)


def _compute(
    model: LatentDiffusion, config: ComputeKeys, shape: tuple[int, int, int], sizes: tuple[int, ...]
) -> Compute:
    return choose(config, model, images=sum(sizes), latent_shape=shape, reserved=0)


def _sample(
    model: LatentDiffusion, config: OutputKeys, shape: tuple[int, int, int], precision: str, count: int
) -> Tensor:
    """One step of DDIM for so many images."""
    half = sampling_precision(precision, model.device) == "bf16"
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        return sample_ddim(
            model,
            _context(model, count),
            shape=shape,
            steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
            uncond_context=_context(model, 1),
            stop_after=1,
        )


def _forget(model: LatentDiffusion, shape: tuple[int, int, int], count: int) -> ForgetBatch:
    """A batch of noise: how long it takes does not depend on what is in it."""
    latents, noise = torch.randn((2, count, *shape), device=model.device)
    timesteps = torch.full((count,), model.num_timesteps // 2, device=model.device)
    context = _context(model, count)
    return ForgetBatch(latents, timesteps, noise, context, context)


def _context(model: LatentDiffusion, count: int) -> Tensor:
    """(count, L, D) of noise, as long as prompts are: the text encoder may be parked."""
    text = model.params.cond_stage
    assert text is not None  # images are drawn from prompts
    return torch.randn((count, text.max_length, text.hidden_size), device=model.device)


def _of_a_batch(work: Callable[[int], object], size: int, model: LatentDiffusion) -> float:
    """Seconds of a batch: of one image first, and if that is slow, so many times that."""
    one = _seconds(lambda: work(1), model)
    return one * size if one > _SLOW_S or size == 1 else _seconds(lambda: work(size), model)


def _seconds(work: Callable[[], object], model: LatentDiffusion) -> float:
    """Seconds of the fastest time of three: the first one also prepares, and other programs only slow it down."""
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < _ENOUGH_S:
        started = time.perf_counter()
        work()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        taken.append(time.perf_counter() - started)
    return min(taken)
