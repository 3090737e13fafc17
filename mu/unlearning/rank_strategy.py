"""How Lightning sees the processes of a run: it counts them, and what they exchange is the trainer's affair."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from mu import ranks
from mu.devices import device_names, resolve_devices


class RankStrategy(DDPStrategy):
    """Lightning's own for one process a device, without its wrapper around the model.

    That would add up the gradients of whole tensors after each backward pass; `MaskedAdam.sum_gradients` adds up those
    of the selected entries, once a step. The group is that of `mu.ranks.joined`.

    Args:
        device: of this process.
    """

    def __init__(self, device: str) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment())
        self._device = torch.device(device)

    @property
    def root_device(self) -> torch.device:
        return self._device

    def configure_ddp(self) -> None:
        """No wrapper."""


def loop_devices(devices: str) -> dict[str, Any]:
    """What Lightning's loop in this process is told of the key `devices`: accelerator, devices, nodes and strategy."""
    device = resolve_devices(devices)
    accelerator = "cpu" if device == "cpu" else "gpu"
    if ranks.world_size() == 1:
        one = 1 if device == "cpu" else [int(device.removeprefix("cuda:"))]
        # In the script of sbatch, Lightning would take the job's tasks, which are not begun yet, for its own processes.
        return {"accelerator": accelerator, "devices": one, "plugins": [LightningEnvironment()]}
    names = device_names(devices)
    seen = len(names) if device == "cpu" else [int(name.removeprefix("cuda:")) for name in names]
    return {
        "accelerator": accelerator,
        "devices": seen,
        "num_nodes": ranks.world_size() // len(names),
        "strategy": RankStrategy(device),
    }
