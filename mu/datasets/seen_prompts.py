"""What a model's text encoder sees of a prompt: CLIP's tokens, of which it reads 77 and no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mu.datasets.index import ForgetRetain, raise_problems
from mu.ldm.params import END_TOKEN, LatentDiffusionParams

Tokens = tuple[int, ...]
_SHOWN = 60


def check_seen_apart(rows: ForgetRetain, params: LatentDiffusionParams) -> None:
    """Checks that the text encoder can tell forgotten prompts from retained ones and from the substitutes.

    Two prompts that differ only after the last token that it reads are one and the same to the model, which would be
    taught two things for it.

    Raises:
        DataError: prompts that it cannot tell apart; all of them, of each its first place.
    """
    if params.cond_stage is None:
        return
    substitutes = [row.substitute_prompt for row in rows.forget if row.substitute_prompt is not None]
    retained = [row.prompt for row in rows.retain]
    forgotten = dict.fromkeys(row.prompt for row in rows.forget)
    seen = _seen(params, [*forgotten, *retained, *substitutes])
    by_tokens = {seen[prompt]: prompt for prompt in reversed(forgotten)}
    problems = [
        f"{_short(prompt)} ({kind}) is to the text encoder the same as {_short(by_tokens[seen[prompt]])} (to forget)"
        for kind, prompts in (("to retain", retained), ("substitute", substitutes))
        for prompt in dict.fromkeys(prompts)
        if seen[prompt] in by_tokens
    ]
    raise_problems(
        problems,
        what="prompts cannot be told apart",
        advice=f"It reads the first {params.cond_stage.max_length} tokens, with start and end; let the prompts differ "
        "in these.",
    )


def cut_notes(params: LatentDiffusionParams, prompts: Iterable[str]) -> list[str]:
    """One sentence on the prompts that are longer than what the text encoder reads; none when all are short enough."""
    if params.cond_stage is None:
        return []
    return cut_at(params.cond_stage.max_length, prompts)


def cut_at(max_length: int, prompts: Iterable[str]) -> list[str]:
    """`cut_notes` of CLIP's tokens, with start and end."""
    from mu.ldm.text_encoder import clip_tokenizer, token_ids

    wanted = list(dict.fromkeys(prompts))
    tokens = token_ids(wanted)
    cut = [place for place, found in enumerate(tokens) if len(found) > max_length]
    if not cut:
        return []
    first = cut[0]
    read = clip_tokenizer().decode(tokens[first][1 : max_length - 1])
    return [
        f"{len(cut)} of {len(wanted)} prompts are longer than the {max_length} tokens that a text encoder reads, "
        f"and are cut; the first is {_short(wanted[first])} with {len(tokens[first])} tokens, read as far as "
        f"'... {str(read)[-_SHOWN:].strip()}'"
    ]


def _seen(params: LatentDiffusionParams, prompts: Sequence[str]) -> dict[str, Tokens]:
    """Prompt -> the tokens that are read of it."""
    from mu.ldm.text_encoder import token_ids  # late: it imports transformers

    assert params.cond_stage is not None
    length = params.cond_stage.max_length
    wanted = list(dict.fromkeys(prompts))
    return {
        prompt: tuple(tokens if len(tokens) <= length else [*tokens[: length - 1], END_TOKEN])
        for prompt, tokens in zip(wanted, token_ids(wanted), strict=True)
    }


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}...")
