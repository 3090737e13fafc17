from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.trainer import (
    SaliencyUnlearnTrainer,
    ascent_loss,
    retain_loss,
    salun_loss,
)
from mu.ldm import LatentDiffusion
from mu.unlearning.batches import Batch, ForgetBatch, RetainBatch, on_device
from mu.unlearning.compute import (
    Compute,
    OutOfMemoryError,
    computing,
)
from mu.unlearning.moving import FrozenOriginal, MovingModel, TrainingError
from mu.unlearning.trainer import Trainer
from tests.algorithms.saliency_unlearning.conftest import verify_unmasked


def tiny_batch(seed: int, images: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def part(contexts: int) -> tuple[Tensor, ...]:
        timesteps = torch.randint(0, 1000, (images,), generator=generator)
        latents, noise = normal(images, 4, 8, 8), normal(images, 4, 8, 8)
        return latents, timesteps, noise, *(normal(images, 7, 32) for _ in range(contexts))

    names = {part: [f"{part}/{seed}-{n}.png" for n in range(images)] for part in ("forget", "retain")}
    return Batch(ForgetBatch(*part(2)), RetainBatch(*part(1)), names)


def fit(trainer: SaliencyUnlearnTrainer, batches: list[Batch]) -> list[dict[str, float]]:
    """A step on each batch; returns their terms."""
    return [trainer.step(batch) for batch in batches]


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
    loss, forget_term, retain_term = salun_loss(tiny_model, batch.forget, batch.retain, 0.5)
    latents, timesteps, noise, context, substitute = batch.forget
    noisy = tiny_model.q_sample(latents, timesteps, noise)
    target = tiny_model.predict_noise(noisy, timesteps, substitute).detach()
    expected_f = (tiny_model.predict_noise(noisy, timesteps, context) - target).square().mean()
    latents, timesteps, noise, context = batch.retain
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
        batch.forget,
        batch.retain,
        0.5,
        target_model=other if shared else None,
        retain_model=other,
    )
    latents, timesteps, noise, context = batch.retain
    inputs = model.q_sample(latents, timesteps, noise), timesteps, context
    expected = (model.predict_noise(*inputs) - other.predict_noise(*inputs)).square().mean()
    torch.testing.assert_close(retain_term, expected, rtol=1e-5, atol=1e-7)
    alone = salun_loss(model, batch.forget, batch.retain, 0.5, other if shared else None)
    torch.testing.assert_close(forget_term, alone[1], rtol=1e-5, atol=1e-7)
    assert not torch.isclose(retain_term, alone[2], rtol=1e-2)


def test_a_model_retains_what_it_predicts_itself(tiny_model: LatentDiffusion) -> None:
    """No pull where nothing has changed: the retain term and its gradient are 0 up to rounding."""
    batch = tiny_batch(0)
    retain_term = salun_loss(tiny_model, batch.forget, batch.retain, 0.5, retain_model=tiny_model)[2]
    assert retain_term.item() < 1e-10
    gradients = torch.autograd.grad(retain_term, list(tiny_model.unet.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-5


def test_the_target_may_be_another_model(make_tiny_model: Callable[..., LatentDiffusion]) -> None:
    model, other, batch = make_tiny_model(seed=0), make_tiny_model(seed=1), tiny_batch(0)
    latents, timesteps, noise, context, substitute = batch.forget
    _, forget_term, _ = salun_loss(model, batch.forget, batch.retain, 0.5, target_model=other)
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
    loss, *_ = salun_loss(tiny_model, batch.forget, batch.retain, 0.5)
    exact = torch.autograd.grad(loss, list(tiny_model.unet.parameters()))
    with Compute(precision="bf16-mixed").autocast(tiny_model.device):
        loss, *_ = salun_loss(tiny_model, batch.forget, batch.retain, 0.5)
    assert loss.dtype == torch.float32
    rough = torch.autograd.grad(loss, list(tiny_model.unet.parameters()))
    a, b = (torch.cat([g.view(-1) for g in grads]) for grads in (exact, rough))
    assert ((a - b).norm() / a.norm()).item() < 0.1


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("retain_target", ["noise", "frozen"])
@pytest.mark.parametrize("target", ["current", "frozen"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16-mixed"])
def test_promise_29_every_weight_that_may_move_has_a_gradient(
    make_tiny_model: Callable[..., LatentDiffusion],
    precision: str,
    target: str,
    retain_target: str,
    device: str,
) -> None:
    """Of the fp32 gradient's size: a release of torch that loses most of them fails here, by name."""
    found: dict[str, dict[str, Tensor]] = {}
    for arithmetic in ("fp32", precision):
        ldm, compute = make_tiny_model().to(device), Compute(precision=arithmetic)
        batch = tiny_batch(0)
        batch = Batch(on_device(batch.forget, ldm.device), on_device(batch.retain, ldm.device))
        with computing(ldm, compute):
            model = SaliencyUnlearnModel(ldm, "full")
            original = FrozenOriginal(model)
            with torch.no_grad():  # as after some steps: the frozen one is another
                for parameter in ldm.unet.parameters():
                    parameter.mul_(1.1)
            with compute.autocast(ldm.device):
                loss, *_ = salun_loss(
                    ldm,
                    batch.forget,
                    batch.retain,
                    0.5,
                    original if target == "frozen" else None,
                    retain_model=original if retain_target == "frozen" else None,
                )
            loss.backward()
            named = model.parameters_to_train()
            assert [name for name, parameter in named if parameter.grad is None] == []
            found[arithmetic] = {name: p.grad.float() for name, p in named}  # type: ignore[union-attr]
    exact, rough = (torch.cat([g.reshape(-1) for g in found[a].values()]) for a in ("fp32", precision))
    assert ((rough - exact).norm() / exact.norm()).item() < 0.2


@pytest.mark.parametrize("objective", ["salun", "ascent", "retain"])
def test_promise_29_a_tensor_without_a_gradient_is_named_before_any_weight_moves(
    tiny_model: LatentDiffusion, objective: str
) -> None:
    """Frozen behind the model's back, as a caller may; all its other weights have a gradient."""
    model = SaliencyUnlearnModel(tiny_model, "full")
    lost = ["input_blocks.0.0.weight", "out.2.bias"]
    for name in lost:
        tiny_model.unet.get_parameter(name).requires_grad_(False)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    with pytest.raises(TrainingError, match=rf"step 0: 2 of \d+ tensors .*no gradient \({', '.join(lost)}\)"):
        fit(SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3, objective=objective), [tiny_batch(0)])
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


# ---- the loss of a network that predicts v


def v_model(make_tiny_model: Callable[..., LatentDiffusion], seed: int = 0) -> LatentDiffusion:
    return make_tiny_model(seed, parameterization="v", unconditional=True)


def noisy_and_v(model: LatentDiffusion, part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """z_t and v = sqrt(abar) eps - sqrt(1 - abar) z of a part of a batch, from the schedule in fp64."""
    latents, timesteps, noise = part[:3]
    abar = model.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    return noisy.float(), (abar.sqrt() * noise - (1 - abar).sqrt() * latents).float()


@torch.no_grad()
def test_of_a_network_that_predicts_v_every_loss_is_on_v(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    model, other, batch = v_model(make_tiny_model), v_model(make_tiny_model, 1), tiny_batch(0)
    _, t, _, context, substitute = batch.forget
    noisy, v = noisy_and_v(model, batch.forget)
    _, t_r, _, context_r = batch.retain
    noisy_r, v_r = noisy_and_v(model, batch.retain)
    forgotten, retained = model.unet(noisy, t, context), model.unet(noisy_r, t_r, context_r)
    expected = {
        "forget": (forgotten - model.unet(noisy, t, substitute)).square().mean(),
        "retain": (retained - v_r).square().mean(),
        "forget, frozen": (forgotten - other.unet(noisy, t, substitute)).square().mean(),
        "retain, frozen": (retained - other.unet(noisy_r, t_r, context_r)).square().mean(),
        "ascent": -(forgotten - v).square().mean(),
    }
    plain = salun_loss(model, batch.forget, batch.retain, 0.5)
    frozen = salun_loss(model, batch.forget, batch.retain, 0.5, other, retain_model=other)
    found = {
        "forget": plain[1],
        "retain": plain[2],
        "forget, frozen": frozen[1],
        "retain, frozen": frozen[2],
        "ascent": ascent_loss(model, batch.forget),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(retain_loss(model, batch.retain), expected["retain"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("t", [50, 500, 800, 950])
def test_of_a_network_that_predicts_v_noisy_steps_count_in_full(
    make_tiny_model: Callable[..., LatentDiffusion], t: int
) -> None:
    """Gradient of the forget term by the network's own output: 2/n (v_f - v_p), and not that times abar_t."""
    model = v_model(make_tiny_model)
    latents, _, noise, context, substitute = tiny_batch(0, images=1).forget
    forget = (latents, torch.tensor([t]), noise, context, substitute)
    outputs: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        outputs.append(output)

    hook = model.unet.register_forward_hook(keep)
    term = salun_loss(model, forget, (latents, forget[1], noise, context), 0.0)[1]
    hook.remove()
    term.backward()
    target, both = outputs
    gap = (both[:1] - target).detach()
    assert both.grad is not None
    torch.testing.assert_close(both.grad[:1], 2 / gap.numel() * gap, rtol=1e-5, atol=1e-9)
    assert not both.grad[1:].any()


# ---- training


def test_training_is_the_plain_loop_and_moves_only_the_mask(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    """Three steps against dense Adam on masked gradients, written out."""
    batches = [tiny_batch(k) for k in range(3)]
    ldm, plain = make_tiny_model(), make_tiny_model()
    before = {name: value.clone() for name, value in ldm.state_dict().items()}
    mask = half_mask(ldm)
    model = SaliencyUnlearnModel(ldm, "noxattn", mask)
    fit(SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3), batches)
    verify_unmasked(model, make_tiny_model())

    named = {name: p for name, p in plain.unet.named_parameters() if name in model.selected}
    optimizer = torch.optim.Adam(named.values(), lr=1e-3, fused=True)
    for batch in batches:
        optimizer.zero_grad()
        salun_loss(plain, batch.forget, batch.retain, 0.5)[0].backward()
        for name, parameter in named.items():
            parameter.grad *= mask[name]
        optimizer.step()
    trained = dict(ldm.unet.named_parameters())
    updates = [
        torch.cat(
            [(p.detach() - before[f"model.diffusion_model.{name}"]).reshape(-1) for name, p in parameters]
        )
        for parameters in (trained.items(), plain.unet.named_parameters())
    ]
    # Of an entry whose gradient is nothing but rounding, Adam makes a step that is anything up to lr.
    assert ((updates[0] - updates[1]).norm() / updates[1].norm()).item() < 1e-3
    assert ((updates[0] - updates[1]).abs() > 1e-5).float().mean().item() < 1e-3

    moved = {name for name, value in ldm.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= {f"model.diffusion_model.{name}" for name in model.selected}
    assert len(moved) > 0.9 * len(model.selected)
    for name, marked in mask.items():
        old, new = before[f"model.diffusion_model.{name}"], trained[name]
        assert torch.equal(old[~marked], new[~marked])


def test_dropout_stays_off_and_the_terms_are_given(make_tiny_model: Callable[..., LatentDiffusion]) -> None:
    ldm = make_tiny_model(unet={"dropout": 0.9})
    batch = tiny_batch(0)
    expected = [float(term.detach()) for term in salun_loss(ldm, batch.forget, batch.retain, 0.25)]
    ldm.train()
    seen = SaliencyUnlearnTrainer(SaliencyUnlearnModel(ldm, "full"), alpha=0.25, lr=1e-3).step(batch)
    assert [seen["loss"], seen["forget"], seen["retain"]] == pytest.approx(expected, rel=1e-5)


def test_the_controls_have_the_diffusion_loss_and_its_gradient(linear_model: Any, make_batch: Any) -> None:
    """ascent climbs it on the forget set, with the forgotten prompt; retain descends it on the retain set."""
    linear_model.eval()
    forget, retain = make_batch(2, (3, 4), seed=1), make_batch(3, (5,), seed=2)
    for loss, part, sign in (
        (ascent_loss(linear_model, forget), forget, -1),
        (retain_loss(linear_model, retain), retain, 1),
    ):
        linear_model.zero_grad()
        loss.backward()
        latents, timesteps, noise, context = part[:4]
        x, mean = linear_model.q_sample(latents, timesteps, noise), context.mean(1)
        signal, prompt = linear_model.unet.signal.detach(), linear_model.unet.prompt.detach()
        residual = signal[:, None, None] * x + (mean @ prompt.T)[:, :, None, None] - noise
        torch.testing.assert_close(loss.detach(), sign * residual.square().mean())
        gradient = sign * 2 / residual.numel() * (residual * x).sum((0, 2, 3))
        torch.testing.assert_close(linear_model.unet.signal.grad, gradient)


@pytest.mark.parametrize("objective", ["ascent", "retain"])
def test_a_control_steps_on_its_own_loss_alone(
    make_tiny_model: Callable[..., LatentDiffusion], objective: str
) -> None:
    """Its loss moves as it should on the batch it is trained with, and the other term is logged as 0."""
    ldm, batch = make_tiny_model(), tiny_batch(0)

    def terms() -> tuple[float, float]:
        with torch.no_grad():
            return float(ascent_loss(ldm, batch.forget)), float(retain_loss(ldm, batch.retain))

    before = terms()
    model = SaliencyUnlearnModel(ldm, "full", half_mask(ldm))
    trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3, target="frozen", objective=objective)
    seen = fit(trainer, [batch] * 3)
    own = 0 if objective == "ascent" else 1
    assert terms()[own] < before[own]
    expected = {"forget": before[0], "retain": 0.0} if own == 0 else {"forget": 0.0, "retain": before[1]}
    assert {name: seen[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert seen[0]["loss"] == pytest.approx(before[own], rel=1e-4)
    verify_unmasked(model, make_tiny_model())


@pytest.mark.parametrize("target", ["current", "frozen"])
def test_the_target_is_the_current_or_the_frozen_model(
    make_tiny_model: Callable[..., LatentDiffusion], target: Any
) -> None:
    batches = [tiny_batch(0), tiny_batch(1)]
    ldm, original = make_tiny_model(), make_tiny_model()
    model = SaliencyUnlearnModel(ldm, "full", half_mask(ldm))
    trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-2, target=target)
    trainer.step(batches[0])
    with torch.no_grad():
        by_current = float(salun_loss(ldm, batches[1].forget, batches[1].retain, 0.5)[1])
        by_frozen = float(
            salun_loss(ldm, batches[1].forget, batches[1].retain, 0.5, target_model=original)[1]
        )
    logged = trainer.step(batches[1])["forget"]
    assert abs(by_current - by_frozen) > 1e-3 * by_current
    assert logged == pytest.approx(by_current if target == "current" else by_frozen, rel=1e-4)
    verify_unmasked(model, make_tiny_model())


def test_under_autocast_the_frozen_model_does_not_stand_in_for_the_trained_one(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    """Autocast keeps bf16 copies of weights: those of the frozen original must not serve the trained model."""
    ldm, moved, original, batch = make_tiny_model(), make_tiny_model(), make_tiny_model(), tiny_batch(0)
    frozen = FrozenOriginal(SaliencyUnlearnModel(ldm, "full"))
    with torch.no_grad():
        for model in (ldm, moved):
            for parameter in model.unet.parameters():
                parameter.mul_(1.1)
    expected = salun_loss(moved, batch.forget, batch.retain, 0.5, original, retain_model=original)
    with Compute(precision="bf16-mixed").autocast(ldm.device):
        found = salun_loss(ldm, batch.forget, batch.retain, 0.5, frozen, retain_model=frozen)
    for term, wanted in zip(found, expected, strict=True):
        assert wanted.item() > 1e-4
        torch.testing.assert_close(term, wanted, rtol=0.2, atol=0.0)
    found[0].backward()
    expected[0].backward()
    gradients = [
        torch.cat([p.grad.reshape(-1) for p in model.unet.parameters() if p.grad is not None])
        for model in (ldm, moved)
    ]
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 0.2


def test_with_a_frozen_retain_target_the_retain_term_starts_at_nothing(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    ldm, original = make_tiny_model(), make_tiny_model()
    model = SaliencyUnlearnModel(ldm, "full", half_mask(ldm))
    trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-2, retain_target="frozen")
    assert trainer.step(tiny_batch(0))["retain"] < 1e-10
    batch = tiny_batch(1)
    with torch.no_grad():
        expected = float(salun_loss(ldm, batch.forget, batch.retain, 0.5, retain_model=original)[2])
    logged = trainer.step(batch)["retain"]
    assert logged == pytest.approx(expected, rel=1e-4)
    assert logged > 1e-8
    verify_unmasked(model, make_tiny_model())


def test_promise_21_a_loss_that_is_not_finite_stops_before_it_is_written(tiny_model: LatentDiffusion) -> None:
    batches = [tiny_batch(0), tiny_batch(1), tiny_batch(2)]
    batches[1].retain[2][0, 0, 0, 0] = math.inf
    model = SaliencyUnlearnModel(tiny_model, "full", half_mask(tiny_model))
    trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3)
    trainer.step(batches[0])
    weights = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 1: the loss is (inf|nan)") as caught:
        trainer.step(batches[1])
    files = "forget: forget/1-0.png, forget/1-1.png; retain: retain/1-0.png, retain/1-1.png"
    assert f"on the images to {files}." in str(caught.value)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_promise_21_a_gradient_that_is_not_finite_stops_before_it_is_written(
    tiny_model: LatentDiffusion, bad: float
) -> None:
    """Also where the entry is outside the mask."""
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
        fit(SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3), [tiny_batch(0)])
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_an_unknown_target_is_refused(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match="known: current, frozen"):
        SaliencyUnlearnTrainer(SaliencyUnlearnModel(tiny_model, "full"), alpha=0.5, lr=1e-3, target="ema")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise, frozen"):
        SaliencyUnlearnTrainer(
            SaliencyUnlearnModel(tiny_model, "full"), alpha=0.5, lr=1e-3, retain_target="original"
        )
    with pytest.raises(ValueError, match="known: salun, ascent, retain"):
        SaliencyUnlearnTrainer(
            SaliencyUnlearnModel(tiny_model, "full"), alpha=0.5, lr=1e-3, objective="descent"
        )


def test_the_learning_rate_falls_in_equal_steps(make_tiny_model: Callable[..., LatentDiffusion]) -> None:
    """As dense Adam whose learning rate is set by hand: lr, 2/3 lr, 1/3 lr; without decay_steps it stays."""
    batches = [tiny_batch(k) for k in range(3)]
    for decay_steps, expected in ((3, [1e-3, 2e-3 / 3, 1e-3 / 3]), (None, [1e-3] * 3)):
        ldm, plain = make_tiny_model(), make_tiny_model()
        used: list[float] = []
        trainer = SaliencyUnlearnTrainer(
            SaliencyUnlearnModel(ldm, "xattn"), alpha=0.5, lr=1e-3, decay_steps=decay_steps
        )
        for batch in batches:
            used.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.step(batch)
        assert used == pytest.approx(expected, rel=1e-6)

        named = {name: p for name, p in plain.unet.named_parameters() if "attn2" in name}
        optimizer = torch.optim.Adam(named.values(), lr=1e-3, fused=True)
        for batch, lr in zip(batches, expected, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            salun_loss(plain, batch.forget, batch.retain, 0.5)[0].backward()
            optimizer.step()
        for name, parameter in named.items():
            torch.testing.assert_close(ldm.unet.get_parameter(name), parameter, rtol=0.0, atol=1e-5)


# ---- in pieces


def noted_gradients(trainer: SaliencyUnlearnTrainer) -> list[Tensor]:
    """From now on, the gradient of each step, (n,), before the optimizer writes."""
    gradients: list[Tensor] = []

    def note(*_: Any) -> None:
        found = [p.grad.reshape(-1) for p in trainer.model.ldm.unet.parameters() if p.grad is not None]
        gradients.append(torch.cat(found).clone())

    trainer.optimizer.register_step_pre_hook(note)
    return gradients


def uneven_batch(seed: int) -> Batch:
    """5 images to forget, 3 to retain."""
    forget, retain = tiny_batch(seed, images=5), tiny_batch(seed + 100, images=3)
    images = {"forget": forget.images["forget"], "retain": retain.images["retain"]}
    return Batch(forget.forget, retain.retain, images)


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_in_pieces_is_the_whole_batch_to_rounding(
    make_tiny_model: Callable[..., LatentDiffusion], size: int
) -> None:
    """Gradient, terms and first update; parts of unequal size, pieces that are not full, a part that runs out."""
    seen: dict[int | None, Any] = {}
    for micro in (None, size):
        ldm = make_tiny_model()
        model = SaliencyUnlearnModel(ldm, "full", half_mask(ldm))
        trainer = SaliencyUnlearnTrainer(model, alpha=0.3, lr=1e-3, micro_batch_size=micro)
        gradients = noted_gradients(trainer)
        terms = trainer.step(uneven_batch(0))
        seen[micro] = gradients[0], terms, torch.cat([p.reshape(-1) for p in ldm.unet.parameters()])
    whole, cut = seen[None], seen[size]
    assert ((cut[0] - whole[0]).norm() / whole[0].norm()).item() < 1e-5
    for name in ("loss", "forget", "retain"):
        assert cut[1][name] == pytest.approx(whole[1][name], rel=1e-5)
    # Adam's first step is lr times the sign of the gradient: where that is not rounding alone, it is the same.
    clear = whole[0].abs() > 1e-4 * whole[0].abs().max()
    torch.testing.assert_close(cut[2][clear], whole[2][clear], rtol=0.0, atol=1e-6)


def needs_memory(ldm: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, *, most: int, when: str) -> list[int]:
    """From now on the UNet runs out of memory with more than so many images; returns where batches are noted.

    when: "forward" or "backward", by an allocation that the CPU refuses; "cuda", by the error of a GPU.
    """
    whole, batches = ldm.unet.forward, []

    def too_much() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def forward(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            batches.append(len(x))
        if len(x) > most and torch.is_grad_enabled():
            if when == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if when == "forward":
                too_much()
            weight = ldm.unet.get_parameter("input_blocks.0.0.weight")  # the last to get its gradient
            handle = weight.register_hook(lambda _: (handle.remove(), too_much())[1])  # type: ignore[func-returns-value]
        return whole(x, timesteps, context)

    monkeypatch.setitem(ldm.unet.__dict__, "forward", forward)
    return batches


@pytest.mark.parametrize("when", ["forward", "backward", "cuda"])
def test_promise_22_out_of_memory_halves_the_pieces_and_not_the_batch(
    make_tiny_model: Callable[..., LatentDiffusion],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    when: str,
) -> None:
    gradients = []
    for most in (None, 4):
        ldm = make_tiny_model()
        trainer = SaliencyUnlearnTrainer(SaliencyUnlearnModel(ldm, "full"), alpha=0.5, lr=1e-3)
        if most is not None:
            calls = needs_memory(ldm, monkeypatch, most=most, when=when)
        noted = noted_gradients(trainer)
        fit(trainer, [tiny_batch(k, images=6) for k in range(2)])
        gradients.append(noted)
    whole, cut = gradients
    assert len(whole) == len(cut) == 2
    assert ((cut[0] - whole[0]).norm() / whole[0].norm()).item() < 1e-5
    # 6 + 6 images and 3 + 3 are too many; 1 + 1 are not, and the second step begins with them.
    assert calls == [12, 6, *[2] * 12]
    said = [message for message in caplog.messages if "out of memory" in message]
    assert [message.split(";")[0] for message in said] == [
        "out of memory with 6 images at a time",
        "out of memory with 3 images at a time",
    ]


def test_promise_22_memory_that_does_not_suffice_for_one_image_is_an_error(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SaliencyUnlearnModel(tiny_model, "full")
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    needs_memory(tiny_model, monkeypatch, most=0, when="forward")
    with pytest.raises(
        OutOfMemoryError, match=r"one image at a time .*allocate.*gradient_checkpointing true"
    ):
        fit(SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3), [tiny_batch(0)])
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_another_error_is_not_taken_for_memory(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the expanded size of the tensor must match")

    monkeypatch.setattr(tiny_model.unet, "forward", broken)
    trainer = SaliencyUnlearnTrainer(SaliencyUnlearnModel(tiny_model, "full"), alpha=0.5, lr=1e-3)
    with pytest.raises(RuntimeError, match="must match"):
        fit(trainer, [tiny_batch(0)])
    assert trainer.micro_batch_size is None


# ---- precision


def test_precision_is_that_of_the_arithmetic(
    make_tiny_model: Callable[..., LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast for bf16-mixed alone; weights and inputs are fp32."""
    for precision in ("fp32", "bf16-mixed"):
        ldm = make_tiny_model()
        whole, seen = ldm.unet.forward, set()

        def forward(x: Tensor, *args: Tensor) -> Tensor:
            weights = {p.dtype for p in ldm.unet.parameters()}  # noqa: B023
            seen.add((torch.is_autocast_enabled("cpu"), x.dtype, *weights))  # noqa: B023
            return whole(x, *args)  # noqa: B023

        monkeypatch.setattr(ldm.unet, "forward", forward)
        compute = Compute(precision=precision)
        with computing(ldm, compute):
            model = SaliencyUnlearnModel(ldm, "full")
            trainer = SaliencyUnlearnTrainer(model, alpha=0.5, lr=1e-3, compute=compute)
            monkeypatch.setattr(ldm.unet, "forward", forward)
            fit(trainer, [tiny_batch(0)])
        assert seen == {(precision == "bf16-mixed", torch.float32, torch.float32)}


# ---- an objective of another shape


class Twice:
    """A method without a retain set: two forgotten prompts shall predict the same."""

    weights: Mapping[str, float] = {"forget": 2.0}

    def terms(self, model: LatentDiffusion, forget: ForgetBatch, retain: None) -> dict[str, Tensor]:
        assert retain is None
        noisy = model.q_sample(forget.latents, forget.timesteps, forget.noise)
        one = model.predict(noisy, forget.timesteps, forget.context)
        other = model.predict(noisy, forget.timesteps, forget.reference_context)
        return {"forget": (one - other).square().mean()}


@pytest.mark.parametrize("size", [None, 2])
def test_a_method_may_have_no_retain_set(
    make_tiny_model: Callable[..., LatentDiffusion], size: int | None
) -> None:
    ldm, forget = make_tiny_model(), tiny_batch(0, images=3).forget
    with torch.no_grad():
        expected = float(Twice().terms(ldm, forget, None)["forget"])
    trainer = Trainer(MovingModel(ldm, "xattn"), Twice(), lr=1e-3, micro_batch_size=size)
    batch = Batch(forget)
    assert float(trainer.losses(batch)["loss"]) == pytest.approx(2 * expected, rel=1e-5)
    found = trainer.step(batch)
    assert found == pytest.approx({"loss": 2 * expected, "forget": expected, "retain": 0.0}, rel=1e-5)
    assert trainer.step(batch)["forget"] < expected
