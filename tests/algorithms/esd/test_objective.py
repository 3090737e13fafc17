"""The loss of ESD against what can be computed by hand, and its batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mu.algorithms.esd.objective import ESD, EraseBatch, EraseBatches
from mu.ldm import LatentDiffusion
from mu.ldm.sampler import ddim_timesteps, sample_ddim

STEPS = 10


def erase_batch(model: LatentDiffusion, *, steps_done: int, count: int = 2) -> EraseBatch:
    generator = torch.Generator().manual_seed(3)
    contexts = model.embed(["", "A Cats image in Noto style."]).detach()
    return EraseBatch(
        noise=torch.randn((count, *model.latent_shape()), generator=generator),
        steps_done=torch.full((count,), steps_done),
        context=contexts[1:].expand(count, -1, -1),
        uncond_context=contexts[:1].expand(count, -1, -1),
    )


def term(trained: LatentDiffusion, original: LatentDiffusion, batch: EraseBatch, eta: float) -> torch.Tensor:
    esd = ESD(original, negative_guidance=eta, start_guidance=3.0, ddim_steps=STEPS)
    return esd.terms(trained, batch, None)["forget"]


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_before_training_it_is_the_guidance_squared(tiny_model: LatentDiffusion, eta: float) -> None:
    """f = f_o: f(c) - (f("") - eta (f(c) - f(""))) = (1 + eta) (f(c) - f(""))."""
    batch = erase_batch(tiny_model, steps_done=0)
    t = torch.full((2,), ddim_timesteps(tiny_model.num_timesteps, STEPS)[0])
    with torch.no_grad():
        guidance = tiny_model.predict(batch.noise, t, batch.context) - tiny_model.predict(
            batch.noise, t, batch.uncond_context
        )
        found = term(tiny_model, tiny_model, batch, eta)
    torch.testing.assert_close(found, (1 + eta) ** 2 * guidance.square().mean())


def test_the_trained_model_samples_and_predicts_and_the_original_is_the_target(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    trained, original = make_tiny_model(seed=0), make_tiny_model(seed=1)
    batch = erase_batch(original, steps_done=4)
    z = sample_ddim(
        trained,
        batch.context,
        shape=trained.latent_shape(),
        steps=STEPS,
        guidance_scale=3.0,
        uncond_context=batch.uncond_context,
        initial_noise=batch.noise,
        stop_after=4,
    )
    t = torch.full((2,), ddim_timesteps(trained.num_timesteps, STEPS)[4])
    with torch.no_grad():
        uncond, cond = (original.predict(z, t, c) for c in (batch.uncond_context, batch.context))
        expected = F.mse_loss(trained.predict(z, t, batch.context), uncond - 1.5 * (cond - uncond))
        found = term(trained, original, batch, 1.5)
    torch.testing.assert_close(found, expected)


def test_gradients_reach_the_trained_model_through_its_last_prediction_alone(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    trained, original = make_tiny_model(seed=0), make_tiny_model(seed=1)
    term(trained, original, erase_batch(original, steps_done=3), 1.0).backward()
    assert all(p.grad is not None for name, p in trained.unet.named_parameters() if "attn2" in name)
    assert all(p.grad is None for p in original.parameters())


def batches(seed: int = 0, batch_size: int = 3) -> EraseBatches:
    contexts = torch.arange(4.0)[:, None, None].expand(4, 2, 5)
    return EraseBatches(
        ["a", "b", "c", "d"],
        contexts,
        -torch.ones(2, 5),
        latent_shape=(4, 8, 8),
        stops=STEPS,
        seed=seed,
        batch_size=batch_size,
        total_steps=40,
    )


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, other = batches(), batches()
    for step in (7, 0, 39):
        for mine, theirs in zip(one[step].forget, other[step].forget, strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(batches(seed=1)[7].forget.noise, one[7].forget.noise)
    with pytest.raises(IndexError, match=r"step 40 is not in 0\.\.39"):
        one[40]


def test_all_prompts_of_a_batch_stop_at_one_step_and_every_step_is_met() -> None:
    made = [batches()[step].forget for step in range(40)]
    assert all(len(set(batch.steps_done.tolist())) == 1 for batch in made)
    assert {int(batch.steps_done[0]) for batch in made} == set(range(STEPS))


def test_four_steps_of_three_meet_each_prompt_three_times() -> None:
    """Shuffled passes without a break."""
    seen = [float(context[0, 0]) for step in range(4) for context in batches()[step].forget.context]
    assert sorted(seen) == sorted([0.0, 1.0, 2.0, 3.0] * 3)
    assert batches()[0].images["forget"] == ["abcd"[int(number)] for number in seen[:3]]
