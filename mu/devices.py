"""The key `devices`: which device a run uses."""

from __future__ import annotations

import logging
import sys
from functools import cache

from mu.errors import MuError

DEVICES_PATTERN = r"cpu|(?:cuda:)?[0-9]{1,3}"
_LOGGER = logging.getLogger(__name__)


class DeviceError(MuError, ValueError):
    """The device asked for does not exist."""


def resolve_devices(devices: str) -> str:
    """The torch device of a run: "cpu", or "cuda:0" for "0" and "cuda:0".

    On a machine without CUDA it is "cpu", which is said once a process.

    Raises:
        DeviceError: there is CUDA, but no device of that number.
    """
    if devices == "cpu":
        return "cpu"
    import torch  # late: configs and --help work without it

    number = int(devices.removeprefix("cuda:"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        _say_cpu(devices)
        return "cpu"
    if number >= count:
        have = "device 0" if count == 1 else f"devices 0 to {count - 1}"
        raise DeviceError(f"devices: there is no CUDA device {number}; this machine has {have}")
    return f"cuda:{number}"


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
