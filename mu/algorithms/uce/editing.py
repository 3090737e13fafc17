"""The closed form of UCE (Gandikota et al. 2024, equation 7), and which token embeddings it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mu.ldm import LatentDiffusion
from mu.ldm.text_encoder import token_ids
from mu.ldm.unet import UNet
from mu.unlearning.embedding import embedded
from mu.unlearning.moving import names_of


def edited_names(unet: UNet) -> list[str]:
    """Names of the projections of prompts to keys and values, relative to the UNet.

    Raises:
        TrainMethodError: the UNet has no cross-attention.
    """
    return [name for name in names_of(unet, "xattn") if name.endswith((".to_k.weight", ".to_v.weight"))]


def context_edit(
    erased: Tensor,
    substitutes: Tensor,
    preserved: Tensor,
    *,
    erase_scale: float,
    preserve_scale: float,
    lamb: float,
) -> Tensor:
    """The matrix M with W = W_o M, of which each projection W_o is multiplied: UCE's closed form.

    W minimises erase_scale sum_E |W c - W_o c*|^2 + preserve_scale sum_P |W c - W_o c|^2 + lamb |W - W_o|^2. So

        W = (erase_scale sum_E W_o c* c^T + W_o R) G^-1,
        R = preserve_scale sum_P c c^T + lamb I,    G = erase_scale sum_E c c^T + R,

    and since all of it is W_o times something, M = I + erase_scale sum_E (c* - c) c^T G^-1 is the same for all layers.
    Where no concept differs from its substitute, M is exactly I.

    Args:
        erased: (N, D) token embeddings c of the concept's prompts.
        substitutes: (N, D) those c* whose keys and values they get.
        preserved: (P, D) those whose keys and values are to stay.

    Returns:
        (D, D), fp64.
    """
    erased, substitutes, preserved = erased.double(), substitutes.double(), preserved.double()
    identity = torch.eye(erased.shape[1], dtype=torch.float64, device=erased.device)  # (D, D)
    gram = erase_scale * erased.T @ erased + preserve_scale * preserved.T @ preserved + lamb * identity
    moved = erase_scale * (substitutes - erased).T @ erased  # sum of (c* - c) c^T
    # moved gram^-1, of a symmetric gram.
    return identity + torch.linalg.solve(gram, moved.T).T


def paired_tokens(prompt: str, substitute: str, *, length: int) -> list[tuple[int, int]]:
    """Which token embedding of the substitute prompt takes the place of each one of a prompt: (place, its place).

    Tokens that both begin with and both end with are each other's, the end token among them. Of those between, which
    are the concept's, the first gets the substitute's first and so on; the last is repeated. So it is with the padding
    after the end token: in CLIP the end and the padding have seen the whole prompt, and carry it too.

    Args:
        length: of the context, 77; longer prompts are cut as the text encoder cuts them.

    Returns:
        `length` pairs.
    """
    cut = (
        [*ids[: length - 1], ids[-1]] if len(ids) > length else ids for ids in token_ids([prompt, substitute])
    )
    own, other = cut
    begin = _common(own, other)
    end = _common(own[begin:][::-1], other[begin:][::-1])
    last = max(begin, len(other) - end - 1)  # of the substitute's own tokens
    concept = [(place, min(place, last)) for place in range(begin, len(own) - end)]
    tail = [(len(own) - end + number, len(other) - end + number) for number in range(end)]
    padding = [(place, min(place - len(own) + len(other), length - 1)) for place in range(len(own), length)]
    return [*((place, place) for place in range(begin)), *concept, *tail, *padding]


@torch.no_grad()
def edit_(
    ldm: LatentDiffusion,
    pairs: Sequence[tuple[str, str]],
    preserved: Sequence[str],
    *,
    erase_scale: float,
    preserve_scale: float,
    lamb: float,
) -> float:
    """Edit all keys and values of a model in place.

    Args:
        pairs: (prompt, substitute prompt), see `paired_tokens` for which of their tokens are paired.
        preserved: prompts of which all token embeddings are to give the keys and values that they give now. The empty
            prompt, by which guidance is computed, is added once for each pair.

    Returns:
        |M - I|, how far the edit is from none.
    """
    # 1. Contexts: all L tokens of each prompt.
    contexts, others = (embedded(ldm, prompts) for prompts in zip(*pairs, strict=True))  # two of (N, L, D)
    length = contexts.shape[1]
    places = torch.tensor([paired_tokens(*pair, length=length) for pair in pairs], device=ldm.device)
    rows = torch.arange(len(pairs), device=ldm.device)[:, None]  # (N, 1)
    erased = contexts[rows, places[..., 0]].flatten(0, 1)  # (N L, D)
    substitutes = others[rows, places[..., 1]].flatten(0, 1)  # (N L, D)
    kept = embedded(ldm, [*preserved, *[""] * len(pairs)]).flatten(0, 1)  # (P L, D)

    # 2. One solve for all layers.
    edit = context_edit(
        erased, substitutes, kept, erase_scale=erase_scale, preserve_scale=preserve_scale, lamb=lamb
    )
    for name in edited_names(ldm.unet):
        weight = ldm.unet.get_parameter(name)  # (O, D)
        weight.copy_(weight.double() @ edit)
    return float((edit - torch.eye(len(edit), dtype=edit.dtype, device=edit.device)).norm())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
