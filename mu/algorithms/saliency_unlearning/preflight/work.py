"""How much a run computes: FLOPs of each of its phases."""

from __future__ import annotations

from mu.algorithms.saliency_unlearning.compute import Compute
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.passes import Pass, decoding_pass, encoding_pass, forward_pass
from mu.algorithms.saliency_unlearning.preflight.seconds import Work
from mu.algorithms.saliency_unlearning.preflight.subject import Subject

PICTURE_BATCH = 8
"""Images of the pictures before and after that are sampled at once."""
_PROMPTS = 8
_MASK_TIMES, _TRAINING_TIMES = 4, 11
"""How often a run reads, hashes or writes the whole model, about."""


def mask_work(config: MaskConfig, subject: Subject, compute: Compute, gradients: Pass, pieces: float) -> Work:
    """The work of a mask, in so many passes with gradient."""
    flops = _flops_before(config, subject)
    flops["gradients"] = gradients.flops * pieces
    return _work(subject, compute, flops, images=config.batch_size, times=_MASK_TIMES)


def training_work(
    config: TrainConfig,
    subject: Subject,
    compute: Compute,
    gradients: Pass,
    *,
    pieces: float,
    predicted: float,
) -> Work:
    """Args: pieces, passes with gradient of the whole run; predicted, images whose targets are predicted."""
    flops = _flops_before(config, subject)
    one = _prediction(subject)
    flops["train"] = gradients.flops * pieces + one * predicted
    if config.sample_prompts != ():
        prompts = _PROMPTS if config.sample_prompts is None else len(config.sample_prompts)
        flops["pictures"] = 2 * prompts * len(config.sample_seeds) * _sampling(config, subject)
    return _work(subject, compute, flops, images=config.batch_size, times=_TRAINING_TIMES)


def with_gradient(config: TrainConfig, steps: int, forget: int, retain: int) -> int:
    """Images that go through the UNet with gradient in all steps."""
    parts = {"salun": (1, 1), "ascent": (1, 0), "retain": (0, 1)}[config.objective]
    return parts[0] * config.epochs * forget + parts[1] * steps * retain


def predicted(config: TrainConfig, steps: int, forget: int, retain: int) -> int:
    """Images of which a target is predicted, without gradient."""
    if config.objective != "salun":
        return 0
    return config.epochs * forget + (steps * retain if config.retain_target == "frozen" else 0)


def _work(subject: Subject, compute: Compute, flops: dict[str, float], *, images: int, times: int) -> Work:
    return Work(
        unet=subject.params.unet,
        images=images,
        latent_shape=subject.latent_shape,
        precision=compute.precision,
        device=str(subject.device),
        flops=flops,
        file_bytes=times * subject.model.whole,
    )


def _flops_before(config: MaskConfig | TrainConfig, subject: Subject) -> dict[str, float]:
    """Phase -> FLOPs of sampling and encoding what is not there yet. Latents are taken not to be."""
    device = str(subject.device)
    encoded = encoding_pass(subject.params.first_stage, subject.image_size, device=device).flops
    to_sample = subject.images["to_sample"]
    return {
        "sample": to_sample * _sampling(config, subject) if to_sample else 0,
        "encode": encoded * (len(subject.rows.forget) + len(subject.rows.retain)),
    }


def _sampling(config: MaskConfig | TrainConfig, subject: Subject) -> float:
    """FLOPs of an image that is sampled."""
    decoded = decoding_pass(subject.params.first_stage, 1, subject.latent_shape, device=str(subject.device))
    branches = 1 if config.guidance_scale == 1 else 2
    return branches * config.sample_steps * _prediction(subject) + decoded.flops


def _prediction(subject: Subject) -> float:
    """FLOPs of one image that goes through the UNet."""
    count = 2 * PICTURE_BATCH  # as in the estimate of memory, so that it is counted once
    return (
        forward_pass(subject.params.unet, count, subject.latent_shape, device=str(subject.device)).flops
        / count
    )
