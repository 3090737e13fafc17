"""The key `devices`: which device a run uses, or which devices its processes use."""

from __future__ import annotations

import logging
import sys
from functools import cache

from mu.errors import MuError
from mu.ranks import local_rank

DEVICE_PATTERN = r"cpu|(?:cuda:)?[0-9]{1,3}"
"""One device."""
DEVICES_PATTERN = rf"(?:{DEVICE_PATTERN})(?:,(?:{DEVICE_PATTERN}))*"
"""One or several, with commas."""
_LOGGER = logging.getLogger(__name__)


class DeviceError(MuError, ValueError):
    """The device asked for does not exist."""


def device_names(devices: str) -> tuple[str, ...]:
    """The devices that the key names, one for each process of a machine."""
    return tuple(devices.split(","))


def devices_problem(devices: str) -> str | None:
    """Why several devices cannot be those of one run, or None."""
    names = [name.removeprefix("cuda:") for name in device_names(devices)]
    if "cpu" in names and set(names) != {"cpu"}:
        return (
            f"{devices} mixes the CPU and GPUs, whose processes would wait for the slower ones; give one kind"
        )
    if "cpu" not in names and len(set(names)) < len(names):
        return f"{devices} names a GPU twice; give one GPU to each process"
    return None


def resolve_devices(devices: str) -> str:
    """The torch device of this process: "cpu", or "cuda:0" for "0" and "cuda:0"; of "0,1" the one of its place.

    On a machine without CUDA it is "cpu", which is said once a process.

    Raises:
        DeviceError: there is CUDA, but no device of that number.
    """
    names = device_names(devices)
    device = names[local_rank() if len(names) > 1 else 0]
    if device == "cpu":
        return "cpu"
    import torch  # late: configs and --help work without it

    if not torch.cuda.is_available() or torch.cuda.device_count() == 0:
        _say_cpu(devices)
        return "cpu"
    check_devices(device)
    return f"cuda:{int(device.removeprefix('cuda:'))}"


def check_devices(devices: str) -> None:
    """Whether all devices that the key names are there; a machine without CUDA takes the CPU for any of them.

    Raises:
        DeviceError: there is CUDA, but no device of one of these numbers.
    """
    numbers = [int(name.removeprefix("cuda:")) for name in device_names(devices) if name != "cpu"]
    if not numbers:
        return
    import torch  # late: configs and --help work without it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < count <= max(numbers):
        have = "device 0" if count == 1 else f"devices 0 to {count - 1}"
        raise DeviceError(f"devices: there is no CUDA device {max(numbers)}; this machine has {have}")


def peak_memory_bytes() -> dict[str, int]:
    """The most memory that this process has held so far: "process", and "cuda" where torch has used it.

    Empty where the system does not tell, as on Windows.
    """
    try:
        import resource
    except ImportError:
        return {}
    # In KiB, on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["cuda"] = max(
            torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())
        )
    return peak


@cache
def _say_cpu(devices: str) -> None:
    _LOGGER.warning("devices: %s: no CUDA device on this machine, running on the CPU", devices)
