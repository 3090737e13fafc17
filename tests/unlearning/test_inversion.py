"""New words: what the text encoder reads, their gradient, their steps, and words that anybody can type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mu.ldm import LatentDiffusion
from mu.ldm.params import VOCAB_SIZE
from mu.ldm.text_encoder import token_ids, tokenize
from mu.unlearning.inversion import (
    AdamState,
    ContextLoss,
    Noised,
    embeddings_of,
    encode_words,
    new_words,
    plain_tokens,
    prompt_tokens,
    text_encoder,
    vector_gradient,
)
from mu.unlearning.words import nearest_tokens, text_of, typed_words
from tests.conftest import TINY_V2

PROMPT = "A Cats image in Van Gogh style."


@pytest.fixture
def images(tiny_model: LatentDiffusion) -> Noised:
    generator = torch.Generator().manual_seed(1)
    shape = (5, *tiny_model.latent_shape(16))
    return Noised(
        torch.randn(shape, generator=generator),
        torch.tensor([3, 100, 500, 900, 999]),
        torch.randn(shape, generator=generator),
    )


@pytest.mark.parametrize("sections", [{}, TINY_V2], ids=["clip", "open_clip"])
def test_new_words_with_the_embeddings_of_old_ones_are_read_as_these(
    sections: dict, make_tiny_model: Callable[..., LatentDiffusion]
) -> None:
    model = make_tiny_model(**sections).requires_grad_(False)
    encoder = text_encoder(model)
    name = plain_tokens("Van Gogh")
    tokens = prompt_tokens(encoder, ("A Cats image in", new_words(2), "style."))
    assert tokens[5:7].tolist() == [VOCAB_SIZE, VOCAB_SIZE + 1]
    found = encode_words(encoder, tokens[None], embeddings_of(encoder, name))
    assert len(name) == 2
    assert torch.equal(found, model.embed([PROMPT]))
    # And another embedding is read otherwise, from its place on: the encoder is causal.
    other = encode_words(encoder, tokens[None], embeddings_of(encoder, name).flip(-1))
    place = int((tokens == VOCAB_SIZE).nonzero())
    assert torch.equal(other[:, :place], found[:, :place])
    assert bool((other[:, place:] != found[:, place:]).any(dim=-1).all())
    assert torch.equal(model.embed([PROMPT]), found)  # nothing stays in the encoder


def test_a_prompt_put_together_has_the_tokens_of_the_whole(tiny_model: LatentDiffusion) -> None:
    encoder = text_encoder(tiny_model)
    parts = ("A Cats image in", plain_tokens("Van Gogh"), "style.")
    assert torch.equal(prompt_tokens(encoder, parts)[None], tokenize([PROMPT]))
    with pytest.raises(ValueError, match="81 tokens"):
        prompt_tokens(encoder, (new_words(79),))


def test_the_gradient_is_that_of_the_diffusion_loss_whatever_memory_holds_at_once(
    tiny_model: LatentDiffusion, images: Noised
) -> None:
    model = tiny_model.requires_grad_(False)
    encoder = text_encoder(model)
    first, second = (
        prompt_tokens(encoder, (f"A {object} image in", new_words(2), "style."))
        for object in ("Cats", "Dogs")
    )
    tokens = torch.stack([second, first, first, second, first])
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))

    leaf = vectors.clone().requires_grad_()
    noisy = model.q_sample(images.latents, images.timesteps, images.noise)
    predicted = model.predict(noisy, images.timesteps, encode_words(encoder, tokens, leaf))
    wanted = F.mse_loss(predicted, images.noise)
    (slope,) = torch.autograd.grad(wanted, leaf)

    loss_of = ContextLoss(model)
    loss, gradient = vector_gradient(encoder, tokens, vectors, partial(loss_of, images))
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    assert torch.allclose(gradient, slope, rtol=1e-3, atol=1e-7)
    assert loss_of.value(images, model.embed(["x"]).expand(5, -1, -1)) != pytest.approx(loss, rel=1e-4)
    context = encode_words(encoder, tokens, vectors)
    assert loss_of.value(images, context) == pytest.approx(loss, rel=1e-5)

    loss_of._at_once.most = 2
    pieces = vector_gradient(encoder, tokens, vectors, partial(loss_of, images))
    assert pieces[0] == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(pieces[1], gradient, rtol=1e-3, atol=1e-7)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_target_takes_the_place_of_the_noise(tiny_model: LatentDiffusion, images: Noised) -> None:
    model = tiny_model.requires_grad_(False)
    context = model.embed(["a cat"]).expand(5, -1, -1)
    noisy = model.q_sample(images.latents, images.timesteps, images.noise)
    own = model.predict(noisy, images.timesteps, context)
    loss, gradient = ContextLoss(model)(images, context, own)
    assert loss == pytest.approx(0, abs=1e-9)
    assert float(gradient.abs().max()) < 1e-6
    assert ContextLoss(model).value(images, context, own + 2) == pytest.approx(4, rel=1e-5)


def test_steps_are_those_of_adam_and_go_on_where_they_were_left() -> None:
    start = torch.tensor([[1.0, -2.0, 3.0]])
    state = AdamState(start, lr=0.1)
    state.step(torch.tensor([[5.0, -0.01, 2.0]]))
    # Kingma & Ba, algorithm 1: in the first step the means cancel, and each entry moves by lr against its sign.
    assert torch.allclose(state.vectors, torch.tensor([[0.9, -1.9, 2.9]]), atol=1e-5)

    # The second step, by hand.
    gradient = torch.tensor([[1.0, 1.0, 1.0]])
    before = state.vectors.detach().clone()
    first = 0.9 * 0.1 * torch.tensor([[5.0, -0.01, 2.0]]) + 0.1 * gradient
    second = 0.999 * 0.001 * torch.tensor([[25.0, 0.0001, 4.0]]) + 0.001 * gradient
    moved = 0.1 * (first / (1 - 0.9**2)) / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
    kept = {name: value.clone() for name, value in state.tensors().items()}
    state.step(gradient)
    assert torch.allclose(state.vectors, before - moved, atol=1e-6)

    again = AdamState(torch.zeros(1, 3), lr=0.1)
    again.take(kept)
    again.step(gradient)
    assert torch.equal(again.vectors, state.vectors)
    assert again.steps == 2

    decayed = AdamState(start, lr=0.1, weight_decay=0.5)
    decayed.step(torch.zeros(1, 3))
    assert torch.allclose(decayed.vectors, 0.95 * start)


def test_the_nearest_word_has_the_greatest_cosine() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 9.0], [-1.0, 0.1]])
    vectors = torch.tensor([[5.0, 1.0], [0.1, 0.2], [-3.0, 0.0]])
    assert nearest_tokens(vectors, embeddings, torch.tensor([70, 71, 72])).tolist() == [70, 71, 72]
    assert nearest_tokens(10 * vectors, embeddings, torch.tensor([7, 8, 9])).tolist() == [7, 8, 9]


def test_words_that_are_typed_are_read_as_their_tokens() -> None:
    words = typed_words()
    assert len(words) > 20_000
    assert all(word.isascii() and word.isalpha() and word == word.lower() for word in words.values())
    assert [read[1:-1] for read in token_ids(list(words.values()))] == [[token] for token in words]
    tokens = list(words)[::4000]
    text = text_of(tokens)
    assert token_ids([text])[0][1:-1] == tokens
    assert len(text.split()) == len(tokens)
