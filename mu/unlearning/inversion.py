"""Words that are in no vocabulary: vectors in the place of a name, learnt so that the diffusion loss of images falls.

Textual inversion (Gal et al. 2022, arXiv 2208.01618, section 3): all weights stay as they are, and the gradient goes
through the UNet and the text encoder into the token embeddings of the new words alone.

A token below `VOCAB_SIZE` is one of CLIP's; `VOCAB_SIZE + i` is the new word i, whose embedding is row i of `vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mu.ldm.latent_diffusion import LatentDiffusion, NoTextEncoderError
from mu.ldm.params import END_TOKEN, START_TOKEN, VOCAB_SIZE
from mu.ldm.text_encoder import OpenClipTextEncoder, TextEncoder, token_ids
from mu.memory import ADVICE, AtOnce

Encoder = TextEncoder | OpenClipTextEncoder


def text_encoder(ldm: LatentDiffusion) -> Encoder:
    """The model's own. Raises NoTextEncoderError where it has none that takes tokens."""
    if not isinstance(ldm.cond_stage_model, TextEncoder | OpenClipTextEncoder):
        raise NoTextEncoderError("this model has no text encoder, so no words can be learnt for it")
    return ldm.cond_stage_model


def plain_tokens(text: str) -> list[int]:
    """CLIP's tokens of a text, without start and end."""
    return token_ids([text])[0][1:-1]


def prompt_tokens(encoder: Encoder, parts: Sequence[str | Sequence[int]]) -> Tensor:
    """Tokens (L,) of a prompt that is put together from texts and tokens, with start, end and padding.

    Raises ValueError for more tokens than the encoder takes.
    """
    length = encoder.params.max_length
    tokens = [START_TOKEN]
    for part in parts:
        tokens += plain_tokens(part) if isinstance(part, str) else part
    tokens.append(END_TOKEN)
    if len(tokens) > length:
        raise ValueError(f"the prompt has {len(tokens)} tokens, and the text encoder takes {length}")
    return torch.tensor([*tokens, *[encoder.pad_token] * (length - len(tokens))])


def new_words(count: int, first: int = 0) -> list[int]:
    """The tokens of `count` new words."""
    return list(range(VOCAB_SIZE + first, VOCAB_SIZE + first + count))


def embeddings_of(encoder: Encoder, tokens: Sequence[int]) -> Tensor:
    """The encoder's own token embeddings (n, D), fp32."""
    weight = encoder.token_embedding.weight.detach()
    return weight[torch.tensor(list(tokens), device=weight.device)].float()


def encode_words(encoder: Encoder, tokens: Tensor, vectors: Tensor) -> Tensor:
    """Contexts (B, L, D) of prompts in which some words are new; differentiable in `vectors`.

    Args:
        tokens: (B, L).
        vectors: (n, D), embeddings of the new words.
    """
    embedding = encoder.token_embedding
    tokens = tokens.to(embedding.weight.device)
    is_new = tokens >= VOCAB_SIZE  # (B, L)

    def put_in(module: nn.Module, args: object, output: Tensor) -> Tensor:  # noqa: ARG001
        found = output.clone()  # (B, L, D)
        found[is_new] = vectors[tokens[is_new] - VOCAB_SIZE].to(output)
        return found

    hook = embedding.register_forward_hook(put_in)
    try:
        return encoder.encode(tokens.masked_fill(is_new, END_TOKEN))
    finally:
        hook.remove()


@dataclass(frozen=True)
class Noised:
    """Images with what diffusion draws for them, as a training step has them."""

    latents: Tensor
    """(B, C, h, w), clean and scaled."""
    timesteps: Tensor
    """(B,)"""
    noise: Tensor
    """(B, C, h, w)"""


class ContextLoss:
    """The diffusion loss of images, and its gradient with respect to their contexts; weights get none.

    As many images go through the UNet at once as memory holds.

    Args:
        half: compute in bf16 by autocast.
    """

    def __init__(self, ldm: LatentDiffusion, *, half: bool = False) -> None:
        self.ldm = ldm
        self.half = half
        self._at_once = AtOnce("image", advice=ADVICE)

    def __call__(self, images: Noised, context: Tensor, target: Tensor | None = None) -> tuple[float, Tensor]:
        """Mean over images of the mean squared error of the prediction (Ho et al. 2020, equation 14).

        Args:
            context: (B, L, D).
            target: (B, C, h, w) to compare the prediction with; None: the model's own, eps or v.

        Returns:
            The loss, and its gradient (B, L, D) in fp32.
        """
        noisy, times, target = self._step(images, context.device, target)
        count = len(context)

        def work(places: Sequence[int]) -> tuple[float, Tensor]:
            part = slice(places[0], places[-1] + 1)
            asked = context[part].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.half):
                predicted = self.ldm.predict(noisy[part], times[part], asked)  # (b, C, h, w)
                loss = F.mse_loss(predicted.float(), target[part]) * len(places) / count
                (gradient,) = torch.autograd.grad(loss, asked)
            return float(loss.detach()), gradient.float()

        found = list(self._at_once.pieces(range(count), work))
        return sum(loss for loss, _ in found), torch.cat([gradient for _, gradient in found])

    @torch.no_grad()
    def value(self, images: Noised, context: Tensor, target: Tensor | None = None) -> float:
        """The loss alone."""
        noisy, times, target = self._step(images, context.device, target)

        def work(places: Sequence[int]) -> float:
            part = slice(places[0], places[-1] + 1)
            with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.half):
                predicted = self.ldm.predict(noisy[part], times[part], context[part])  # (b, C, h, w)
            return float(F.mse_loss(predicted.float(), target[part])) * len(places) / len(context)

        return sum(self._at_once.pieces(range(len(context)), work))

    def _step(
        self, images: Noised, device: torch.device, target: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents (B, C, h, w), timesteps (B,), and what the prediction is compared with (B, C, h, w)."""
        latents, times, noise = (x.to(device) for x in (images.latents, images.timesteps, images.noise))
        if target is None:
            target = self.ldm.prediction_target(latents, times, noise)
        return self.ldm.q_sample(latents, times, noise), times, target.to(device)


def vector_gradient(
    encoder: Encoder, tokens: Tensor, vectors: Tensor, of_contexts: Callable[[Tensor], tuple[float, Tensor]]
) -> tuple[float, Tensor]:
    """A loss of contexts, and its gradient (n, D) with respect to the vectors of new words.

    Each different prompt goes through the text encoder once.

    Args:
        tokens: (B, L), the prompt of each image.
        of_contexts: contexts (B, L, D) to the loss and its gradient (B, L, D), such as a `ContextLoss` of images.
    """
    prompts, place = torch.unique(tokens, dim=0, return_inverse=True)  # (P, L), (B,)
    place = place.to(vectors.device)
    leaf = vectors.detach().requires_grad_()
    with torch.enable_grad():
        contexts = encode_words(encoder, prompts, leaf)  # (P, L, D)
    loss, gradient = of_contexts(contexts.detach()[place])
    summed = torch.zeros_like(contexts).index_add_(0, place, gradient.to(contexts))  # (P, L, D)
    (found,) = torch.autograd.grad(contexts, leaf, summed)
    return loss, found


class AdamState:
    """Vectors that are being learnt, with what Adam (Kingma & Ba 2015, algorithm 1) keeps of its steps.

    Args:
        vectors: (n, D) at the beginning.
        weight_decay: decoupled, as AdamW's (Loshchilov & Hutter 2019).
    """

    def __init__(self, vectors: Tensor, *, lr: float, weight_decay: float = 0.0) -> None:
        self.vectors = nn.Parameter(vectors.detach().clone().float())
        self.optimizer = torch.optim.AdamW([self.vectors], lr=lr, weight_decay=weight_decay)
        self.steps = 0

    def step(self, gradient: Tensor) -> None:
        """One step along a gradient (n, D)."""
        self.vectors.grad = gradient.to(self.vectors)
        self.optimizer.step()
        self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, to be kept."""
        found = {"vectors": self.vectors.detach(), "steps": torch.tensor(self.steps)}
        state = self.optimizer.state[self.vectors]
        return found | {name: state[name].detach() for name in ("exp_avg", "exp_avg_sq") if name in state}

    def take(self, kept: dict[str, Tensor]) -> None:
        """Goes on where `tensors` were kept."""
        self.steps = int(kept["steps"])
        with torch.no_grad():
            self.vectors.copy_(kept["vectors"])
        if self.steps:
            moments = {name: kept[name].to(self.vectors).clone() for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[self.vectors] = {"step": torch.tensor(float(self.steps)), **moments}
