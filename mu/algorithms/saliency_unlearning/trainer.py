"""Masked fine-tuning: the two losses of SalUn (Fan et al. 2024, equation 6), and those of its controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from mu import ranks
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.optim import MaskedAdam
from mu.ldm import LatentDiffusion
from mu.ldm.prediction import (
    Predictor,
    predict_pair,
)
from mu.unlearning.compute import (
    Compute,
    is_out_of_memory,
    less_at_once,
)
from mu.unlearning.moving import (
    FrozenOriginal,
    TrainingError,
)

__all__ = ["SaliencyUnlearnTrainer", "TrainingError", "ascent_loss", "retain_loss", "salun_loss"]

ForgetBatch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""latents (B, C, H, W), timesteps (B,), noise (B, C, H, W), context (B, L, D), substitute_context (B, L', D)."""
RetainBatch = tuple[Tensor, Tensor, Tensor, Tensor]
"""latents (B', C, H, W), timesteps (B',), noise (B', C, H, W), context (B', L, D)."""


def salun_loss(
    model: LatentDiffusion,
    forget: ForgetBatch,
    retain: RetainBatch,
    alpha: float,
    target_model: Predictor | None = None,
    *,
    retain_model: Predictor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """E ||f(z_t | c_f) - sg[f(z_t | c_p)]||^2 + alpha E ||f(z_t^r | c_r) - y||^2, means over all elements.

    f is what the network predicts, the noise eps or v, and y its target for the retained image
    (`LatentDiffusion.predict`, `prediction_target`); for a network that predicts eps this is SalUn's equation 6.
    On the same noisy latents the forgotten prompt c_f must predict what the substitute prompt c_p predicts.
    With a `retain_model`, its prediction stands in the place of y in the second term: what is retained then pulls
    towards that model, by a gradient without the noise's own variance, and by none at all where nothing has changed.

    Args:
        model: the model that is trained.
        forget: see `ForgetBatch`; the latents are clean and scaled.
        retain: see `RetainBatch`.
        alpha: weight of retaining.
        target_model: predicts for the substitute prompt, without gradient; default: `model` itself.
        retain_model: predicts what the retained images are to give, without gradient; default: y.

    Returns:
        loss, forget term, retain term: fp32 scalars.
    """
    target_model = model if target_model is None else target_model
    latents, timesteps, noise, context, substitute_context = forget
    noisy = model.q_sample(latents, timesteps, noise)  # (B, C, H, W)
    retain_latents, retain_timesteps, retain_noise, retain_context = retain
    retain_noisy = model.q_sample(retain_latents, retain_timesteps, retain_noise)  # (B', C, H, W)
    to_forget = (noisy, timesteps, substitute_context)
    to_retain = (retain_noisy, retain_timesteps, retain_context)
    with torch.no_grad():  # forget_target (B, C, H, W), retain_target (B', C, H, W)
        if retain_model is None:
            forget_target = target_model.predict(*to_forget)
            retain_target = model.prediction_target(*retain[:3])
        elif retain_model is target_model:
            forget_target, retain_target = predict_pair(target_model, to_forget, to_retain)
        else:
            forget_target, retain_target = target_model.predict(*to_forget), retain_model.predict(*to_retain)
    forget_prediction, retain_prediction = predict_pair(
        model, (noisy, timesteps, context), to_retain
    )  # (B, C, H, W), (B', C, H, W)
    forget_term = F.mse_loss(forget_prediction, forget_target)
    retain_term = F.mse_loss(retain_prediction, retain_target)
    return forget_term + alpha * retain_term, forget_term, retain_term


def ascent_loss(model: LatentDiffusion, forget: ForgetBatch) -> Tensor:
    """-E ||f(z_t | c_f) - y||^2: gradient ascent on the forget set (Thudi et al. 2022), a control.

    It has no lower bound: the more steps, the less is left of anything. Returns an fp32 scalar.
    """
    latents, timesteps, noise, context, _ = forget
    return -retain_loss(model, (latents, timesteps, noise, context))


def retain_loss(model: LatentDiffusion, retain: RetainBatch) -> Tensor:
    """E ||f(z_t^r | c_r) - y||^2: fine-tuning on the retain set alone (Warnecke et al. 2021), a control."""
    latents, timesteps, noise, context = retain
    prediction = model.predict(model.q_sample(latents, timesteps, noise), timesteps, context)  # (B', C, H, W)
    return F.mse_loss(prediction, model.prediction_target(latents, timesteps, noise))


class SaliencyUnlearnTrainer(pl.LightningModule):
    """Lightning's view of the training: one step of `MaskedAdam` on the mean loss of a batch.

    With several processes, each takes its share of every batch, and the gradients of the selected entries are added up:
    all then make the same step, that of one process to rounding.

    A batch is {"forget": `ForgetBatch`, "retain": `RetainBatch`, "images": see `TrainBatch`}. It goes through the UNet
    in pieces if asked, or if memory does not suffice for the whole; its loss and gradient are the same to rounding.

    Args:
        model: which weights move. It has to be on its device already, and Lightning leaves it there.
        alpha: weight of the retain term.
        lr: learning rate of Adam.
        decay_steps: the learning rate falls linearly to 0 over so many steps; None keeps it constant.
        target: which model predicts for the substitute prompt: the current one, or the frozen original.
        retain_target: what the retained images are to give: the noise, or what the frozen original predicts.
        compute: the precision of the arithmetic, see `computing`, within which training has to take place.
        micro_batch_size: images of each part, forget and retain, that go through the UNet at once; None: all.
        objective: "salun", `salun_loss`; or a control without `alpha` and `target`: "ascent", `ascent_loss`, or
            "retain", `retain_loss`. The term that a control has not is logged as 0.

    Raises:
        TrainingError: while training, a loss or a gradient is NaN or infinite, which names the step and its images; or
            a tensor that may move has no gradient, which names it. Nothing is written.
        OutOfMemoryError: memory does not suffice for one image of each part.
    """

    model: SaliencyUnlearnModel

    def __init__(
        self,
        model: SaliencyUnlearnModel,
        *,
        alpha: float,
        lr: float,
        decay_steps: int | None = None,
        target: str = "current",
        retain_target: str = "noise",
        compute: Compute | None = None,
        micro_batch_size: int | None = None,
        objective: str = "salun",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if objective not in ("salun", "ascent", "retain"):
            raise ValueError(f"objective is {objective!r}; known: salun, ascent, retain")
        if target not in ("current", "frozen"):
            raise ValueError(f"target is {target!r}; known: current, frozen")
        if retain_target not in ("noise", "frozen"):
            raise ValueError(f"retain_target is {retain_target!r}; known: noise, frozen")
        # No submodule: Lightning would move all of it, encoders too, to the GPU and afterwards to the CPU.
        object.__setattr__(self, "model", model)
        self.alpha = alpha
        self.lr = lr
        self.decay_steps = decay_steps
        self.objective = objective
        needed = objective == "salun" and "frozen" in (target, retain_target)
        original = FrozenOriginal(model) if needed else None
        self.target_model = original if target == "frozen" else None
        self.retain_model = original if retain_target == "frozen" else None
        self.compute_settings = compute or Compute()
        self.micro_batch_size = micro_batch_size

    def configure_optimizers(self) -> Any:
        """The optimizer, with a schedule of its learning rate where there are `decay_steps`."""
        named = self.model.parameters_to_train()
        optimizer = MaskedAdam(named, self.model.selected, self.lr)
        if self.decay_steps is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=self.decay_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # noqa: ARG002
        terms = self.checked_terms(self._gradients_within_memory(batch), batch["images"])
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        masked = self.optimizers(use_pl_optimizer=False)
        assert isinstance(masked, MaskedAdam)
        masked.sum_gradients()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        if schedule is not None:
            schedule.step()  # type: ignore[union-attr]
        # Not by Lightning into the loggers: it counts this step as the one before.
        self.log_dict(terms, prog_bar=True, logger=False, batch_size=len(batch["forget"][0]))

    def checked_terms(
        self, found: tuple[Tensor, Tensor, Tensor], images: Mapping[str, Sequence[str]]
    ) -> dict[str, Tensor]:
        """The terms of a step, of all processes together. Looks at them and at all gradients, before weights move.

        Args:
            found: loss, forget and retain term of this process' share.
            images: see `TrainBatch`; for messages.

        Raises:
            TrainingError: in one of the processes something is NaN or infinite, or a gradient is missing.
        """
        named = self.model.parameters_to_train()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        without = [name for name, _ in named if name not in gradients]
        largest = torch.nn.utils.get_total_norm(gradients.values(), norm_type=float("inf")).to(
            found[0].device
        )
        sums = torch.stack([*found, largest, largest.new_tensor(float(len(without)))])  # (5,)
        ranks.sum_([sums])  # a sum is finite if each process' number is
        loss, forget_term, retain_term, largest, lacking = sums.unbind()
        if lacking:
            names = sorted({name for names in ranks.gathered(without) for name in names})
            raise TrainingError(
                f"step {self.global_step}: {len(names)} of {len(named)} tensors that may move have no gradient "
                f"({', '.join(names)}): they are frozen, or take no part in the prediction, or this release of torch "
                f"({torch.__version__}) loses their gradient. Training stops before any weight has moved"
            )
        source = "; ".join(f"{part}: {', '.join(files)}" for part, files in images.items())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.global_step}: the loss is {loss.item()} (forget {forget_term.item()}, retain "
                f"{retain_term.item()}) on the images to {source}. Training stops before any weight is changed by it"
            )
        if not torch.isfinite(largest):
            here = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            names = sorted({name for names in ranks.gathered(here) for name in names})
            raise TrainingError(
                f"step {self.global_step}: the gradients of {len(names)} tensors are not finite "
                f"({', '.join(names[:5])}), from the images to {source}. Training stops before any weight is changed "
                "by them"
            )
        return {"loss": loss, "forget": forget_term, "retain": retain_term}

    def _gradients_within_memory(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """`_gradients`, begun again with less at once whenever memory runs out, see `compute.less_at_once`."""
        while True:
            try:
                return self._gradients(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Only here is the error, which holds the tensors of the pass that failed, gone.
            for _, parameter in self.model.parameters_to_train():
                parameter.grad = None
            most = ranks.largest_share(max(len(batch[part][0]) for part in ("forget", "retain")))
            images = min(most, self.micro_batch_size or most)
            unet = self.model.ldm.unet
            self.micro_batch_size = less_at_once(unet, self.compute_settings, images, reason=reason)

    def _gradients(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Leave the gradient of the mean loss of a batch in the parameters; returns loss, forget and retain term."""
        totals: list[Tensor] = []
        for forget, retain, forget_share, retain_share in _pieces(batch, self.micro_batch_size):
            with self.compute_settings.autocast(self.model.ldm.device):
                forget_term, retain_term = self._terms(forget, retain)
            terms = forget_share * forget_term, retain_share * retain_term
            loss = terms[0] + (self.alpha if self.objective == "salun" else 1.0) * terms[1]
            self.manual_backward(loss)
            found = [term.detach() for term in (loss, *terms)]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        loss, forget_term, retain_term = totals
        return loss, forget_term, retain_term

    def _terms(self, forget: ForgetBatch, retain: RetainBatch) -> tuple[Tensor, Tensor]:
        """Forget and retain term of the objective: fp32 scalars."""
        ldm, nothing = self.model.ldm, torch.zeros((), device=forget[0].device)
        if self.objective == "ascent":
            return ascent_loss(ldm, forget), nothing
        if self.objective == "retain":
            return nothing, retain_loss(ldm, retain)
        return salun_loss(ldm, forget, retain, self.alpha, self.target_model, retain_model=self.retain_model)[
            1:
        ]


def _pieces(
    batch: Mapping[str, Any], size: int | None
) -> Iterator[tuple[ForgetBatch, RetainBatch, float, float]]:
    """This process' share of a batch in pieces of at most `size` images a part, with the share of each part in a piece.

    There are as many pieces in every process. Where a part has no image left for one, it lends its first, of which
    nothing then counts.
    """
    parts = batch["forget"], batch["retain"]
    counts = [len(part[0]) if part else 0 for part in parts]
    most = ranks.largest_share(max(counts))
    for first in range(0, most, size or most):
        pieces, shares = [], []
        for part, count in zip(parts, counts, strict=True):
            mine = ranks.within_share(first, size or most)
            found = len(range(count)[mine])
            pieces.append(tuple(tensor[mine if found else slice(0, 1)] for tensor in part))
            shares.append(found / count if count else 1.0 / ranks.world_size())
        yield pieces[0], pieces[1], shares[0], shares[1]
