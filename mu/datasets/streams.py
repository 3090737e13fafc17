"""Random numbers as pure functions of (seed, stage, epoch, key).

No stream is ever continued by the next image or batch: whatever the batch size, the number of workers or the step
at which a run is taken up again, an image meets the same timestep, noise and posterior sample in the same epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """What diffusion needs at random for one image: timestep, eps (C, h, w) and the posterior's (C, h, w) normal."""

    timestep: int
    noise: Tensor
    posterior_noise: Tensor


def generator(seed: int, stage: str, epoch: int, key: str) -> torch.Generator:
    """A CPU generator seeded by the first 8 bytes of the sha256 of the four (as a JSON list: no two run together)."""
    digest = hashlib.sha256(json.dumps([seed, stage, epoch, key]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def draw(seed: int, stage: str, epoch: int, key: str, *, shape: tuple[int, ...], num_timesteps: int) -> Draw:
    """The draw of one image in one epoch: timestep uniform in 0..num_timesteps-1, two unit normals of `shape`."""
    stream = generator(seed, stage, epoch, key)
    timestep = int(torch.randint(num_timesteps, (1,), generator=stream))
    return Draw(timestep, torch.randn(shape, generator=stream), torch.randn(shape, generator=stream))


def initial_noise(style: str, object: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """The noise (C, h, w) from which the image (style, object, seed) is sampled; the seed belongs to the image."""
    return torch.randn(shape, generator=generator(seed, "initial-noise", 0, json.dumps([style, object])))


@lru_cache(maxsize=64)
def order(seed: int, stage: str, epoch: int, count: int) -> tuple[int, ...]:
    """The shuffled order of `count` rows in one pass."""
    shuffled = torch.randperm(count, generator=generator(seed, f"{stage}-order", epoch, ""))
    return tuple(int(place) for place in shuffled)


def passes(seed: int, stage: str, count: int, *, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(number of the pass, place of the row) at positions start..stop-1 of an endless series of shuffled passes."""
    for position in range(start, stop):
        number, place = divmod(position, count)
        yield number, order(seed, stage, number, count)[place]
