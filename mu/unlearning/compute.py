"""How the UNet computes while gradients are taken: precision, memory layout, and what memory holds meanwhile."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from mu import memory
from mu.arithmetic import products
from mu.ldm import LatentDiffusion
from mu.ldm.params import UNetParams
from mu.ldm.unet import UNet
from mu.memory import OutOfMemoryError, is_out_of_memory

__all__ = [
    "Compute",
    "ComputeKeys",
    "OutOfMemoryError",
    "choose",
    "choose_for",
    "computing",
    "encoders_at_hand",
    "free_bytes",
    "halved",
    "is_out_of_memory",
    "less_at_once",
]

_log = logging.getLogger(__name__)
_SHARE = 0.8
"""Share of the memory left that activations may take before they are computed again instead."""
_PRECISIONS = ("fp32", "tf32", "bf16-mixed")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_FLAGS = "gradient_checkpointing true, precision bf16-mixed, train_method xattn, a smaller image_size"


class ComputeKeys(Protocol):
    """The keys of a config that are read here; None and "auto" leave the choice to `choose`."""

    @property
    def AUTO_PRECISION(self) -> str:
        """What "auto" is on a GPU that has it: "bf16-mixed" or "tf32"."""
        ...

    @property
    def precision(self) -> str: ...
    @property
    def channels_last(self) -> bool | None: ...
    @property
    def gradient_checkpointing(self) -> bool | None: ...
    @property
    def compile(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the UNet computes. None of it changes a result by more than the rounding of its precision."""

    precision: str = "fp32"
    """fp32; tf32, products and convolutions with factors of 10 bits; bf16-mixed, fp32 weights computed with in bf16."""
    channels_last: bool = False
    """Whether features and kernels of convolutions lie in memory with the channels together."""
    gradient_checkpointing: bool = False
    """Whether the inside of each block is computed again for the backward pass instead of being kept."""
    recompute_if_short: bool = False
    """Whether it is from then on when memory has run out."""
    compile: bool = False
    """Whether torch.compile translates the UNet."""

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; known: {', '.join(_PRECISIONS)}")

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """bf16 arithmetic for forward passes inside, where the precision is bf16-mixed.

        Without autocast's cache of rounded weights: torch before 2.11 reuses there what a prediction without gradient
        has rounded, so that the weights get no gradient from a prediction with one.
        """
        enabled = self.precision == "bf16-mixed"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def choose(
    keys: ComputeKeys, ldm: LatentDiffusion, *, images: int, latent_shape: tuple[int, ...], reserved: int
) -> Compute:
    """What a config asks for, and for what it leaves open, the choice for this device and its free memory.

    precision: on a GPU that has it, bf16-mixed for training and tf32 for a mask; else fp32. channels_last: on a GPU.
    gradient_checkpointing: not before memory has run out (see `less_at_once`); on a CPU, where the system ends a
    process that takes too much, also where `activation_bytes` are more than 80 % of the memory that is left.

    Args:
        images: that go through the UNet at once with gradient, in one process.
        latent_shape: (C, h, w) of one of them.
        reserved: bytes that gradients and the optimizer's state are going to take.
    """
    compute = choose_for(keys, ldm.device)
    if compute.recompute_if_short and ldm.device.type == "cpu":
        needed = images * activation_bytes(ldm.params.unet, latent_shape)
        recompute = needed > _SHARE * (free_bytes(ldm.device) - reserved)
        compute = replace(compute, gradient_checkpointing=recompute)
    _log.info("%s", compute)
    return compute


def choose_for(keys: ComputeKeys, device: torch.device) -> Compute:
    """What a config asks for, and for what it leaves open, the choice for a device whatever its free memory."""
    cuda = device.type == "cuda"
    precision = keys.AUTO_PRECISION if keys.precision == "auto" else keys.precision
    if keys.precision == "auto" and precision == "bf16-mixed":
        precision = precision if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "tf32" and not has_tf32(device):
        if keys.precision == "tf32":
            _log.warning("precision tf32: %s does not have it, and computes in fp32", device)
        precision = "fp32"
    return Compute(
        precision=precision,
        channels_last=cuda if keys.channels_last is None else keys.channels_last,
        gradient_checkpointing=bool(keys.gradient_checkpointing),
        recompute_if_short=keys.gradient_checkpointing is None,
        compile=keys.compile,
    )


def activation_bytes(params: UNetParams, latent_shape: tuple[int, ...]) -> int:
    """About what one image leaves in memory in fp32 for the backward pass, if all weights move.

    Per feature map of c channels and p latent pixels, a residual block keeps about 17 c p numbers and a spatial
    transformer 24 c p: fitted to SD v1's UNet (1.87 GB at 64 x 64) and the bundled one. With many images at once,
    bf16-mixed keeps some 60 % of it.

    Args:
        latent_shape: (C, h, w).
    """
    _, height, width = latent_shape
    numbers = 0.0
    for level, mult in enumerate(params.channel_mult):
        entries = mult * params.model_channels * height * width / 4**level  # c p
        numbers += entries * (17 + 24 * (2**level in params.attention_resolutions))
    return int(4 * (2 * params.num_res_blocks + 1) * numbers)


def has_tf32(device: torch.device) -> bool:
    """Whether a device multiplies with factors of 10 bits: Nvidia's GPUs from Ampere on."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is left: of the GPU, or what the system, or the container, can give without swapping.

    Of a GPU, with what torch's allocator has taken and nobody uses: the next tensors are put there.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(most) - int(used.read_text(encoding="ascii")))
    return free


@contextmanager
def computing(ldm: LatentDiffusion, compute: Compute) -> Iterator[None]:
    """Let the UNet compute as asked, with autoencoder and text encoder out of the GPU's memory, until the block ends.

    The weights keep their type in every precision.
    """
    unet = ldm.unet
    # Beside bf16, what is left in fp32 may be rounded to TF32, which is the finer of the two.
    with _encoders_parked(ldm), products(tf32=compute.precision != "fp32"):
        try:
            unet.gradient_checkpointing = compute.gradient_checkpointing
            if compute.channels_last:
                unet.to(memory_format=torch.channels_last)
            if compute.compile:  # in the place of the method: wrapping the module would rename its weights
                unet.__dict__["forward"] = torch.compile(unet.forward)
            yield
        finally:
            unet.__dict__.pop("forward", None)
            unet.gradient_checkpointing = False
            if compute.channels_last:
                unet.to(memory_format=torch.contiguous_format)


@contextmanager
def _encoders_parked(ldm: LatentDiffusion) -> Iterator[None]:
    """Autoencoder and text encoder on the CPU; there they are where they belong already if the model is."""
    encoders = [part for part in (ldm.first_stage_model, ldm.cond_stage_model) if part is not None]
    if ldm.device.type != "cuda":
        yield
        return
    try:
        for encoder in encoders:
            encoder.cpu()
        torch.cuda.empty_cache()
        yield
    finally:
        for encoder in encoders:
            encoder.to(ldm.device)


@contextmanager
def encoders_at_hand(ldm: LatentDiffusion) -> Iterator[None]:
    """Autoencoder and text encoder on the UNet's device until the block ends, wherever they are parked.

    Inside, fp32 is fp32, as in the pictures before and after.
    """
    parts = [part for part in (ldm.first_stage_model, ldm.cond_stage_model) if part is not None]
    places = [next(part.parameters()).device for part in parts]
    try:
        for part in parts:
            part.to(ldm.device)
        with products(tf32=False):
            yield
    finally:
        for part, place in zip(parts, places, strict=True):
            part.to(place)


def less_at_once(unet: UNet, compute: Compute, images: int, *, reason: str) -> int:
    """How many images to send through the UNet at once, after so many with gradient were too many.

    First the inside of its blocks is computed again from now on, where that was left open; then the images are halved.

    Raises:
        OutOfMemoryError: one was too many; names the keys that save memory.
    """
    if not compute.recompute_if_short or unet.gradient_checkpointing:
        return halved(images, reason=reason)
    memory.let_go()
    unet.gradient_checkpointing = True
    _log.warning(
        "out of memory with %d images at a time; going on with the same, and computing activations again for the "
        "backward pass, which takes a third more time (gradient_checkpointing true begins so)",
        images,
    )
    return images


def halved(images: int, *, reason: str) -> int:
    """How many images to send through the UNet at once, after so many were too many.

    Raises:
        OutOfMemoryError: one was too many; names the keys that save memory.
    """
    return memory.halved(images, reason=reason, advice=_FLAGS, note=" at the same batch")
