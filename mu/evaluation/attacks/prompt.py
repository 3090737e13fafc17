"""Adversarial prompts: a few words before the concept's prompt that bring it back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mu.bars import bar
from mu.datasets.index import Row
from mu.datasets.streams import generator
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.attacks.target import Drawing, Target
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.tensor_file import fingerprint
from mu.unlearning.embedding import embedded
from mu.unlearning.inversion import (
    AdamState,
    ContextLoss,
    Noised,
    embeddings_of,
    new_words,
    plain_tokens,
    prompt_tokens,
    text_encoder,
    vector_gradient,
)
from mu.unlearning.words import nearest_tokens, text_of, typed_words

_CHECKS = 8
"""So often is a text looked at with all target images while it is searched for."""


class Prompt:
    """Words before the concept's prompts, found by the gradient in the space of token embeddings.

    UnlearnDiffAtk (Zhang et al. 2024, arXiv 2310.11868, equation 4): the diffusion loss of target images. P4D (Chin et
    al. 2024, arXiv 2309.06135, equation 3): the distance to what the original predicts; `prompt_target` chooses.
    The gradient is taken at the nearest words and moves the vectors that they are nearest to, as in P4D. Words are of
    letters and one token each, so the text that is found is typed as it stands; one text serves all the concept's
    prompts.
    """

    def __init__(self, config: AttackConfig) -> None:
        self.config = config

    def drawings(self, target: Target) -> Iterator[Drawing]:
        config, encoder = self.config, text_encoder(target.model)
        base = target.base() if config.prompt_target == "original" and target.base is not None else None
        label = target.label("prompt_", base=None if base is None else fingerprint(base.state_dict()))
        kept = target.kept(label)
        words = torch.tensor(list(typed_words()), device=target.model.device)  # (V,)
        space = embeddings_of(encoder, words.tolist())  # (V, D)
        loss_of = ContextLoss(target.model, half=target.half)
        prompts = {row.prompt: plain_tokens(row.prompt) for row in target.learnt_from.rows}

        def tokens_of(rows: Sequence[Row], before: Sequence[int]) -> Tensor:
            """(B, L)"""
            return torch.stack([prompt_tokens(encoder, (before, prompts[row.prompt])) for row in rows])

        def wanted(rows: Sequence[Row], images: Noised) -> Tensor | None:
            """What the prediction shall come near: the original's, or None for the noise."""
            return None if base is None else _predicted(base, rows, images)

        every_row, every_image = _all_images(target)
        wanted_of_all = wanted(every_row, every_image)

        @torch.no_grad()
        def check(tokens: list[int]) -> float:
            """The loss of a text with all target images."""
            return loss_of.value(every_image, encoder.encode(tokens_of(every_row, tokens)), wanted_of_all)

        # 1. What was found already: loss and tokens of each beginning.
        found: list[tuple[float, list[int]]] = []
        seconds = 0.0
        if (before := kept.read()) is not None:
            found = [(loss, tokens) for loss, tokens in before[1]["found"]]
            seconds = before[1]["seconds"]

        # 2. From each beginning, some random words: project, take the gradient there, step.
        for number in range(len(found), config.prompt_candidates):
            started = time.monotonic()
            drawn = generator(config.attack_seed, "prompt", number, "")
            first = torch.randint(len(words), (config.prompt_tokens,), generator=drawn)
            state = AdamState(
                space[first.to(space.device)], lr=config.prompt_lr, weight_decay=config.prompt_weight_decay
            )
            tried: dict[tuple[int, ...], float] = {}
            check_every = max(1, config.prompt_steps // _CHECKS)
            what = f"searching words, {number + 1} of {config.prompt_candidates}"
            with bar(what, total=config.prompt_steps, unit="steps") as shown:
                for step in range(config.prompt_steps):
                    tokens = nearest_tokens(state.vectors.detach(), space, words).tolist()
                    position = number * config.prompt_steps + step
                    rows, images = target.batch(position, config.prompt_batch_size)
                    loss_of_batch = partial(loss_of, images, target=wanted(rows, images))
                    _, gradient = vector_gradient(
                        encoder,
                        tokens_of(rows, new_words(len(tokens))),
                        embeddings_of(encoder, tokens),
                        loss_of_batch,
                    )
                    state.step(gradient)
                    shown.update()
                    if (step + 1) % check_every == 0:
                        tokens = nearest_tokens(state.vectors.detach(), space, words).tolist()
                        tried[tuple(tokens)] = check(tokens)
            best = min(tried, key=lambda tokens: tried[tokens])
            found.append((tried[best], list(best)))
            seconds += time.monotonic() - started
            kept.write(
                {"tokens": torch.tensor([tokens for _, tokens in found])},
                {"found": found, "seconds": seconds},
            )

        # 3. The text, and images of it.
        loss, chosen = min(found)
        text = text_of(chosen)
        kept.write_text(text)
        yield Drawing(
            label=label,
            model=target.model,
            prompt=lambda row: f"{text} {row.prompt}",
            learnt={
                "kept": str(kept.path),
                "text": text,
                "loss": loss,
                "loss_of_plain_prompts": check([]),
                "seconds": seconds,
            },
        )


def _all_images(target: Target) -> tuple[list[Row], Noised]:
    """Every target image once, with draws of its own."""
    images = target.learnt_from
    wanted = [(0, place) for place in range(len(images.rows))]
    drawn = images.batch(
        wanted,
        seed=target.config.attack_seed,
        stage="attack-check",
        num_timesteps=target.model.num_timesteps,
    )
    return list(images.rows), Noised(*drawn)


@torch.no_grad()
def _predicted(model: LatentDiffusion, rows: Sequence[Row], images: Noised) -> Tensor:
    """What a model predicts for the plain prompts, (B, C, h, w)."""
    device = model.device
    latents, times, noise = (x.to(device) for x in (images.latents, images.timesteps, images.noise))
    context = embedded(model, [row.prompt for row in rows])  # (B, L, D)
    return model.predict(model.q_sample(latents, times, noise), times, context)
