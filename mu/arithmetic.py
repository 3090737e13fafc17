"""How torch computes during a run: what fp32 means for matrix products and convolutions, and deterministic kernels.

Everything here is set for the time of a block and put back at its end.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

from mu.errors import MuError

_log = logging.getLogger(__name__)
_CUDA_PRODUCTS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
_CPU_PRODUCTS = ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""The values with which cuBLAS gives the same bits twice, by its documentation."""


class DeterminismError(MuError, RuntimeError):
    """Deterministic kernels were asked for too late."""


@contextmanager
def run_arithmetic(*, deterministic: bool = False) -> Iterator[None]:
    """The arithmetic of a whole run, until the block ends: fp32 is fp32 (see `products`) unless a part says otherwise.

    Args:
        deterministic: torch and cuDNN choose kernels that give the same bits twice, and refuse operations that have
            none. `CUBLAS_WORKSPACE_CONFIG` is set for cuBLAS, which reads it once, and stays set.

    Raises:
        DeterminismError: `deterministic`, and CUDA had started before without that variable.
    """
    with products(tf32=False), _deterministic() if deterministic else nullcontext():
        yield


@contextmanager
def products(*, tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions of fp32 tensors in real fp32, or with factors rounded to TF32's 10 bits.

    TF32 is for GPUs that have it; on a CPU products are in fp32 either way. torch has two interfaces for this, and
    raises an error where they contradict each other. Both are set here, so that they agree inside, and both are put
    back to what the caller had.
    """
    import torch  # late: configs and --help work without it

    inherited = getattr(torch.backends, "fp32_precision", "none")
    # A place that only follows the setting for all of torch goes on following it.
    newer = [
        (place, "none" if place.fp32_precision == inherited else place.fp32_precision)
        for place in _newer_switches(_CUDA_PRODUCTS + _CPU_PRODUCTS)
    ]
    matmul, cudnn = _legacy_switches()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        for names, value in ((_CUDA_PRODUCTS, "tf32" if tf32 else "ieee"), (_CPU_PRODUCTS, "ieee")):
            for place in _newer_switches(names):
                place.fp32_precision = value
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for place, value in newer:
            place.fp32_precision = value


def _newer_switches(names: tuple[str, ...]) -> list[Any]:
    """The places that have `fp32_precision`; none before torch 2.9."""
    import torch

    found = []
    for name in names:
        try:
            place = attrgetter(name)(torch.backends)
        except AttributeError:
            continue
        if hasattr(place, "fp32_precision"):
            found.append(place)
    return found


def _legacy_switches() -> tuple[str | None, bool | None]:
    """The older switches of products and of convolutions; None for one that the newer interface contradicts."""
    import torch

    matmul: str | None = None
    cudnn: bool | None = None
    try:
        matmul = torch.get_float32_matmul_precision()
        _ = torch.backends.cuda.matmul.allow_tf32  # refuses more than the line above
    except RuntimeError:
        matmul = None
    try:
        cudnn = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        cudnn = None
    return matmul, cudnn


@contextmanager
def _deterministic() -> Iterator[None]:
    import torch

    _prepare_cublas()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        # Nothing here reads memory before it is written; to fill it all the same would only take time.
        memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        memory.fill_uninitialized_memory = fill


def _prepare_cublas() -> None:
    """Give cuBLAS the workspaces with which it is deterministic.

    Raises:
        DeterminismError: CUDA has started before without them.
    """
    value = os.environ.get(CUBLAS_WORKSPACE)
    if value in _DETERMINISTIC_WORKSPACES:
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise DeterminismError(
            f"deterministic: CUDA has started in this process while {CUBLAS_WORKSPACE} was {value or 'not set'}, and "
            f"cuBLAS reads it once. Start Python with {CUBLAS_WORKSPACE}=:4096:8 in its environment, or leave "
            "deterministic out"
        )
    if value is not None:
        _log.warning("deterministic: %s was %s, and is now :4096:8", CUBLAS_WORKSPACE, value)
    os.environ[CUBLAS_WORKSPACE] = ":4096:8"
