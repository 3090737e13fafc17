"""`MaskedAdam` with moments in 8 bits (Dettmers et al. 2022), by the library bitsandbytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.optim import MaskedAdam
from mu.errors import MuError

_BLOCK = 256
"""Numbers that share a scale: bitsandbytes' own block."""
_LEAST = 4096
"""Below this many selected entries moments stay fp32, as bitsandbytes keeps them: there is nothing to save."""


class MissingPackageError(MuError, ImportError):
    """A package that a setting needs is not installed."""


class MaskedAdam8bit(MaskedAdam):
    """Adam on the entries that a mask selects, with both moments as 8-bit codes and an fp32 scale for 256 of them.

    2 bytes a selected weight instead of 8. Updates differ from Adam's by the rounding of the moments.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
        MaskError, ValueError: see `MaskedAdam`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        _library()
        super().__init__(*args, **options)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        eight_bit = [p for p in parameters if "scale" in self.state[p]]
        if rest := [p for p in parameters if "scale" not in self.state[p]]:
            for parameter in rest:  # the fused update wants the count beside the moments
                state = self.state[parameter]
                state["step"] = state["step"].to(parameter.device)
            super()._update(rest, group)
        for parameter in eight_bit:
            state = self.state[parameter]
            state["step"] += 1
            value, grad = self._packed(parameter)  # (count,) both
            _library().optimizer_update_8bit_blockwise(
                "adam",
                grad,
                value,
                state["exp_avg"],
                state["exp_avg_sq"],
                *group["betas"],
                beta3=0.0,
                alpha=0.0,
                eps=group["eps"],
                step=int(state["step"]),
                lr=float(group["lr"]),
                qmap1=_codes(parameter.device, signed=True),
                qmap2=_codes(parameter.device, signed=False),
                absmax1=state["scale"],
                absmax2=state["scale_sq"],
            )
            self._entries[parameter].write_(parameter, value)

    def _step_device(self, parameter: Tensor) -> torch.device:  # noqa: ARG002
        return torch.device("cpu")  # bitsandbytes takes a number

    def _new_moments(self, count: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        if count < _LEAST:
            return super()._new_moments(count, dtype, device)
        codes = {
            name: torch.zeros(count, dtype=torch.uint8, device=device) for name in ("exp_avg", "exp_avg_sq")
        }  # (count,) each
        scales = {
            name: torch.zeros(-(-count // _BLOCK), device=device) for name in ("scale", "scale_sq")
        }  # (ceil(count / 256),) each
        return codes | scales


@cache
def _library() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingPackageError(
            "optimizer adam8bit needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or choose optimizer adam"
        ) from error
    return bitsandbytes.functional


@cache
def _codes(device: torch.device, *, signed: bool) -> Tensor:
    """(256,) the numbers in -1..1 (0..1 without a sign) that the codes stand for."""
    return _library().create_dynamic_map(signed=signed).to(device)
