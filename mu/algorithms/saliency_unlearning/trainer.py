"""Masked fine-tuning: the two losses of SalUn (Fan et al. 2024, equation 6), and those of its controls."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from mu.algorithms.saliency_unlearning.model import FrozenOriginal, SaliencyUnlearnModel, TrainingError
from mu.algorithms.saliency_unlearning.optim import MaskedAdam
from mu.algorithms.saliency_unlearning.prediction import NoisePredictor, predict_noise, predict_noise_pair
from mu.ldm import LatentDiffusion

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
    target_model: NoisePredictor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """E ||eps(z_t | c_f) - sg[eps(z_t | c_p)]||^2 + alpha E ||eps(z_t^r | c_r) - eps||^2, means over all elements.

    On the same noisy latents the forgotten prompt c_f must predict what the substitute prompt c_p predicts.

    Args:
        model: the model that is trained.
        forget: see `ForgetBatch`; the latents are clean and scaled.
        retain: see `RetainBatch`.
        alpha: weight of retaining.
        target_model: predicts for the substitute prompt, without gradient; default: `model` itself.

    Returns:
        loss, forget term, retain term: fp32 scalars.
    """
    target_model = model if target_model is None else target_model
    latents, timesteps, noise, context, substitute_context = forget
    noisy = model.q_sample(latents, timesteps, noise)  # (B, C, H, W)
    with torch.no_grad():
        target = predict_noise(target_model, noisy, timesteps, substitute_context)  # (B, C, H, W)
    retain_latents, retain_timesteps, retain_noise, retain_context = retain
    retain_noisy = model.q_sample(retain_latents, retain_timesteps, retain_noise)  # (B', C, H, W)
    forget_prediction, retain_prediction = predict_noise_pair(
        model, (noisy, timesteps, context), (retain_noisy, retain_timesteps, retain_context)
    )  # (B, C, H, W), (B', C, H, W)
    forget_term = F.mse_loss(forget_prediction, target)
    retain_term = F.mse_loss(retain_prediction, retain_noise.float())
    return forget_term + alpha * retain_term, forget_term, retain_term


def ascent_loss(model: LatentDiffusion, forget: ForgetBatch) -> Tensor:
    """-E ||eps(z_t | c_f) - eps||^2: gradient ascent on the forget set (Thudi et al. 2022), a control.

    It has no lower bound: the more steps, the less is left of anything. Returns an fp32 scalar.
    """
    latents, timesteps, noise, context, _ = forget
    return -retain_loss(model, (latents, timesteps, noise, context))


def retain_loss(model: LatentDiffusion, retain: RetainBatch) -> Tensor:
    """E ||eps(z_t^r | c_r) - eps||^2: fine-tuning on the retain set alone (Warnecke et al. 2021), a control."""
    latents, timesteps, noise, context = retain
    prediction = predict_noise(
        model, model.q_sample(latents, timesteps, noise), timesteps, context
    )  # (B', C, H, W)
    return F.mse_loss(prediction, noise.float())


class SaliencyUnlearnTrainer(pl.LightningModule):
    """Lightning's view of the training: one loss a step, `MaskedAdam`, and a stop at anything not finite.

    A batch is {"forget": `ForgetBatch`, "retain": `RetainBatch`}.

    Args:
        model: which weights move.
        alpha: weight of retaining.
        lr: learning rate of Adam.
        decay_steps: the learning rate falls linearly to 0 over so many steps; None keeps it constant.
        target: which model predicts for the substitute prompt: the current one, or the frozen original.
        objective: "salun", `salun_loss`; or a control without `alpha` and `target`: "ascent", `ascent_loss`, or
            "retain", `retain_loss`. The term that a control has not is logged as 0.

    Raises:
        TrainingError: while training, a loss or a gradient is NaN or infinite; names the step and its
            images, and nothing is written.
    """

    def __init__(
        self,
        model: SaliencyUnlearnModel,
        *,
        alpha: float,
        lr: float,
        decay_steps: int | None = None,
        target: str = "current",
        objective: str = "salun",
    ) -> None:
        super().__init__()
        if objective not in ("salun", "ascent", "retain"):
            raise ValueError(f"objective is {objective!r}; known: salun, ascent, retain")
        if target not in ("current", "frozen"):
            raise ValueError(f"target is {target!r}; known: current, frozen")
        self.model = model
        self.alpha = alpha
        self.lr = lr
        self.decay_steps = decay_steps
        self.objective = objective
        self.target_model = FrozenOriginal(model) if target == "frozen" and objective == "salun" else None
        self._images = ""

    def configure_optimizers(self) -> Any:
        """The optimizer, with a schedule of its learning rate where there are `decay_steps`."""
        optimizer = MaskedAdam(self.model.parameters_to_train(), self.model.selected, self.lr)
        if self.decay_steps is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=self.decay_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002
        loss, forget_term, retain_term = self._terms(batch)
        self._images = "; ".join(f"{part}: {', '.join(files)}" for part, files in batch["images"].items())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.global_step}: the loss is {loss.item()} (forget {forget_term.item()}, retain "
                f"{retain_term.item()}) on the images to {self._images}. Training stops before any weight is changed "
                "by it"
            )
        terms = {"loss": loss.detach(), "forget": forget_term.detach(), "retain": retain_term.detach()}
        self.log_dict(terms, prog_bar=True, batch_size=len(batch["forget"][0]))
        return loss

    def _terms(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, forget term, retain term of the objective: fp32 scalars."""
        ldm, forget, retain = self.model.ldm, batch["forget"], batch["retain"]
        if self.objective == "salun":
            return salun_loss(ldm, forget, retain, self.alpha, self.target_model)
        if self.objective == "ascent":
            loss = ascent_loss(ldm, forget)
            return loss, loss, torch.zeros_like(loss)
        loss = retain_loss(ldm, retain)
        return loss, torch.zeros_like(loss), loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Look at all gradients; Lightning calls this before it clips them, and before the optimizer writes."""
        named = [(name, p.grad) for name, p in self.model.parameters_to_train() if p.grad is not None]
        largest = torch.nn.utils.get_total_norm([grad for _, grad in named], norm_type=float("inf"))
        if not torch.isfinite(largest):
            names = [name for name, grad in named if not grad.isfinite().all()]
            raise TrainingError(
                f"step {self.global_step}: the gradients of {len(names)} tensors are not finite "
                f"({', '.join(names[:5])}), from the images to {self._images}. Training stops before any weight is "
                "changed by them"
            )
