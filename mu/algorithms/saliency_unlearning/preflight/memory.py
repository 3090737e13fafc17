"""What a run holds at its peaks, phase by phase. docs/preflight.md says how far the numbers were found to be right.

Weights, gradients, sums, moments, masks and files are counted; activations come from `passes`. What cannot be counted
is an allowance: what kernels and the allocator take beside the tensors, and what libraries load late.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mu.algorithms.saliency_unlearning.preflight.files import optimizer_bytes

LATE_LIBRARIES_BYTES = 60_000_000
"""Tokenizer, kernels made at run time, and modules that are imported when first used: measured on Linux."""
ALLOCATOR_SHARE = 1.25
"""What activations take of a CPU's memory, with the kernels' own and the gaps that the allocator leaves: measured."""
RETAINED_SHARE = 0.65
"""Of what a CPU's memory held while training, what the allocator keeps when it is let go of: measured with glibc."""
_BUCKET_ENTRIES = 1 << 25
"""Moving entries that are updated together, see `optim`."""


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """What there is of a model."""

    whole: int
    """All networks in fp32, as they are loaded."""
    unet: int
    """The UNet in fp32."""
    file: int
    """The checkpoint's tensors in their own types: while they are compared with another, they are read as a whole."""

    @property
    def encoders(self) -> int:
        return self.whole - self.unet


@dataclass(frozen=True, kw_only=True)
class Moving:
    """What training moves."""

    selected: Mapping[str, int]
    """Name -> moving entries, of tensors that have any."""
    numel: Mapping[str, int]
    """Name -> entries, of all tensors of the UNet."""
    mask: bool
    """Whether there is a mask in memory."""

    @property
    def entries(self) -> int:
        return sum(self.selected.values())

    def gradients(self, precision: str) -> int:
        """Bytes of the gradients of a step."""
        return (2 if precision == "bf16" else 4) * sum(self.numel[name] for name in self.selected)

    def index(self, whole_too: bool) -> int:
        """Bytes of the places of moving entries; of a whole tensor only where its layout asks for it."""
        return 4 * sum(
            count for name, count in self.selected.items() if whole_too or count < self.numel[name]
        )


def mask_memory(
    model: ModelBytes,
    *,
    passes: Mapping[str, int],
    activations: int,
    precision: str,
    thresholds: int,
    shards: int,
    cuda: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Phase -> bytes of the process, beside what it holds before; and of the GPU, where there is one.

    Args:
        passes: phase -> bytes at the peak of what goes through a network before (sample, encode).
        activations: bytes at the peak of a pass with gradient, beside the summed gradients.
        shards: processes over which the weights are split, and what goes with them.
    """
    unet = model.unet // 2 if precision == "bf16" else model.unet
    sums = model.unet  # fp32, whatever the weights
    masks = model.unet // 4
    gradients = {
        "gradients": (unet + sums) // shards + _taken(activations, cuda),
        "thresholds": (unet + sums) // shards + thresholds * masks,
    }
    host = {"load": model.whole + model.file}
    full_copy = model.unet if precision == "bf16" else 0
    if cuda:
        host["write"] = full_copy + thresholds * masks
        return _with_libraries(host), {**_plus(model.whole, passes), **gradients}
    host |= {name: model.whole + _taken(count, cuda) for name, count in passes.items()}
    return _with_libraries(host | _plus(model.encoders + full_copy, gradients)), {}


def training_memory(
    model: ModelBytes,
    moving: Moving,
    *,
    passes: Mapping[str, int],
    activations: int,
    precision: str,
    optimizer: str,
    frozen: bool,
    channels_last: bool,
    patch: bool,
    resumed: bool,
    file_dtype_bytes: int,
    shards: int,
    cuda: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """As `mask_memory`.

    Args:
        frozen: the original values of what moves are kept.
        activations: beside gradients that are there already.
        resumed: the state of a run is read before it goes on.
        file_dtype_bytes: bytes of a value in the file.
    """
    count = moving.entries
    unet = model.unet // 2 if precision == "bf16" else model.unet
    width = 2 if precision == "bf16" else 4
    mask = model.unet // 4 if moving.mask else 0
    index = moving.index(channels_last)
    originals = index + width * count if frozen else 0
    optimized = optimizer_bytes(count, precision=precision, optimizer=optimizer) + index
    update = 8 * min(count, _BUCKET_ENTRIES) + 8 * max(moving.selected.values(), default=0)
    swapped = width * count if frozen else 0  # what is trained, while the original stands in its place
    held = (0 if cuda else mask) + (unet + originals + optimized + moving.gradients(precision)) // shards
    device = {"train": held + _taken(max(activations, swapped), cuda), "update": held + update // shards}
    resumed_bytes = (width + 8) * count if resumed else 0
    full_copy = model.unet if precision == "bf16" else 0
    written = 0 if file_dtype_bytes == 4 else model.file
    change = 2 * file_dtype_bytes * count + count if patch else 0
    host = {"load": model.whole + model.file + resumed_bytes}
    both = 2 * model.file  # the original and what was written
    if cuda:
        host |= {"write": mask + full_copy + model.file, "compare": mask + full_copy + both + change}
        return _with_libraries(host), {**_plus(model.whole, passes), **device}
    before = model.whole + mask + resumed_bytes
    host |= {name: before + _taken(peak, cuda) for name, peak in passes.items()}
    host |= _plus(model.encoders + full_copy + resumed_bytes, device)
    # What is written and compared goes into what the allocator has kept, but for files, which are mapped.
    kept = int(RETAINED_SHARE * max(0, max(device.values()) + model.encoders - before))
    host |= {"write": before + max(kept, written), "compare": before + both + max(kept, change)}
    return _with_libraries(host), {}


def _taken(activations: int, cuda: bool) -> int:
    return activations if cuda else int(ALLOCATOR_SHARE * activations)


def _plus(more: int, phases: Mapping[str, int]) -> dict[str, int]:
    return {name: count + more for name, count in phases.items()}


def _with_libraries(phases: Mapping[str, int]) -> dict[str, int]:
    late: Collection[str] = set(phases) - {"load"}
    return {name: count + LATE_LIBRARIES_BYTES * (name in late) for name, count in phases.items()}
