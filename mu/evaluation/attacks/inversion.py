"""Concept Inversion: new words that mean the forgotten concept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mu.bars import bar
from mu.datasets.canvas import style_words
from mu.datasets.index import Row
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.attacks.target import Drawing, Target, around_name
from mu.unlearning.inversion import (
    AdamState,
    ContextLoss,
    embeddings_of,
    encode_words,
    new_words,
    plain_tokens,
    prompt_tokens,
    text_encoder,
    vector_gradient,
)

_KEEP_EVERY_STEPS = 50


class Inversion:
    """Vectors in the place of the concept's name, learnt so that the diffusion loss of its images falls.

    Textual inversion (Gal et al. 2022, arXiv 2208.01618, equation 2), which brings back what was erased (Concept
    Inversion: Pham et al. 2023, arXiv 2308.01508). It needs the weights; nobody can type the words that it finds.
    """

    def __init__(self, config: AttackConfig) -> None:
        self.config = config

    def drawings(self, target: Target) -> Iterator[Drawing]:
        config, encoder = self.config, text_encoder(target.model)
        label = target.label("inversion_")
        kept = target.kept(label)
        words = new_words(config.inversion_vectors)

        def tokens_of(rows: Sequence[Row]) -> Tensor:
            """(B, L)"""
            parts = [around_name(row, config.template) for row in rows]
            return torch.stack([prompt_tokens(encoder, (before, words, after)) for before, after in parts])

        # 1. Where the vectors begin, or where they were left.
        first = plain_tokens(config.inversion_word or style_words(config.template_name))
        begun = embeddings_of(encoder, [first[i % len(first)] for i in range(len(words))])  # (n, D)
        state = AdamState(begun, lr=config.inversion_lr)
        losses: list[float] = []
        seconds = 0.0
        if (found := kept.read()) is not None:
            state.take(found[0])
            losses, seconds = found[1]["losses"], found[1]["seconds"]

        # 2. Learn: the loss of a batch, its gradient through UNet and text encoder, a step of Adam.
        loss_of = ContextLoss(target.model, half=target.half)
        started = time.monotonic() - seconds
        with bar("learning words", total=config.inversion_steps, unit="steps") as shown:
            shown.update(state.steps)
            while state.steps < config.inversion_steps:
                rows, images = target.batch(state.steps, config.inversion_batch_size)
                loss, gradient = vector_gradient(
                    encoder, tokens_of(rows), state.vectors, partial(loss_of, images)
                )
                state.step(gradient)
                losses.append(loss)
                shown.update()
                if state.steps % _KEEP_EVERY_STEPS == 0 or state.steps == config.inversion_steps:
                    seconds = time.monotonic() - started
                    kept.write(state.tensors(), {"losses": losses, "seconds": seconds})

        # 3. Draw with them.
        vectors = state.vectors.detach()

        @torch.no_grad()
        def context(rows: Sequence[Row]) -> Tensor:
            return encode_words(encoder, tokens_of(rows), vectors)  # (B, L, D)

        few = max(1, len(losses) // 10)
        yield Drawing(
            label=label,
            model=target.model,
            context=context,
            learnt={
                "kept": str(kept.path),
                "seconds": seconds,
                "loss_first_tenth": sum(losses[:few]) / few,
                "loss_last_tenth": sum(losses[-few:]) / few,
            },
        )
