"""Attention layers of the UNet: self- and cross-attention over the positions of a feature map."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mu.ldm.layers import NORM_GROUPS, zero_init


class CrossAttention(nn.Module):
    """Multi-head attention of `x` on `context`; on itself when there is no context."""

    def __init__(
        self, query_dim: int, *, context_dim: int | None, heads: int, dim_head: int, dropout: float
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context  # (B, L, D_context)
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k = rearrange(self.to_k(context), "b l (h d) -> b h l d", h=self.heads)
        v = rearrange(self.to_v(context), "b l (h d) -> b h l d", h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, dim_head)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))  # (B, N, D)


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # two of (B, N, D_inner)
        return value * F.gelu(gate)  # (B, N, D_inner)


class FeedForward(nn.Module):
    """Position-wise network, four times as wide inside."""

    def __init__(self, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, N, D)


class TransformerBlock(nn.Module):
    """Self-attention, attention on the prompt, feed-forward; each on normalised input, each residual."""

    def __init__(
        self, dim: int, *, context_dim: int | None, heads: int, dim_head: int, dropout: float
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, context_dim=None, heads=heads, dim_head=dim_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(
            dim, context_dim=context_dim, heads=heads, dim_head=dim_head, dropout=dropout
        )
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # (B, N, D)
        x = x + self.attn2(self.norm2(x), context)  # (B, N, D)
        return x + self.ff(self.norm3(x))  # (B, N, D)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the H*W positions of a feature map, residual.

    `use_linear` projects in and out by linear layers on the positions (SD v2) instead of 1x1 convolutions (SD v1).
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        dim_head: int,
        depth: int,
        context_dim: int | None,
        use_linear: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if use_linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, context_dim=context_dim, heads=heads, dim_head=dim_head, dropout=dropout)
            for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(inner, channels) if use_linear else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        h = self.norm(x)  # (B, C, H, W)
        if self.use_linear:
            h = self.proj_in(rearrange(h, "b c h w -> b (h w) c"))  # (B, HW, D)
        else:
            h = rearrange(self.proj_in(h), "b c h w -> b (h w) c")  # (B, HW, D)
        for block in self.transformer_blocks:
            h = block(h, context)  # (B, HW, D)
        if self.use_linear:
            h = rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=height, w=width)  # (B, C, H, W)
        else:
            h = self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height, w=width))  # (B, C, H, W)
        return x + h
