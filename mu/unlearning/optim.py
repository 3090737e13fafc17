"""Adam that moves the selected entries of each parameter and never writes the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from mu import ranks
from mu.errors import MuError

_BUCKET_ENTRIES = 1 << 25
"""Parameters are updated together up to this many selected entries: few kernel launches, bounded extra memory."""
_FUSED_DEVICES = ("cpu", "cuda")


class SelectionError(MuError, ValueError):
    """What is selected does not fit the weights, or is nothing."""


class SelectedEntries:
    """The selected entries of one tensor, read and written as one packed vector.

    Entries come in row-major order, whether they lie so in memory or channels-last: what is packed fits a tensor in
    either layout. Neither is copied; a tensor in another layout than `like` is.

    Args:
        like: the tensor whose shape, layout and device count.
        mask: bool, of the same shape: which entries are selected.
    """

    def __init__(self, like: Tensor, mask: Tensor) -> None:
        _in_memory_order(like)  # refuses other layouts
        mask = mask.to(like.device)
        self.strides = like.stride()
        self.count = int(mask.count_nonzero())
        self.index: Tensor | None = None  # (count,) places in memory; None: all entries, as they lie there
        if not like.is_contiguous():
            n, c, h, w = like.shape
            places = torch.arange(like.numel(), dtype=torch.int32, device=like.device)  # (n,)
            self.index = places.view(n, h, w, c).permute(0, 3, 1, 2)[mask]
        elif self.count < like.numel():
            self.index = mask.reshape(-1).nonzero().squeeze(1).to(torch.int32)  # half of int64's memory

    def read(self, tensor: Tensor) -> Tensor:
        """(count,) selected entries of `tensor`; a view of it when all are selected."""
        if tensor.stride() != self.strides:
            tensor = tensor.new_empty_strided(tensor.shape, self.strides).copy_(tensor)
        flat = _in_memory_order(tensor)
        return flat if self.index is None else flat.index_select(0, self.index)

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values` (count,) over the selected entries of `tensor`, which must have the layout of `like`."""
        flat = _in_memory_order(tensor)
        if self.index is not None:
            flat.index_copy_(0, self.index.long(), values)
        elif values.data_ptr() != flat.data_ptr():
            flat.copy_(values)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view of a dense tensor; its order is that of the memory, whatever the strides."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if not (tensor.is_contiguous() or channels_last):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is neither contiguous nor "
            "channels-last: call .contiguous() on the model's weights first"
        )
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _laid_out_as(like: Tensor, tensor: Tensor | None) -> Tensor:
    """A tensor in the memory layout of another of its shape: itself, or a copy."""
    assert tensor is not None
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


class MaskedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) on the entries that a mask selects.

    The selected entries move as `torch.optim.Adam(fused=True)` would move them on gradients multiplied by the mask; the
    others are never written. State exists for selected entries only: two moments, each packed into one vector per
    parameter. Weights are fp32 (or fp64): a half would lose most of the small steps of fine-tuning.

    Args:
        named_parameters: (name, parameter) pairs. A parameter of which nothing is selected is left out.
        mask: name -> bool tensor of the parameter's shape. May hold more names than `named_parameters`.
        lr: learning rate.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.

    Raises:
        SelectionError: a parameter has no mask or one of another shape, or nothing at all is selected.
        ValueError: lr, betas or eps out of range, or a parameter of less than 32 bits.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        mask: Mapping[str, Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not (0.0 <= lr < math.inf and 0.0 <= eps < math.inf and all(0.0 <= beta < 1.0 for beta in betas)):
            raise ValueError(f"lr {lr} and eps {eps} must be finite and >= 0, betas {betas} in [0, 1)")
        selected: list[tuple[str, Tensor]] = []
        self._entries: dict[Tensor, SelectedEntries] = {}
        for name, parameter in named_parameters:
            if name not in mask:
                raise SelectionError(f"the mask has no entry for parameter {name}; it has {len(mask)} others")
            if mask[name].shape != parameter.shape:
                raise SelectionError(
                    f"the mask of {name} has shape {tuple(mask[name].shape)}, the parameter "
                    f"{tuple(parameter.shape)}"
                )
            if mask[name].dtype != torch.bool:
                raise SelectionError(f"the mask of {name} is {mask[name].dtype}, not bool")
            if parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"parameter {name} is {parameter.dtype}: train in fp32, as load_model loads every checkpoint; "
                    "save_checkpoint writes the file's own dtype again"
                )
            entries = SelectedEntries(parameter, mask[name])
            if entries.count:
                selected.append((name, parameter))
                self._entries[parameter] = entries
        if not selected:
            raise SelectionError(
                "the mask selects no entry of any of these parameters: there is nothing to train"
            )
        super().__init__(selected, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the selected entries of every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients; called first, with gradients on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:  # should memory run out for the state, no weight has moved yet
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._new_state(parameter)
        for group in self.param_groups:
            for bucket in self._buckets(group["params"]):
                self._update(bucket, group)
        return loss

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up the gradients of the selected entries over the processes of a run; those of the others are left."""
        if ranks.world_size() == 1:
            return
        for group in self.param_groups:
            for bucket in self._buckets(group["params"]):
                gradients = [_laid_out_as(parameter, parameter.grad) for parameter in bucket]
                packed = [
                    self._entries[p].read(g) for p, g in zip(bucket, gradients, strict=True)
                ]  # (count,) each
                ranks.sum_(packed)
                for parameter, gradient, values in zip(bucket, gradients, packed, strict=True):
                    self._entries[parameter].write_(gradient, values)
                    parameter.grad = gradient

    def _buckets(self, parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        bucket: list[Tensor] = []
        filled = 0
        for parameter in parameters:
            if parameter.grad is None:
                continue
            count = self._entries[parameter].count
            if bucket and filled + count > _BUCKET_ENTRIES:
                yield bucket
                bucket, filled = [], 0
            bucket.append(parameter)
            filled += count
        if bucket:
            yield bucket

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        values, grads = zip(*(self._packed(parameter) for parameter in parameters), strict=True)
        states = [self.state[parameter] for parameter in parameters]
        # torch's own update on the packed vectors, in one kernel that reads and writes each number once.
        adam(
            list(values),
            list(grads),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=values[0].device.type in _FUSED_DEVICES,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        for parameter, value in zip(parameters, values, strict=True):
            self._entries[parameter].write_(parameter, value)

    def _packed(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        entries = self._entries[parameter]
        assert parameter.grad is not None
        return entries.read(parameter), entries.read(parameter.grad)  # (count,) both

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        count, device = self._entries[parameter].count, parameter.device
        return {
            "step": torch.zeros((), device=device),  # where the fused update reads it
            "exp_avg": torch.zeros(count, dtype=parameter.dtype, device=device),
            "exp_avg_sq": torch.zeros(count, dtype=parameter.dtype, device=device),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state that `state_dict()` gave, of an optimizer of the same parameters under the same mask.

        Raises:
            SelectionError: the state was made under a mask that selects another number of entries.
            ValueError: it is of other parameters.
        """
        super().load_state_dict(state_dict)
        # The base class leaves the count of steps where it was, and may share the tensors: take them again, copied.
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved_group["params"], group["params"], strict=True):
                saved = state_dict["state"].get(index, {})
                count = self._entries[parameter].count
                if saved and saved["exp_avg"].numel() != count:
                    raise SelectionError(
                        f"the optimizer state has {saved['exp_avg'].numel()} entries for parameter {index}, "
                        f"the mask selects {count}: it was made under another mask"
                    )
                for key, value in saved.items():
                    self.state[parameter][key] = value.detach().to(parameter.device, copy=True)
