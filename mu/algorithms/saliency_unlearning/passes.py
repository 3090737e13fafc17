"""What a pass through a network takes, memory and arithmetic, counted without computing it.

The networks are built of torch's fake tensors, which have shapes, types and a device but no values: each operation is
chosen as on the real device and allocates as there, only nothing is in it. What the kernels take for themselves is not
seen.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mu.ldm.autoencoder import AutoencoderKL
from mu.ldm.params import AutoencoderParams, UNetParams
from mu.ldm.unet import UNet

P = ParamSpec("P")
_TOKENS = 77
"""Length of a prompt's embedding."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass takes beside the weights, the inputs and the gradients that are there before."""

    kept: int
    """Bytes that are left after the forward pass: the output, and what the backward pass needs."""
    peak: int
    """Most bytes at a time."""
    flops: int
    """Of matrix products, convolutions and attention."""


class _Once(Generic[P]):
    """Remembers passes by what they are of: an argument that is left out is the same as its default, unlike in
    `lru_cache`.
    """

    def __init__(self, count: Callable[P, Pass]) -> None:
        self._signature = inspect.signature(count)
        self._counted = lru_cache(maxsize=64)(lambda arguments: count(**dict(arguments)))  # type: ignore[call-arg]
        self.cache_info = self._counted.cache_info
        self.cache_clear = self._counted.cache_clear
        update_wrapper(self, count)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Pass:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self._counted(tuple(bound.arguments.items()))


@_Once
def gradient_pass(
    params: UNetParams,
    images: int,
    latent_shape: tuple[int, ...],
    *,
    moving: frozenset[str],
    precision: str = "fp32",
    gradient_checkpointing: bool = False,
    device: str = "cpu",
) -> Pass:
    """Forward and backward through the UNet, where the gradients of an earlier pass are there, and are added to.

    Args:
        latent_shape: (C, h, w).
        moving: names of the parameters that get a gradient.
        precision: see `compute.Compute`.
    """
    with FakeTensorMode():
        unet = _on(device, lambda: UNet(params), torch.bfloat16 if precision == "bf16" else torch.float32)
        unet.gradient_checkpointing = gradient_checkpointing
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name in moving)
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        inputs = _inputs(unet, images, latent_shape, device)
        with _Operations() as seen:
            with _autocast(precision, device):
                prediction = unet(*inputs)
            loss = prediction.float().square().mean()
            kept = seen.live
            loss.backward()
        return Pass(kept=kept, peak=seen.peak, flops=seen.flops)


@_Once
def forward_pass(
    params: UNetParams,
    images: int,
    latent_shape: tuple[int, ...],
    *,
    precision: str = "fp32",
    device: str = "cpu",
) -> Pass:
    """A prediction of the UNet without gradient."""
    with FakeTensorMode(), torch.no_grad():
        unet = _on(device, lambda: UNet(params))
        inputs = _inputs(unet, images, latent_shape, device)
        return _without_gradient(lambda: unet(*inputs), precision, device)


@_Once
def decoding_pass(
    params: AutoencoderParams,
    images: int,
    latent_shape: tuple[int, ...],
    *,
    precision: str = "fp32",
    device: str = "cpu",
) -> Pass:
    """From latents to images."""
    with FakeTensorMode(), torch.no_grad():
        autoencoder = _on(device, lambda: AutoencoderKL(params))
        latents = torch.zeros(images, *latent_shape, device=device)
        return _without_gradient(lambda: autoencoder.decode(latents), precision, device)


@_Once
def encoding_pass(params: AutoencoderParams, image_size: int, *, device: str = "cpu") -> Pass:
    """From one image to the moments of its latents."""
    with FakeTensorMode(), torch.no_grad():
        autoencoder = _on(device, lambda: AutoencoderKL(params))
        image = torch.zeros(1, 3, image_size, image_size, device=device)
        return _without_gradient(lambda: autoencoder.encode(image), "fp32", device)


def _without_gradient(run: Callable[[], object], precision: str, device: str) -> Pass:
    with _Operations() as seen, _autocast(precision, device):
        result = run()
        kept = seen.live
        del result
    return Pass(kept=kept, peak=seen.peak, flops=seen.flops)


def _on(device: str, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake weights cannot be cast afterwards
    try:
        with torch.device(device):
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def _inputs(
    unet: UNet, images: int, latent_shape: tuple[int, ...], device: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """latents (B, C, h, w), timesteps (B,), context (B, L, D)."""
    dtype = next(unet.parameters()).dtype
    latents = torch.zeros(images, *latent_shape, device=device, dtype=dtype)
    width = unet.params.context_dim
    context = None if width is None else torch.zeros(images, _TOKENS, width, device=device, dtype=dtype)
    return latents, torch.zeros(images, dtype=torch.int64, device=device), context


def _autocast(precision: str, device: str) -> AbstractContextManager[object]:
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


class _Operations(TorchDispatchMode):
    """Follows what the operations inside allocate, until it is let go of, and counts their FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes that are held now."""
        self.peak = 0
        """The most so far."""
        self.flops = 0
        self._known: set[int] = set()  # storages that are alive, of these operations or from outside

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), 0)  # an operation may return a view of it
        results = operation(*args, **(kwargs or {}))
        if (count := flop_registry.get(operation._overloadpacket)) is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=results))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return results

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata  # fake storages have no address
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._let_go, key, size).atexit = False

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
