"""The losses of SalUn (Fan et al. 2024, equation 6) and of its controls, each as the objective of a training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mu.ldm import LatentDiffusion
from mu.ldm.latent_diffusion import Predictor, predict_pair
from mu.unlearning.batches import ForgetBatch, RetainBatch
from mu.unlearning.compute import Compute
from mu.unlearning.moving import FrozenOriginal, MovingModel, TrainingError
from mu.unlearning.trainer import Objective, Trainer, weighed

__all__ = [
    "Ascent",
    "Retain",
    "SalUn",
    "SaliencyUnlearnTrainer",
    "TrainingError",
    "ascent_loss",
    "retain_loss",
    "salun_loss",
]


class SalUn:
    """E ||f(z_t | c_f) - sg[f(z_t | c_p)]||^2 + alpha E ||f(z_t^r | c_r) - y||^2, means over all elements.

    f is what the network predicts, the noise eps or v, and y its target for the retained image
    (`LatentDiffusion.predict`, `prediction_target`); for a network that predicts eps this is SalUn's equation 6.
    On the same noisy latents the forgotten prompt c_f must predict what the substitute prompt c_p predicts.

    Args:
        alpha: weight of retaining.
        target_model: predicts for the substitute prompt, without gradient; default: the model that is trained.
        retain_model: its prediction, without gradient, stands in the place of y. What is retained then pulls towards
            that model, by a gradient without the noise's own variance, and by none at all where nothing has changed.
    """

    def __init__(
        self, alpha: float, target_model: Predictor | None = None, retain_model: Predictor | None = None
    ) -> None:
        self.weights = {"forget": 1.0, "retain": alpha}
        self.target_model = target_model
        self.retain_model = retain_model

    def terms(self, model: LatentDiffusion, forget: ForgetBatch, retain: RetainBatch) -> dict[str, Tensor]:
        """Both means of the formula, fp32 scalars; the batch's latents are clean and scaled."""
        latents, timesteps, noise, context, substitute_context = forget
        retain_latents, retain_timesteps, retain_noise, retain_context = retain
        noisy = model.q_sample(latents, timesteps, noise)  # (B, C, H, W)
        retain_noisy = model.q_sample(retain_latents, retain_timesteps, retain_noise)  # (B', C, H, W)
        to_forget = (noisy, timesteps, context)
        to_retain = (retain_noisy, retain_timesteps, retain_context)

        target_model = model if self.target_model is None else self.target_model
        retain_model = self.retain_model
        substituted = (noisy, timesteps, substitute_context)
        with torch.no_grad():  # forget_target (B, C, H, W), retain_target (B', C, H, W)
            if retain_model is None:
                forget_target = target_model.predict(*substituted)
                retain_target = model.prediction_target(retain_latents, retain_timesteps, retain_noise)
            elif retain_model is target_model:
                forget_target, retain_target = predict_pair(target_model, substituted, to_retain)
            else:
                forget_target = target_model.predict(*substituted)
                retain_target = retain_model.predict(*to_retain)

        forgotten, retained = predict_pair(model, to_forget, to_retain)  # (B, C, H, W), (B', C, H, W)
        return {
            "forget": F.mse_loss(forgotten, forget_target),
            "retain": F.mse_loss(retained, retain_target),
        }


class Ascent:
    """Minus the diffusion loss of the images to forget: gradient ascent (Thudi et al. 2022), a control."""

    weights: Mapping[str, float] = {"forget": 1.0}

    def terms(self, model: LatentDiffusion, forget: ForgetBatch, retain: object) -> dict[str, Tensor]:  # noqa: ARG002
        return {"forget": ascent_loss(model, forget)}


class Retain:
    """The diffusion loss of the images to retain: fine-tuning on them alone (Warnecke et al. 2021), a control."""

    weights: Mapping[str, float] = {"retain": 1.0}

    def terms(self, model: LatentDiffusion, forget: object, retain: RetainBatch) -> dict[str, Tensor]:  # noqa: ARG002
        return {"retain": retain_loss(model, retain)}


def salun_loss(
    model: LatentDiffusion,
    forget: ForgetBatch,
    retain: RetainBatch,
    alpha: float,
    target_model: Predictor | None = None,
    *,
    retain_model: Predictor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`SalUn` as a function: its loss, forget term and retain term on a batch, fp32 scalars.

    Args:
        forget, retain: `ForgetBatch` and `RetainBatch`, or tuples of their tensors.
        alpha, target_model, retain_model: see `SalUn`.
    """
    objective = SalUn(alpha, target_model, retain_model)
    terms = objective.terms(model, forget, retain)
    return weighed(terms, objective.weights), terms["forget"], terms["retain"]


def ascent_loss(model: LatentDiffusion, forget: ForgetBatch) -> Tensor:
    """-E ||f(z_t | c_f) - y||^2, an fp32 scalar without a lower bound: the more steps, the less is left of anything."""
    latents, timesteps, noise, context, _ = forget
    return -retain_loss(model, RetainBatch(latents, timesteps, noise, context))


def retain_loss(model: LatentDiffusion, retain: RetainBatch) -> Tensor:
    """E ||f(z_t^r | c_r) - y||^2, an fp32 scalar."""
    latents, timesteps, noise, context = retain
    prediction = model.predict(model.q_sample(latents, timesteps, noise), timesteps, context)  # (B', C, H, W)
    return F.mse_loss(prediction, model.prediction_target(latents, timesteps, noise))


def objective_of(
    name: str, model: MovingModel, *, alpha: float, target: str = "current", retain_target: str = "noise"
) -> Objective:
    """The objective that a name means.

    Args:
        name: "salun"; or a control, which has neither `alpha` nor targets: "ascent", "retain".
        model: before it is trained.
        alpha: weight of the retain term.
        target: which model predicts for the substitute prompt: the "current" one, or the "frozen" original.
        retain_target: what the retained images are to give: the "noise", or what the "frozen" original predicts.
    """
    for key, value, known in (
        ("objective", name, ("salun", "ascent", "retain")),
        ("target", target, ("current", "frozen")),
        ("retain_target", retain_target, ("noise", "frozen")),
    ):
        if value not in known:
            raise ValueError(f"{key} is {value!r}; known: {', '.join(known)}")
    if name == "ascent":
        return Ascent()
    if name == "retain":
        return Retain()
    original = FrozenOriginal(model) if "frozen" in (target, retain_target) else None
    return SalUn(
        alpha,
        original if target == "frozen" else None,
        original if retain_target == "frozen" else None,
    )


class SaliencyUnlearnTrainer(Trainer):
    """The `Trainer` of SalUn and its controls.

    Args:
        model: see `Trainer`.
        alpha: weight of the retain term.
        lr, decay_steps, compute, micro_batch_size: see `Trainer`.
        target: which model predicts for the substitute prompt: the current one, or the frozen original.
        retain_target: what the retained images are to give: the noise, or what the frozen original predicts.
        objective: "salun"; or a control, which has neither `alpha` nor targets: "ascent", "retain".
    """

    def __init__(
        self,
        model: MovingModel,
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
        minimised = objective_of(objective, model, alpha=alpha, target=target, retain_target=retain_target)
        super().__init__(
            model,
            minimised,
            lr=lr,
            decay_steps=decay_steps,
            compute=compute,
            micro_batch_size=micro_batch_size,
        )
