"""The formulas of single attacks, in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mu.datasets.index import Row
from mu.evaluation.attacks.noised import begun
from mu.evaluation.attacks.relearn import FineTuning
from mu.evaluation.attacks.ring_a_bell import concept_direction, genetic_search, without_concept
from mu.evaluation.attacks.target import around_name
from mu.ldm import LatentDiffusion
from mu.ldm.sampler import ddim_timesteps, sample_ddim
from mu.unlearning.inversion import Noised


def row_of(style: str, object: str, prompt: str) -> Row:
    return Row(Path("x.png"), "x.png", prompt, style, object, style)


def test_the_name_is_cut_out_of_its_prompt() -> None:
    row = row_of("Van_Gogh", "Cats", "A Cats image in Van Gogh style.")
    assert around_name(row, "style") == ("A Cats image in", "style.")
    assert around_name(row, "object") == ("A", "image in Van Gogh style.")
    assert without_concept(row, "style") == "A Cats image."
    assert without_concept(row, "object") == "An image in Van Gogh style."
    alone = row_of("style", "", "An image in style style.")
    assert around_name(alone, "style") == ("An image in", "style.")


def test_a_noised_image_is_as_noisy_as_the_step_it_begins_with(tiny_model: LatentDiffusion) -> None:
    clean, noise = torch.randn(2, *tiny_model.latent_shape(16)), torch.randn(2, *tiny_model.latent_shape(16))
    timesteps = ddim_timesteps(1000, 10)
    for strength, left in ((0.5, 5), (0.9, 9), (0.01, 1)):
        found = begun(tiny_model, clean, noise, strength=strength, steps=10)
        assert found.step == 10 - left
        abar = tiny_model.alphas_cumprod[timesteps[found.step]]
        assert torch.allclose(found.latents, abar.sqrt() * clean + (1 - abar).sqrt() * noise, atol=1e-6)
    whole = begun(tiny_model, clean, noise, strength=1.0, steps=10)
    assert whole.step == 0
    assert torch.equal(whole.latents, noise)


def test_a_drawing_that_begins_later_does_the_last_steps(tiny_model: LatentDiffusion) -> None:
    context = tiny_model.embed(["a cat"])
    settings = {"shape": (4, 8, 8), "steps": 5, "guidance_scale": 1.0, "uncond_context": None}
    noise = torch.randn(1, 4, 8, 8)
    whole = sample_ddim(tiny_model, context, initial_noise=noise, **settings)
    begun_by = sample_ddim(tiny_model, context, initial_noise=noise, stop_after=2, **settings)
    told: list[int] = []
    rest = sample_ddim(
        tiny_model, context, initial_noise=begun_by, first_step=2, after_step=told.append, **settings
    )
    assert torch.equal(rest, whole)
    assert told == [1, 2, 3]


def test_fine_tuning_takes_a_step_of_adam_and_leaves_the_model_itself(tiny_model: LatentDiffusion) -> None:
    tiny_model.requires_grad_(False)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    images = Noised(torch.randn(3, 4, 8, 8), torch.tensor([5, 300, 900]), torch.randn(3, 4, 8, 8))
    context = tiny_model.embed(["a", "b", "c"])
    tuned, in_pieces = FineTuning(tiny_model, lr=1e-3), FineTuning(tiny_model, lr=1e-3)
    in_pieces._at_once.most = 2
    losses = [tuned.step(images, context) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert in_pieces.step(images, context) == pytest.approx(losses[0], rel=1e-5)
    # After the first step each weight has moved by lr, against the sign of its gradient.
    moved = [
        (value - before[f"model.diffusion_model.{name}"]).abs()
        for name, value in in_pieces.model.unet.state_dict().items()
    ]
    assert max(float(one.max()) for one in moved) == pytest.approx(1e-3, rel=1e-2)
    assert torch.cat([one.flatten() for one in moved]).median() == pytest.approx(1e-3, rel=1e-2)
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert tuned.model.cond_stage_model is tiny_model.cond_stage_model


def test_the_direction_is_the_mean_difference_of_pairs() -> None:
    with_it = torch.tensor([[[1.0, 2.0]], [[5.0, 0.0]]])
    without = torch.tensor([[[0.0, 2.0]], [[2.0, -2.0]]])
    assert torch.equal(concept_direction(with_it, without), torch.tensor([[2.0, 1.0]]))


def test_the_genetic_search_finds_a_text_and_never_loses_the_best() -> None:
    words = torch.arange(100, 140)
    wished = torch.tensor([103, 139, 100, 117])

    def search(**changes: float) -> tuple[torch.Tensor, list[float]]:
        settings = {"population": 40, "generations": 150, "mutation": 0.5, "crossover": 0.5, **changes}
        return genetic_search(
            lambda tokens: (tokens != wished).float().sum(dim=1),
            words,
            length=4,
            random=torch.Generator().manual_seed(0),
            **settings,  # type: ignore[arg-type]
        )

    found, curve = search()
    assert torch.equal(found, wished)
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == 0
    assert len(curve) == 151
    # Without anything new there is nothing but the best of the first generation.
    _, same = search(mutation=0.0, crossover=0.0)
    assert len(set(same)) == 1
    # Parents that exchange their ends alone cannot do worse.
    _, mixed = search(mutation=0.0)
    assert mixed[-1] < same[-1]
