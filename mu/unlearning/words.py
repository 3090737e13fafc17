"""Words that anybody can type and that CLIP's tokenizer reads as one token each: a text of them is its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from mu.ldm.text_encoder import clip_vocabulary, token_ids

_WORD = re.compile(r"([a-z]{2,})</w>")


@lru_cache(maxsize=1)
def typed_words() -> dict[int, str]:
    """Token -> its word, of two or more small letters; for each of them the tokenizer gives just this token."""
    vocabulary, _ = clip_vocabulary()
    return {token: found[1] for word, token in vocabulary.items() if (found := _WORD.fullmatch(word))}


def text_of(tokens: Sequence[int]) -> str:
    """The text of such tokens. Raises ValueError where the tokenizer would read it as others."""
    words = typed_words()
    text = " ".join(words[int(token)] for token in tokens)
    if token_ids([text])[0][1:-1] != [int(token) for token in tokens]:
        raise ValueError(f"{text!r} is not read as the tokens {list(tokens)}")
    return text


def nearest_tokens(vectors: Tensor, embeddings: Tensor, tokens: Tensor) -> Tensor:
    """Of each vector the token whose embedding has the greatest cosine with it.

    Args:
        vectors: (n, D).
        embeddings: (V, D), of `tokens` (V,).

    Returns:
        (n,)
    """
    cosines = F.normalize(vectors, dim=-1) @ F.normalize(embeddings, dim=-1).T  # (n, V)
    return tokens[cosines.argmax(dim=-1)]
