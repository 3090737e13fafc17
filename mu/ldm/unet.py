"""The denoising UNet of latent diffusion models (Rombach et al. 2022), with CompVis' parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mu.ldm.layers import Downsample, ResBlock, SpatialTransformer, Upsample, timestep_embedding, zero_init
from mu.ldm.params import NORM_GROUPS, UNetParams


class Stage(nn.Sequential):
    """Layers in sequence, each given what it takes: the time embedding, the context, or the features alone."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """UNet with residual blocks at every level and spatial transformers at the chosen ones.

    Blocks are numbered as in CompVis checkpoints: `input_blocks.0` is the first convolution, then per level
    `num_res_blocks` stages and a downsampling; `output_blocks` mirrors it, upsampling inside a level's last stage.

    Attributes:
        gradient_checkpointing: keep only the features between blocks for the backward pass, which computes those inside
            them again (Chen et al. 2016): less memory, a third more time.
    """

    def __init__(self, params: UNetParams) -> None:
        super().__init__()
        self.params = params
        self.gradient_checkpointing = False
        width = params.model_channels
        emb_dim = 4 * width
        last_level = len(params.channel_mult) - 1

        def stage(channels: int, out_channels: int, level: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(channels, emb_dim, out_channels, dropout=params.dropout)]
            if params.attends[level]:
                layers.append(transformer(out_channels))
            return layers

        def transformer(channels: int) -> SpatialTransformer:
            heads, dim_head = params.heads_of(channels)
            return SpatialTransformer(
                channels,
                heads=heads,
                dim_head=dim_head,
                depth=params.transformer_depth,
                context_dim=params.context_dim,
                use_linear=params.use_linear_in_transformer,
                dropout=params.dropout,
            )

        self.time_embed = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        channels = width
        skips = [channels]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(params.in_channels, channels, 3, padding=1))])
        for level, mult in enumerate(params.channel_mult):
            for _ in range(params.num_res_blocks):
                self.input_blocks.append(Stage(*stage(channels, mult * width, level)))
                channels = mult * width
                skips.append(channels)
            if level != last_level:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Stage(
            ResBlock(channels, emb_dim, channels, dropout=params.dropout),
            transformer(channels),
            ResBlock(channels, emb_dim, channels, dropout=params.dropout),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(params.channel_mult))):
            for i in range(params.num_res_blocks + 1):
                layers = stage(channels + skips.pop(), mult * width, level)
                channels = mult * width
                if level and i == params.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, params.out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict what the network was trained to predict (noise or velocity).

        Args:
            x: (B, C, H, W) noisy latents; H and W divisible by 2 ** (levels - 1).
            timesteps: (B,) integers.
            context: (B, L, D) prompt embedding of any length L.

        Returns:
            (B, C_out, H, W).
        """
        features = timestep_embedding(timesteps, self.params.model_channels)  # (B, width)
        emb = self.time_embed(features.to(x.dtype))  # (B, 4 width)
        h = x
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h = self._run(block, h, emb, context)  # (B, C_i, H_i, W_i)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, context)  # (B, C_last, H_last, W_last)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb, context)  # (B, C_i, H_i, W_i)
        return self.out(h)  # (B, C_out, H, W)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(h, emb, context)
        # Only dropout would draw random numbers again.
        return checkpoint(block, h, emb, context, use_reentrant=False, preserve_rng_state=self.training)
