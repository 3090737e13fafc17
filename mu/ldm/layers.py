"""Building blocks of the UNet: time embedding, residual block, resampling, and attention over a feature map.

Attribute names follow the parameter names of CompVis checkpoints, so that a state dict needs no translation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mu.ldm.params import NORM_GROUPS


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of a timestep, cosines first (Ho et al. 2020; Vaswani et al. 2017, section 3.5).

    Args:
        timesteps: (B,) integers or floats.
        dim: number of features; an odd one is padded with a zero.

    Returns:
        (B, dim) fp32.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]  # (B, dim/2)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))  # (B, dim)


def zero_init(module: nn.Module) -> nn.Module:
    """Start a residual branch as the identity: its last layer gives zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Residual block that adds the time embedding between its two convolutions."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)  # (B, C_out, H, W)
        h = h + self.emb_layers(emb)[:, :, None, None]  # (B, C_out, H, W)
        return self.skip_connection(x) + self.out_layers(h)  # (B, C_out, H, W)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width by nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


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
