"""The OpenCLIP text encoder of SD v2, with the parameter names that its CompVis checkpoints have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mu.ldm.params import OpenClipParams
from mu.ldm.text_encoder import VOCAB_SIZE, clip_tokenizer, tokenize

PAD_TOKEN = 0
"""What OpenCLIP fills prompts up with; CLIP repeats its end token instead."""


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees only itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3 D)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D / heads)
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))  # (B, L, D)


class Mlp(nn.Module):
    """Position-wise network with an exact GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))  # (B, L, D)


class ResidualBlock(nn.Module):
    """Attention and position-wise network, each on normalised input, each residual."""

    def __init__(self, params: OpenClipParams) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(params.hidden_size)
        self.attn = CausalSelfAttention(params.hidden_size, params.num_attention_heads)
        self.ln_2 = nn.LayerNorm(params.hidden_size)
        self.mlp = Mlp(params.hidden_size, params.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # (B, L, D)
        return x + self.mlp(self.ln_2(x))  # (B, L, D)


class OpenClipNetwork(nn.Module):
    """Tokens (B, L) to the output of the last layer that is run, after the final layer norm: (B, L, D)."""

    def __init__(self, params: OpenClipParams) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB_SIZE, params.hidden_size)
        self.positional_embedding = nn.Parameter(torch.empty(params.max_length, params.hidden_size))
        blocks = nn.ModuleList(ResidualBlock(params) for _ in range(params.layers_run))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(params.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding  # (B, L, D)
        blocks = self.transformer["resblocks"]
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x = block(x)  # (B, L, D)
        return self.ln_final(x)


class OpenClipTextEncoder(nn.Module):
    """Prompts to embeddings (B, 77, D): as a rule the penultimate layer's output after the final layer norm.

    Layers that are not run are not built. Checkpoints have them, and `text_projection` and `logit_scale`: the model
    keeps those beside it (`LatentDiffusion.carried`), so that a written checkpoint has them again.
    """

    def __init__(self, params: OpenClipParams) -> None:
        super().__init__()
        clip_tokenizer()  # see TextEncoder
        self.params = params
        self.model = OpenClipNetwork(params)

    def forward(self, prompts: list[str]) -> Tensor:
        tokens = tokenize(prompts, self.params.max_length, pad_token=PAD_TOKEN)  # (B, 77)
        return self.model(tokens.to(self.model.positional_embedding.device))  # (B, 77, D)


def is_carried(key: str, params: OpenClipParams) -> bool:
    """Whether a key of a checkpoint belongs to OpenCLIP's text encoder but not to the part that is run."""
    name = key.removeprefix("cond_stage_model.model.")
    if name == key:
        return False
    unused = range(params.layers_run, params.num_hidden_layers)
    return name in ("text_projection", "logit_scale", "attn_mask") or name.startswith(
        tuple(f"transformer.resblocks.{layer}." for layer in unused)
    )
