"""The autoencoder between images and latents (AutoencoderKL of Rombach et al. 2022), with CompVis' parameter names."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mu.ldm.layers import Upsample
from mu.ldm.params import NORM_GROUPS, AutoencoderParams

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Residual block without time embedding."""

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, C_out, H, W)
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        h = self.norm(x)  # (B, C, H, W)
        q, k, v = (rearrange(p(h), "b c h w -> b 1 (h w) c") for p in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=height, w=width))


class PaddedDownsample(nn.Module):
    """Halve height and width; the one row and column of padding go to the bottom and the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Level(nn.Module):
    """The blocks at one resolution: `block`, `attn` (perhaps empty) and a resampling, named as CompVis names them."""

    def __init__(
        self, widths: list[int], *, attention: bool, dropout: float, resample: tuple[str, nn.Module] | None
    ):
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout=dropout) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs if attention)
        self.resample_name = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self.resample_name)(x) if self.resample_name else x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout=dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to the 2 * z_channels features from which the posterior moments are made."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        last = len(params.ch_mult) - 1
        width = params.ch
        self.conv_in = nn.Conv2d(params.in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(params.ch_mult):
            widths = [width] + [mult * params.ch] * params.num_res_blocks
            width = widths[-1]
            self.down.append(
                Level(
                    widths,
                    attention=params.attends[level],
                    dropout=params.dropout,
                    resample=("downsample", PaddedDownsample(width)) if level != last else None,
                )
            )
        self.mid = Middle(width, dropout=params.dropout)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 2 * params.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level(h)  # (B, C_i, H / 2^i, W / 2^i)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))  # (B, 2 z, H/f, W/f)


class Decoder(nn.Module):
    """Latents to images. `up.0` is the highest resolution, as in CompVis checkpoints."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        last = len(params.ch_mult) - 1
        width = params.ch_mult[-1] * params.ch
        self.conv_in = nn.Conv2d(params.z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout=params.dropout)
        levels: list[Level] = []
        for level in range(last, -1, -1):
            widths = [width] + [params.ch_mult[level] * params.ch] * (params.num_res_blocks + 1)
            width = widths[-1]
            levels.append(
                Level(
                    widths,
                    attention=params.attends[level],
                    dropout=params.dropout,
                    resample=("upsample", Upsample(width)) if level else None,
                )
            )
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, params.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, C_last, h, w)
        for level in reversed(self.up):
            h = level(h)  # (B, C_i, H_i, W_i)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, H, W)


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latent space."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        self.quant_conv = nn.Conv2d(2 * params.z_channels, 2 * params.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(params.embed_dim, params.z_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior moments of images (B, 3, H, W) in [-1, 1]: mean and log-variance, each (B, C, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], from unscaled latents (B, C, H/f, W/f)."""
        return self.decoder(self.post_quant_conv(z))
