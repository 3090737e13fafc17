"""The key `devices`: which device a run uses."""

from __future__ import annotations

import logging
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


@cache
def _say_cpu(devices: str) -> None:
    _LOGGER.warning("devices: %s: no CUDA device on this machine, running on the CPU", devices)
