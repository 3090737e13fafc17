"""Masked fine-tuning: the two losses of SalUn (Fan et al. 2024, equation 6), nothing else."""

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

__all__ = ["SaliencyUnlearnTrainer", "TrainingError", "salun_loss"]

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
    *,
    retain_model: NoisePredictor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """E ||eps(z_t | c_f) - sg[eps(z_t | c_p)]||^2 + alpha E ||eps(z_t^r | c_r) - eps||^2, means over all elements.

    On the same noisy latents the forgotten prompt c_f must predict what the substitute prompt c_p predicts.
    With a `retain_model`, its prediction stands in the place of eps in the second term: what is retained then pulls
    towards that model, by a gradient without the noise's own variance, and by none at all where nothing has changed.

    Args:
        model: the model that is trained.
        forget: see `ForgetBatch`; the latents are clean and scaled.
        retain: see `RetainBatch`.
        alpha: weight of retaining.
        target_model: predicts for the substitute prompt, without gradient; default: `model` itself.
        retain_model: predicts what the retained images are to give, without gradient; default: the noise itself.

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
            forget_target, retain_target = predict_noise(target_model, *to_forget), retain_noise.float()
        elif retain_model is target_model:
            forget_target, retain_target = predict_noise_pair(target_model, to_forget, to_retain)
        else:
            forget_target = predict_noise(target_model, *to_forget)
            retain_target = predict_noise(retain_model, *to_retain)
    forget_prediction, retain_prediction = predict_noise_pair(
        model, (noisy, timesteps, context), to_retain
    )  # (B, C, H, W), (B', C, H, W)
    forget_term = F.mse_loss(forget_prediction, forget_target)
    retain_term = F.mse_loss(retain_prediction, retain_target)
    return forget_term + alpha * retain_term, forget_term, retain_term


class SaliencyUnlearnTrainer(pl.LightningModule):
    """Lightning's view of the training: one `salun_loss` a step, `MaskedAdam`, and a stop at anything not finite.

    A batch is {"forget": `ForgetBatch`, "retain": `RetainBatch`}.

    Args:
        model: which weights move.
        alpha: weight of retaining.
        lr: learning rate of Adam.
        decay_steps: the learning rate falls linearly to 0 over so many steps; None keeps it constant.
        target: which model predicts for the substitute prompt: the current one, or the frozen original.
        retain_target: what the retained images are to give: the noise, or what the frozen original predicts.

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
        retain_target: str = "noise",
    ) -> None:
        super().__init__()
        if target not in ("current", "frozen"):
            raise ValueError(f"target is {target!r}; known: current, frozen")
        if retain_target not in ("noise", "frozen"):
            raise ValueError(f"retain_target is {retain_target!r}; known: noise, frozen")
        self.model = model
        self.alpha = alpha
        self.lr = lr
        self.decay_steps = decay_steps
        original = FrozenOriginal(model) if "frozen" in (target, retain_target) else None
        self.target_model = original if target == "frozen" else None
        self.retain_model = original if retain_target == "frozen" else None
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
        loss, forget_term, retain_term = salun_loss(
            self.model.ldm,
            batch["forget"],
            batch["retain"],
            self.alpha,
            self.target_model,
            retain_model=self.retain_model,
        )
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
