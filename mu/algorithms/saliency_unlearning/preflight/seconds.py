"""How long a run takes: what is to be computed and moved, against what this device was just found to do."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mu.ldm.params import UNetParams
from mu.ldm.unet import UNet

_BUDGET_S = 0.4
"""Of a measurement, after one call that does not count."""
_LARGEST = 2e10
"""FLOPs of the piece that is computed to measure a CPU: a larger one would take seconds."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run computes and moves."""

    unet: UNetParams
    images: int
    """That go through the UNet at once."""
    latent_shape: tuple[int, ...]
    precision: str
    device: str
    flops: Mapping[str, float]
    """Phase -> FLOPs."""
    file_bytes: float
    """That are read, hashed or written, each time that they are."""

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds, from two short measurements on this device as it is now."""
        rate = compute_rate(
            self.unet, self.images, self.latent_shape, precision=self.precision, device=self.device
        )
        found = {name: count / rate for name, count in self.flops.items() if count}
        return {**found, "files": self.file_bytes / hash_rate()}


def compute_rate(
    params: UNetParams, images: int, latent_shape: tuple[int, ...], *, precision: str, device: str
) -> float:
    """FLOP/s of this UNet's own blocks, forward and backward: the first with a residual block, and the middle one.

    The counted operations are matrix products, convolutions and attention; the time is that of all the block does.
    """
    kind = torch.device(device)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        unet = UNet(params)
    first, middle = unet.input_blocks[1], unet.middle_block
    deepest = 2 ** (len(params.channel_mult) - 1)
    width, deep = params.model_channels, params.channel_mult[-1] * params.model_channels
    side = latent_shape[1]
    runs = []
    for block, channels, edge in ((first, width, side), (middle, deep, max(1, side // deepest))):
        block.to_empty(device=kind)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.fill_(0.01)
        runs.append((block, channels, edge))

    def run(count: int) -> None:
        for block, channels, edge in runs:
            features = torch.ones(count, channels, edge, edge, device=kind, requires_grad=True)
            embedding = torch.ones(count, 4 * width, device=kind)
            context = (
                None if params.context_dim is None else torch.ones(count, 77, params.context_dim, device=kind)
            )
            with torch.autocast(kind.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                result = block(features, embedding, context)
            result.float().sum().backward()

    with FlopCounterMode(display=False) as counter:
        run(1)
    flops = counter.get_total_flops()
    count = max(1, images if kind.type == "cuda" else min(images, int(_LARGEST / flops)))
    return count * flops / _fastest(lambda: run(count), kind)


def hash_rate() -> float:
    """Bytes/s of SHA-256, in which most of the reading and checking of files goes."""
    content = bytes(16_000_000)
    return len(content) / _fastest(lambda: hashlib.sha256(content).digest(), torch.device("cpu"))


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    _timed(call, device)
    spent, best = 0.0, float("inf")
    while spent < _BUDGET_S:
        seconds = _timed(call, device)
        spent, best = spent + seconds, min(best, seconds)
    return best


def _timed(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
