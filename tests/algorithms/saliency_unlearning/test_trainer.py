from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer, TrainingError, salun_loss
from mu.ldm import LatentDiffusion

Batch = dict[str, Any]


def tiny_batch(seed: int, images: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def part(contexts: int) -> tuple[Tensor, ...]:
        timesteps = torch.randint(0, 1000, (images,), generator=generator)
        latents, noise = normal(images, 4, 8, 8), normal(images, 4, 8, 8)
        return latents, timesteps, noise, *(normal(images, 7, 32) for _ in range(contexts))

    return {
        "forget": part(2),
        "retain": part(1),
        "images": {part: [f"{part}/{seed}-{n}.png" for n in range(images)] for part in ("forget", "retain")},
    }


def fit(trainer: SaliencyUnlearnTrainer, batches: list[Batch], **options: Any) -> None:
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(trainer, loader)


def half_mask(model: LatentDiffusion) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.unet.named_parameters()}


# ---- the loss


@pytest.mark.parametrize("lengths", [((3, 3), 3), ((3, 2), 4)])
def test_the_loss_and_its_gradient_are_the_closed_form(
    linear_model: Any, make_batch: Any, lengths: Any
) -> None:
    """Of the linear model the forget residual is prompt @ (mean c_f - mean c_p): the signal cancels on one z_t."""
    linear_model.eval()
    forget, retain, alpha = make_batch(2, lengths[0], seed=1), make_batch(3, (lengths[1],), seed=2), 0.3
    loss, forget_term, retain_term = salun_loss(linear_model, forget, retain, alpha)
    loss.backward()

    signal, prompt = linear_model.unet.signal.detach(), linear_model.unet.prompt.detach()
    mean_f, mean_p, mean_r = forget[3].mean(1), forget[4].mean(1), retain[3].mean(1)
    gap = (mean_f - mean_p) @ prompt.T  # (B, C)
    x = linear_model.q_sample(*retain[:3])
    residual = signal[:, None, None] * x + (mean_r @ prompt.T)[:, :, None, None] - retain[2]
    torch.testing.assert_close(forget_term, gap.square().mean())
    torch.testing.assert_close(retain_term, residual.square().mean())
    torch.testing.assert_close(loss, forget_term + 0.3 * retain_term)

    # The substitute side carries no gradient: d gap = d prompt @ mean_f, and the signal has one on the forget side.
    x_f = linear_model.q_sample(*forget[:3])
    forget_prompt = 2 / gap.numel() * gap.T @ mean_f
    retain_prompt = 2 / residual.numel() * torch.einsum("bchw,bd->cd", residual, mean_r)
    forget_signal = 2 / x_f.numel() * (gap[:, :, None, None] * x_f).sum((0, 2, 3))
    retain_signal = 2 / residual.numel() * (residual * x).sum((0, 2, 3))
    torch.testing.assert_close(linear_model.unet.prompt.grad, forget_prompt + alpha * retain_prompt)
    torch.testing.assert_close(linear_model.unet.signal.grad, forget_signal + alpha * retain_signal)


def test_one_call_without_gradient_and_one_with(linear_model: Any, make_batch: Any) -> None:
    forget, retain = make_batch(2, (3, 3), seed=1), make_batch(3, (3,), seed=2)
    salun_loss(linear_model, forget, retain, 0.5)
    (substitute, with_gradient), (both, gradient) = linear_model.calls
    assert torch.equal(substitute, forget[4])
    assert not with_gradient
    assert torch.equal(both, torch.cat([forget[3], retain[3]]))
    assert gradient


def test_alpha_weighs_retaining(linear_model: Any, make_batch: Any) -> None:
    linear_model.eval()
    forget, retain = make_batch(2, (3, 3), seed=1), make_batch(2, (3,), seed=2)
    loss, forget_term, retain_term = salun_loss(linear_model, forget, retain, 0.0)
    assert torch.equal(loss, forget_term)
    assert retain_term > 0


def test_the_same_prompt_twice_leaves_nothing_to_forget(linear_model: Any, make_batch: Any) -> None:
    linear_model.eval()
    latents, timesteps, noise, context = make_batch(2, (3,), seed=1)
    _, forget_term, _ = salun_loss(
        linear_model, (latents, timesteps, noise, context, context), make_batch(2, (3,), seed=2), 0.5
    )
    assert forget_term == 0.0


def test_one_call_equals_separate_calls(tiny_model: LatentDiffusion) -> None:
    """Forget and retain share a call where they can; the result is that of separate calls to rounding."""
    batch = tiny_batch(0)
    loss, forget_term, retain_term = salun_loss(tiny_model, batch["forget"], batch["retain"], 0.5)
    latents, timesteps, noise, context, substitute = batch["forget"]
    noisy = tiny_model.q_sample(latents, timesteps, noise)
    target = tiny_model.predict_noise(noisy, timesteps, substitute).detach()
    expected_f = (tiny_model.predict_noise(noisy, timesteps, context) - target).square().mean()
    latents, timesteps, noise, context = batch["retain"]
    prediction = tiny_model.predict_noise(tiny_model.q_sample(latents, timesteps, noise), timesteps, context)
    expected_r = (prediction - noise).square().mean()
    torch.testing.assert_close(forget_term, expected_f, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(retain_term, expected_r, rtol=1e-5, atol=1e-7)
    parameters = list(tiny_model.unet.parameters())
    got = torch.cat([g.view(-1) for g in torch.autograd.grad(loss, parameters)])
    expected = torch.cat([g.view(-1) for g in torch.autograd.grad(expected_f + 0.5 * expected_r, parameters)])
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_retained_may_be_what_another_model_predicts(
    make_tiny_model: Callable[..., LatentDiffusion], shared: bool
) -> None:
    model, other, batch = make_tiny_model(seed=0), make_tiny_model(seed=1), tiny_batch(0)
    _, forget_term, retain_term = salun_loss(
        model,
        batch["forget"],
        batch["retain"],
        0.5,
        target_model=other if shared else None,
        retain_model=other,
    )
    latents, timesteps, noise, context = batch["retain"]
    inputs = model.q_sample(latents, timesteps, noise), timesteps, context
    expected = (model.predict_noise(*inputs) - other.predict_noise(*inputs)).square().mean()
    torch.testing.assert_close(retain_term, expected, rtol=1e-5, atol=1e-7)
    alone = salun_loss(model, batch["forget"], batch["retain"], 0.5, other if shared else None)
    torch.testing.assert_close(forget_term, alone[1], rtol=1e-5, atol=1e-7)
    assert not torch.isclose(retain_term, alone[2], rtol=1e-2)


def test_a_model_retains_what_it_predicts_itself(tiny_model: LatentDiffusion) -> None:
    """No pull where nothing has changed: the retain term and its gradient are 0 up to rounding."""
    batch = tiny_batch(0)
    retain_term = salun_loss(tiny_model, batch["forget"], batch["retain"], 0.5, retain_model=tiny_model)[2]
    assert retain_term.item() < 1e-10
    gradients = torch.autograd.grad(retain_term, list(tiny_model.unet.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-5


def test_the_target_may_be_another_model(make_tiny_model: Callable[..., LatentDiffusion]) -> None:
    model, other, batch = make_tiny_model(seed=0), make_tiny_model(seed=1), tiny_batch(0)
    latents, timesteps, noise, context, substitute = batch["forget"]
    _, forget_term, _ = salun_loss(model, batch["forget"], batch["retain"], 0.5, target_model=other)
    noisy = model.q_sample(latents, timesteps, noise)
    with torch.no_grad():
        target = other.predict_noise(noisy, timesteps, substitute)
        expected = (model.predict_noise(noisy, timesteps, context) - target).square().mean()
    torch.testing.assert_close(forget_term, expected, rtol=1e-5, atol=0.0)
    forget_term.backward()
    assert all(p.grad is None for p in other.parameters())


def test_autocast_keeps_the_gradient_after_the_call_without_one(tiny_model: LatentDiffusion) -> None:
    """Weights cast for the substitute prediction must not be reused, cut from their parameters, by the next call."""
    batch = tiny_batch(0)
    loss, *_ = salun_loss(tiny_model, batch["forget"], batch["retain"], 0.5)
    exact = torch.autograd.grad(loss, list(tiny_model.unet.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = salun_loss(tiny_model, batch["forget"], batch["retain"], 0.5)
    assert loss.dtype == torch.float32
    rough = torch.autograd.grad(loss, list(tiny_model.unet.parameters()))
    a, b = (torch.cat([g.view(-1) for g in grads]) for grads in (exact, rough))
    assert ((a - b).norm() / a.norm()).item() < 0.1


# ---- training


def test_training_is_the_plain_loop_and_moves_only_the_mask(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    """Three steps under Lightning against dense Adam on masked gradients, written out."""
    batches = [tiny_batch(k) for k in range(3)]
    ldm, plain = make_tiny_model(), make_tiny_model()
    before = {name: value.clone() for name, value in ldm.state_dict().items()}
    mask = half_mask(ldm)
    model = SaliencyUnlearnModel(ldm, "noxattn", mask)
    fit(SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3), batches)
    model.verify_unmasked()

    named = {name: p for name, p in plain.unet.named_parameters() if name in model.selected}
    optimizer = torch.optim.Adam(named.values(), lr=1e-3)
    for batch in batches:
        optimizer.zero_grad()
        salun_loss(plain, batch["forget"], batch["retain"], 0.5)[0].backward()
        for name, parameter in named.items():
            parameter.grad *= mask[name]
        optimizer.step()
    trained = dict(ldm.unet.named_parameters())
    for name, parameter in plain.unet.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=0.0, atol=1e-5)

    moved = {name for name, value in ldm.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= {f"model.diffusion_model.{name}" for name in model.selected}
    assert len(moved) > 0.9 * len(model.selected)
    for name, marked in mask.items():
        old, new = before[f"model.diffusion_model.{name}"], trained[name]
        assert torch.equal(old[~marked], new[~marked])


def test_dropout_stays_off_and_the_terms_are_logged(make_tiny_model: Callable[..., LatentDiffusion]) -> None:
    ldm = make_tiny_model(unet={"dropout": 0.9})
    batch = tiny_batch(0)
    expected = [float(term.detach()) for term in salun_loss(ldm, batch["forget"], batch["retain"], 0.25)]
    ldm.train()
    seen: dict[str, float] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.update({name: float(value) for name, value in trainer.progress_bar_metrics.items()})

    fit(
        SaliencyUnlearnTrainer(SaliencyUnlearnModel(ldm, "full"), alpha=0.25, lr=1e-3),
        [batch],
        callbacks=[Look()],
    )
    assert [seen["loss"], seen["forget"], seen["retain"]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", ["current", "frozen"])
def test_the_target_is_the_current_or_the_frozen_model(
    make_tiny_model: Callable[..., LatentDiffusion], target: Any
) -> None:
    batches = [tiny_batch(0), tiny_batch(1)]
    ldm, original = make_tiny_model(), make_tiny_model()
    model = SaliencyUnlearnModel(ldm, "full", half_mask(ldm))
    trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-2, target=target)
    seen: list[tuple[float, float, float]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, _: pl.Trainer, __: pl.LightningModule, batch: Any, ___: int) -> None:
            with torch.no_grad():
                by_current = salun_loss(ldm, batch["forget"], batch["retain"], 0.5)[1]
                by_frozen = salun_loss(ldm, batch["forget"], batch["retain"], 0.5, target_model=original)[1]
            seen.append((float(by_current), float(by_frozen), math.nan))

        def on_train_batch_end(self, pl_trainer: pl.Trainer, *_: Any) -> None:
            seen[-1] = (*seen[-1][:2], float(pl_trainer.progress_bar_metrics["forget"]))

    fit(trainer, batches, callbacks=[Look()])
    by_current, by_frozen, logged = seen[1]
    assert abs(by_current - by_frozen) > 1e-3 * by_current
    assert logged == pytest.approx(by_current if target == "current" else by_frozen, rel=1e-4)
    model.verify_unmasked()


def test_with_a_frozen_retain_target_the_retain_term_starts_at_nothing(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    ldm, original = make_tiny_model(), make_tiny_model()
    model = SaliencyUnlearnModel(ldm, "full", half_mask(ldm))
    trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-2, retain_target="frozen")
    seen: list[tuple[float, float]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, _: pl.Trainer, __: pl.LightningModule, batch: Any, ___: int) -> None:
            with torch.no_grad():
                terms = salun_loss(ldm, batch["forget"], batch["retain"], 0.5, retain_model=original)
            seen.append((float(terms[2]), math.nan))

        def on_train_batch_end(self, pl_trainer: pl.Trainer, *_: Any) -> None:
            seen[-1] = (seen[-1][0], float(pl_trainer.progress_bar_metrics["retain"]))

    fit(trainer, [tiny_batch(0), tiny_batch(1)], callbacks=[Look()])
    assert seen[0][1] < 1e-10
    assert seen[1][1] == pytest.approx(seen[1][0], rel=1e-4)
    assert seen[1][1] > 1e-8
    model.verify_unmasked()


def test_a_loss_that_is_not_finite_stops_before_it_is_written(tiny_model: LatentDiffusion) -> None:
    batches = [tiny_batch(0), tiny_batch(1), tiny_batch(2)]
    batches[1]["retain"][2][0, 0, 0, 0] = math.inf
    model = SaliencyUnlearnModel(tiny_model, "full", half_mask(tiny_model))
    weights: list[dict[str, Tensor]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            weights.append({name: value.clone() for name, value in tiny_model.state_dict().items()})

    with pytest.raises(TrainingError, match=r"step 1: the loss is (inf|nan)") as caught:
        fit(SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3), batches, callbacks=[Look()])
    files = "forget: forget/1-0.png, forget/1-1.png; retain: retain/1-0.png, retain/1-1.png"
    assert f"on the images to {files}." in str(caught.value)
    assert len(weights) == 1
    assert all(torch.equal(value, weights[0][name]) for name, value in tiny_model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_it_is_written(
    tiny_model: LatentDiffusion, bad: float
) -> None:
    """Also where it is clipped, which would spread it, and where the entry is outside the mask."""
    model = SaliencyUnlearnModel(tiny_model, "full", half_mask(tiny_model))
    name = "out.2.weight"
    parameter = tiny_model.unet.get_parameter(name)
    place = tuple((~model.selected[name]).nonzero()[0].tolist())

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[place] = bad
        return gradient

    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    handle = parameter.register_hook(spoil)
    with pytest.raises(
        TrainingError,
        match=r"step 0: the gradients of 1 tensors are not finite \(out\.2\.weight\), from the images to "
        r"forget: forget/0-0\.png, forget/0-1\.png; retain: retain/0-0\.png",
    ):
        fit(SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3), [tiny_batch(0)], gradient_clip_val=1.0)
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_an_unknown_target_is_refused(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match="known: current, frozen"):
        SaliencyUnlearnTrainer(SaliencyUnlearnModel(tiny_model, "full"), alpha=0.5, lr=1e-3, target="ema")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise, frozen"):
        SaliencyUnlearnTrainer(
            SaliencyUnlearnModel(tiny_model, "full"), alpha=0.5, lr=1e-3, retain_target="original"
        )


def test_the_learning_rate_falls_in_equal_steps(make_tiny_model: Callable[..., LatentDiffusion]) -> None:
    """As dense Adam whose learning rate is set by hand: lr, 2/3 lr, 1/3 lr; without decay_steps it stays."""
    batches = [tiny_batch(k) for k in range(3)]
    for decay_steps, expected in ((3, [1e-3, 2e-3 / 3, 1e-3 / 3]), (None, [1e-3] * 3)):
        ldm, plain = make_tiny_model(), make_tiny_model()
        used: list[float] = []

        class Look(pl.Callback):
            def on_before_optimizer_step(
                self, _: pl.Trainer, __: pl.LightningModule, optimizer: torch.optim.Optimizer
            ) -> None:
                used.append(optimizer.param_groups[0]["lr"])  # noqa: B023

        trainer = SaliencyUnlearnTrainer(
            SaliencyUnlearnModel(ldm, "xattn"), alpha=0.5, lr=1e-3, decay_steps=decay_steps
        )
        fit(trainer, batches, callbacks=[Look()])
        assert used == pytest.approx(expected, rel=1e-6)

        named = {name: p for name, p in plain.unet.named_parameters() if "attn2" in name}
        optimizer = torch.optim.Adam(named.values(), lr=1e-3)
        for batch, lr in zip(batches, expected, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            salun_loss(plain, batch["forget"], batch["retain"], 0.5)[0].backward()
            optimizer.step()
        for name, parameter in named.items():
            torch.testing.assert_close(ldm.unet.get_parameter(name), parameter, rtol=0.0, atol=1e-5)
