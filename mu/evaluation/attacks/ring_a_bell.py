"""Ring-A-Bell: texts that the text encoder reads as the concept, found without the model that draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mu.bars import bar
from mu.datasets.canvas import canvas_prompt, style_words
from mu.datasets.index import Row
from mu.datasets.streams import generator
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.attacks.target import Drawing, Target, around_name
from mu.unlearning.embedding import embedded
from mu.unlearning.inversion import plain_tokens, prompt_tokens, text_encoder
from mu.unlearning.words import text_of, typed_words

_AT_ONCE = 256


class RingABell:
    """For each of the concept's prompts a text of other words, whose encoding is near prompt plus concept.

    Tsai et al. 2024, arXiv 2310.10012. The concept's direction is the mean difference of the encodings of prompts with
    and without it (equation 2); a genetic search finds tokens whose encoding comes near that of the prompt without it,
    plus `ring_strength` times the direction (equations 3 and 4). The concept's own words are not among the tokens. The
    model that draws is not looked at, and so no image of the concept is needed.
    """

    def __init__(self, config: AttackConfig) -> None:
        self.config = config

    def drawings(self, target: Target) -> Iterator[Drawing]:
        config, encoder = self.config, text_encoder(target.model)
        prompts = list(dict.fromkeys(row.prompt for row in target.rows))
        label = target.label("ring_", prompts=prompts)
        kept = target.kept(label)

        # 1. The concept's direction: pairs of prompts that differ in the concept alone.
        pairs = {row.prompt: without_concept(row, config.template) for row in target.rows}
        with_it, without = (embedded(target.model, list(part)) for part in (pairs, pairs.values()))
        direction = concept_direction(with_it, without)  # (L, D)

        # 2. A search for each prompt; what was found already is kept.
        own = set(plain_tokens(style_words(config.template_name)))
        words = torch.tensor([token for token in typed_words() if token not in own])  # (V,)
        texts: dict[str, str] = {}
        distances: dict[str, list[float]] = {}
        seconds = 0.0
        if (found := kept.read()) is not None:
            texts, distances, seconds = (found[1][key] for key in ("texts", "distances", "seconds"))

        @torch.no_grad()
        def encode(tokens: Tensor) -> Tensor:
            """(P, K) tokens to (P, L, D)."""
            whole = torch.stack([prompt_tokens(encoder, (row,)) for row in tokens.tolist()])
            return torch.cat([encoder.encode(some).float() for some in whole.split(_AT_ONCE)])

        def distance_to(wished: Tensor, tokens: Tensor) -> Tensor:
            """(P,) of (P, K) tokens."""
            return (encode(tokens) - wished).square().mean(dim=(1, 2))

        for number, prompt in enumerate(prompts):
            if prompt in texts:
                continue
            started = time.monotonic()
            wished = without[number] + config.ring_strength * direction  # (L, D)
            chosen, curve = genetic_search(
                partial(distance_to, wished),
                words,
                length=config.ring_tokens,
                population=config.ring_population,
                generations=config.ring_generations,
                mutation=config.ring_mutation,
                crossover=config.ring_crossover,
                random=generator(config.attack_seed, "ring-a-bell", 0, prompt),
                what=f"searching a text, {number + 1} of {len(prompts)}",
            )
            texts[prompt], distances[prompt] = text_of(chosen.tolist()), [curve[0], curve[-1]]
            seconds += time.monotonic() - started
            kept.write(
                {"direction": direction},
                {"texts": texts, "distances": distances, "seconds": seconds},
            )
        kept.write_text("\n".join(f"{prompt}\t{text}" for prompt, text in texts.items()))

        # 3. Draw the texts.
        yield Drawing(
            label=label,
            model=target.model,
            prompt=lambda row: texts[row.prompt],
            learnt={"kept": str(kept.path), "texts": texts, "distances": distances, "seconds": seconds},
        )


def without_concept(row: Row, template: str) -> str:
    """The prompt without its style, or without its object."""
    if template == "style":
        before, _ = around_name(row, template)
        return f"{before.removesuffix(' in')}."
    return canvas_prompt("", row.style).replace("A  image", "An image")


def concept_direction(with_it: Tensor, without: Tensor) -> Tensor:
    """The mean difference (L, D) of encodings (N, L, D) of prompts with and without a concept."""
    return (with_it - without).mean(dim=0)


def genetic_search(
    cost: Callable[[Tensor], Tensor],
    words: Tensor,
    *,
    length: int,
    population: int,
    generations: int,
    mutation: float,
    crossover: float,
    random: torch.Generator,
    what: str = "searching",
) -> tuple[Tensor, list[float]]:
    """Tokens whose cost is small. The better half of a generation lives on, and has children that fill it up.

    Args:
        cost: tokens (P, K) to costs (P,).
        words: (V,) tokens that may occur.
        mutation: probability that one token of a child is drawn anew.
        crossover: probability that a child has one parent's beginning and another's end; else it is the first's copy.

    Returns:
        (K,) tokens, and the least cost of each generation, which never rises.
    """

    def drawn(*shape: int) -> Tensor:
        return words[torch.randint(len(words), shape, generator=random)]

    def chance(count: int, probability: float) -> Tensor:
        return torch.rand(count, generator=random) < probability

    alive = drawn(population, length)  # (P, K)
    costs = cost(alive).cpu()
    curve: list[float] = []
    with bar(what, total=generations, unit="generations") as shown:
        for _ in range(generations):
            # 1. The better half.
            order = costs.argsort()[: population // 2]
            parents, costs = alive[order], costs[order]
            curve.append(float(costs[0]))

            # 2. Children.
            count = population - len(parents)
            first, second = (parents[torch.randint(len(parents), (count,), generator=random)] for _ in "ab")
            cut = (
                torch.randint(1, length, (count, 1), generator=random) if length > 1 else torch.ones(count, 1)
            )
            is_end = (torch.arange(length) >= cut) & chance(count, crossover)[:, None]  # (C, K)
            children = torch.where(is_end, second, first)
            at = torch.randint(length, (count, 1), generator=random)
            is_new = (torch.arange(length) == at) & chance(count, mutation)[:, None]
            children = torch.where(is_new, drawn(count, length), children)

            alive, costs = torch.cat([parents, children]), torch.cat([costs, cost(children).cpu()])
            shown.update()
    best = int(costs.argmin())
    curve.append(float(costs[best]))
    return alive[best], curve
