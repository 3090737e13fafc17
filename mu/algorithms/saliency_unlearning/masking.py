"""Which weights matter for a concept: summed gradients, an exact global threshold, and the mask (Fan et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mu import ranks
from mu.algorithms.saliency_unlearning.mask_file import (
    Mask,
    MaskError,
    check_mask,
    count_marked,
    load_mask,
    load_mask_metadata,
    save_mask,
)
from mu.algorithms.saliency_unlearning.selection import find_edges, mark
from mu.errors import first_line
from mu.ldm import LatentDiffusion
from mu.ldm.latent_diffusion import predict_pair
from mu.unlearning.batches import ForgetBatch, pieces
from mu.unlearning.compute import Compute, is_out_of_memory, less_at_once

__all__ = [
    "Mask",
    "MaskError",
    "MaskLossError",
    "accumulate_saliency",
    "accumulate_within_memory",
    "check_mask",
    "count_marked",
    "load_mask",
    "load_mask_metadata",
    "random_mask",
    "save_mask",
    "threshold_mask",
    "threshold_masks",
]


class MaskLossError(MaskError):
    """The loss of a batch is NaN or infinite; `batch` is its index."""

    def __init__(self, batch: int, message: str) -> None:
        super().__init__(message)
        self.batch = batch

    def __reduce__(self) -> tuple[type[MaskLossError], tuple[int, str]]:
        return type(self), (self.batch, str(self))


def accumulate_within_memory(
    model: LatentDiffusion,
    make_batches: Callable[[], Iterable[ForgetBatch]],
    *,
    c_guidance: float,
    batch_size: int,
    compute: Compute | None = None,
) -> dict[str, Tensor]:
    """`accumulate_saliency`, begun again with less at once whenever memory runs out, see `compute.less_at_once`.

    Begun again, because a backward pass that fails has added some of its gradients to the sums and others not.

    Args:
        make_batches: gives the same batches whenever it is called.
        batch_size: images of the largest of them.

    Raises:
        OutOfMemoryError: memory does not suffice for one image.
    """
    size = ranks.largest_share(batch_size)
    while True:
        try:
            return accumulate_saliency(
                model, make_batches(), c_guidance=c_guidance, compute=compute, micro_batch_size=size
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # Only here is the error, which holds tensors, gone.
        size = less_at_once(model.unet, compute or Compute(), size, reason=reason)


def accumulate_saliency(
    model: LatentDiffusion,
    batches: Iterable[ForgetBatch],
    *,
    c_guidance: float,
    compute: Compute | None = None,
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Absolute gradient of the forget loss at the model's own weights (Fan et al. 2024, equation 5).

    The loss of an image is the mean over its elements of (y - f_hat)^2 with the guided prediction
    f_hat = (1 + w) f(z_t | c) - w f(z_t | ""), w = `c_guidance`; both branches carry gradient. f is what the network
    predicts, and y its target: eps, or v (`LatentDiffusion.predict`, `prediction_target`). Signed
    gradients are summed over all batches, and over all processes of the run, and divided by the number of images before
    the absolute value is taken, so that the result does not depend on how the images are cut into batches or shared
    among processes. The weights do not move; dropout is off.

    Args:
        model: left as it was found, except that gradients of the UNet are cleared.
        batches: see `ForgetBatch`, or tuples of its tensors; the latents are drawn from the posterior, the reference
            context is that of the empty prompt, (B or 1, L', D). The same in every process, which takes its share of
            each.
        c_guidance: 0 gives the plain diffusion loss; the unconditional branch is then not computed.
        compute: the precision of the arithmetic, see `compute.computing`.
        micro_batch_size: batches are cut so that at most so many images go through the UNet at once.

    Returns:
        UNet-relative name -> fp32 tensor, for every UNet parameter, in the order of `unet.named_parameters()`; the
        same bits in every process.

    Raises:
        MaskError: there is no batch; or a tensor gets no gradient from the predictions, which is named.
        MaskLossError: the loss of a batch, in any of the processes, is not finite.
    """
    unet = model.unet
    parameters = dict(unet.named_parameters())
    requires_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    training = [module for module in model.modules() if module.training]
    sums: dict[str, Tensor] = {}  # for weights of lower precision; fp32 weights sum in their own .grad
    hooks = []

    def take_gradient(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if name in sums:
            sums[name] += parameter.grad
        else:
            sums[name] = parameter.grad.float()
        parameter.grad = None

    try:
        model.eval()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(True)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                hooks.append(
                    parameter.register_post_accumulate_grad_hook(lambda p, name=name: take_gradient(name, p))
                )
        images = 0
        with ranks.in_step():
            for index, batch in enumerate(batches):
                latents, timesteps, noise, context, uncond_context = batch
                uncond_context = uncond_context.expand(len(latents), -1, -1)  # (B, L', D)
                whole = ForgetBatch(latents, timesteps, noise, context, uncond_context)
                for ((piece, count),) in pieces([whole], micro_batch_size):
                    with torch.enable_grad(), (compute or Compute()).autocast(latents.device):
                        loss = count * _forget_loss(model, piece, c_guidance)  # ()
                    if not torch.isfinite(loss):
                        raise MaskLossError(
                            index,
                            f"the loss of mask batch {index} is {loss.item()}: its latents, its prompt embeddings or "
                            "the model's weights are not finite",
                        )
                    loss.backward()
                    images += count
        images = sum(ranks.gathered(images))
        if not images:
            raise MaskError("there is no image to compute the saliency from: the forget set is empty")
        totals: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            total = sums.pop(name, parameter.grad)
            parameter.grad = None
            if total is not None:
                totals[name] = total
        with ranks.in_step():
            if without := [name for name in parameters if name not in totals]:
                raise MaskError(
                    f"{len(without)} of {len(parameters)} tensors of the UNet have no gradient ({', '.join(without)}), "
                    "and would be ranked last: they take no part in the prediction, or this release of torch "
                    f"({torch.__version__}) loses their gradient. No mask is made"
                )
        ranks.sum_(totals.values())
        saliency = {name: total.div_(images).abs_().float().contiguous() for name, total in totals.items()}
        return saliency
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(requires_grad[name])
        for module in training:
            module.training = True


def _forget_loss(model: LatentDiffusion, batch: ForgetBatch, c_guidance: float) -> Tensor:
    """Mean over the images and their elements."""
    latents, timesteps, noise, context, uncond_context = batch
    noisy = model.q_sample(latents, timesteps, noise)  # (B, C, H, W)
    if c_guidance:
        conditional, unconditional = predict_pair(
            model,
            (noisy, timesteps, context),
            (noisy, timesteps, uncond_context),
        )  # two of (B, C, H, W)
        prediction = (1 + c_guidance) * conditional - c_guidance * unconditional  # (B, C, H, W)
    else:
        prediction = model.predict(noisy, timesteps, context)  # (B, C, H, W)
    return F.mse_loss(prediction, model.prediction_target(latents, timesteps, noise))


def threshold_mask(saliency: Mapping[str, Tensor], threshold: float) -> Mask:
    """Mark the most salient fraction of all weights together.

    Exactly int(threshold * n) of the n weights are marked; of equal saliencies at the edge, those that come earlier
    in the order of `saliency` and, within a tensor, in row-major order.

    Args:
        saliency: name -> non-negative float tensor.
        threshold: fraction to keep, 0 < threshold <= 1.

    Returns:
        name -> bool tensor on the device of the saliency.

    Raises:
        MaskError: a saliency is NaN, infinite or negative, all are zero, or the threshold is out of range or so small
            that nothing is kept.
    """
    return threshold_masks(saliency, [threshold])[0]


def threshold_masks(
    saliency: Mapping[str, Tensor],
    thresholds: Sequence[float],
    *,
    pool: Collection[str] | None = None,
) -> list[Mask]:
    """One mask for each threshold, as `threshold_mask` makes it, from shared passes over the saliencies.

    Works by radix selection, see `selection`: beside contiguous saliencies and the masks it needs at most 64 MB.

    Args:
        pool: names that are ranked; the others are left unmarked. Default: all.

    Raises:
        MaskError: as `threshold_mask`, or the pool holds a name that has no saliency.
    """
    ranked = _ranked(saliency, pool)
    size = sum(values.numel() for values in ranked.values())
    edges = find_edges(ranked, [_kept_count(threshold, size) for threshold in thresholds])
    masks: list[Mask] = [
        {
            # What is ranked is written once, below.
            name: (torch.empty if name in ranked else torch.zeros)(
                values.shape, dtype=torch.bool, device=values.device
            )
            for name, values in saliency.items()
        }
        for _ in thresholds
    ]
    mark(ranked, edges, masks)
    return masks


def random_mask(
    like: Mapping[str, Tensor], threshold: float, *, seed: int, pool: Collection[str] | None = None
) -> Mask:
    """Mark a uniformly random subset, exactly as many weights as `threshold_mask` would: the control for saliency.

    Args:
        like: name -> tensor whose shape counts.
        threshold: fraction to keep, 0 < threshold <= 1.
        seed: the same seed, names and shapes give the same mask; the global random state is not touched.
        pool: as in `threshold_masks`.

    Returns:
        name -> bool tensor, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in like.items()}
    return threshold_masks(noise, [threshold], pool=pool)[0]


def _ranked(saliency: Mapping[str, Tensor], pool: Collection[str] | None) -> dict[str, Tensor]:
    unknown = sorted(set(pool or ()) - saliency.keys())
    if unknown:
        raise MaskError(f"the pool names weights without saliency: {', '.join(unknown[:5])}")
    ranked = {name: values for name, values in saliency.items() if pool is None or name in pool}
    for name, values in ranked.items():
        if not values.is_floating_point():
            raise MaskError(f"the saliency of {name} is {values.dtype}, not a float tensor")
    return ranked


def _kept_count(threshold: float, size: int) -> int:
    if not 0.0 < threshold <= 1.0:
        raise MaskError(f"threshold is {threshold}: the fraction of weights to keep, 0 < threshold <= 1")
    kept = int(threshold * size)
    if not kept:
        raise MaskError(f"threshold {threshold} keeps none of {size} weights: choose a larger one")
    return kept
