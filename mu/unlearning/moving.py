"""The weights that may move: which they are, what they were before, and that they are the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mu import ranks
from mu.config_names import nearest
from mu.errors import MuError
from mu.ldm import LatentDiffusion
from mu.ldm.tensor_file import fingerprint
from mu.unlearning.config import IN_METHOD, TRAIN_METHODS
from mu.unlearning.optim import SelectedEntries, SelectionError


class TrainMethodError(MuError, ValueError):
    """A train method is unknown, or selects nothing of this UNet."""


class TrainingError(MuError, RuntimeError):
    """Training met a number that is not finite, or a weight that had to stay as it was has changed."""


def names_of(unet: nn.Module, train_method: str) -> list[str]:
    """Names, relative to the UNet, of the parameters that a train method may move; in their own order.

    Raises:
        TrainMethodError: the method is unknown, or this UNet has no such parameters (the blocks of `selflayer` and
            `xlayer` are those of Stable Diffusion v1).
    """
    if train_method not in IN_METHOD:
        known = ", ".join(TRAIN_METHODS)
        raise TrainMethodError(
            f"train_method: {train_method!r} is not one of: {known}.{nearest(train_method, TRAIN_METHODS)}"
        )
    every = [name for name, _ in unet.named_parameters()]
    names = [name for name in every if IN_METHOD[train_method](name)]
    if not names:
        usable = [method for method, within in IN_METHOD.items() if any(map(within, every))]
        raise TrainMethodError(
            f"train_method {train_method!r} selects none of this UNet's weights; with it, these do: {', '.join(usable)}"
        )
    return names


class MovingModel(nn.Module):
    """A latent diffusion model of which only the selected weights may move.

    Everything else is frozen; that it has stayed as it was is found on the written file (`output.verify_tensors`).
    The model stays in eval mode, also when a training loop calls `train()`: unlearning fine-tunes without dropout.

    Args:
        ldm: the model; its weights are used as they are, not copied.
        train_method: one of `TRAIN_METHODS`; its weights are those that may move.
        selected: UNet-relative name -> bool tensor: of these weights, only the marked entries; None: all.

    Raises:
        TrainMethodError: see `names_of`.
        SelectionError: nothing is selected that the train method moves.
    """

    def __init__(
        self, ldm: LatentDiffusion, train_method: str, selected: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.ldm = ldm
        self.train_method = train_method
        names = names_of(ldm.unet, train_method)
        parameters = dict(ldm.unet.named_parameters())
        if selected is None:  # one stored True stands for a whole tensor of them
            selected = {
                name: torch.ones((), dtype=torch.bool).expand(p.shape) for name, p in parameters.items()
            }
        self.selected: dict[str, Tensor] = {name: selected[name] for name in names if selected[name].any()}
        """UNet-relative name -> bool tensor of the entries that move; names of which none does are absent."""
        if not self.selected:
            raise SelectionError(
                f"nothing is selected of the weights that train_method {train_method!r} moves"
            )
        self.counts = {
            "total": sum(parameter.numel() for parameter in parameters.values()),
            "train_method": sum(parameters[name].numel() for name in names),
            "mask": sum(int(marked.count_nonzero()) for marked in selected.values()),
            "selected": sum(int(marked.count_nonzero()) for marked in self.selected.values()),
        }
        """Numbers of UNet weights: all, in the train method, in the mask, and in both (those that move)."""
        ldm.requires_grad_(False)
        for _, parameter in self.parameters_to_train():
            parameter.requires_grad_(True)
        self.eval()
        self._originals: dict[str, Tensor] = {}  # UNet-relative name -> (count,)
        self._entries: dict[str, SelectedEntries] = {}

    def parameters_to_train(self) -> list[tuple[str, nn.Parameter]]:
        """(UNet-relative name, parameter) of every tensor of which something may move."""
        return [(name, p) for name, p in self.ldm.unet.named_parameters() if name in self.selected]

    def selected_values(self) -> dict[str, Tensor]:
        """Name -> (count,) values of the entries that move, row-major, on the CPU."""
        return {
            name: parameter.detach()[self.selected[name].to(parameter.device)].cpu()
            for name, parameter in self.parameters_to_train()
        }

    @torch.no_grad()
    def write_selected_(self, values: Mapping[str, Tensor]) -> None:
        """Write what `selected_values` gave."""
        for name, parameter in self.parameters_to_train():
            parameter[self.selected[name].to(parameter.device)] = values[name].to(parameter)

    def train(self, mode: bool = True) -> MovingModel:  # noqa: ARG002
        """Stay in eval mode, whatever is asked."""
        super().train(False)
        return self

    def verify_same_everywhere(self) -> None:
        """Check that the weights that moved are to the bit the same in all processes of the run.

        Raises:
            TrainingError: they are not; names the processes.
        """
        if ranks.world_size() == 1:
            return
        digests = ranks.gathered(fingerprint(dict(self.parameters_to_train())))
        others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise TrainingError(f"processes {', '.join(others)} have come to other weights than process 0")

    def keep_originals(self) -> None:
        """Copy the selected entries as they are now, for `frozen_originals`. Call it before anything has moved."""
        for name, parameter in self.parameters_to_train():
            self._entries[name] = SelectedEntries(parameter, self.selected[name])
            self._originals[name] = self._entries[name].read(parameter).clone()

    @contextmanager
    def frozen_originals(self) -> Iterator[LatentDiffusion]:
        """The original model, for as long as the block lasts: kept values stand in the place of the trained ones.

        Raises:
            RuntimeError: `keep_originals` was not called.
        """
        if not self._originals:
            raise RuntimeError("call keep_originals() before training to have the frozen model at hand")
        trained: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self.parameters_to_train():
                self._follow(name, parameter)
                trained[name] = self._entries[name].read(parameter).clone()
                self._entries[name].write_(parameter, self._originals[name])
        try:
            yield self.ldm
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters_to_train():
                    self._entries[name].write_(parameter, trained[name])

    def _follow(self, name: str, parameter: nn.Parameter) -> None:
        """Move what is kept of a parameter to where it is now: once, after the training loop has moved the model."""
        if self._originals[name].device != parameter.device:
            self._entries[name] = SelectedEntries(parameter, self.selected[name])
            self._originals[name] = self._originals[name].to(parameter.device)


class FrozenOriginal:
    """Predicts what the network predicted before training; needs only the original values of the selected entries.

    Args:
        model: not yet trained; its `keep_originals` is called here.
    """

    def __init__(self, model: MovingModel) -> None:
        self.model = model
        model.keep_originals()

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """As `LatentDiffusion.predict`, without gradient.

        Autocast must not cache the weights that it rounds, as in `Compute.autocast`: the originals would go on in the
        predictions of the trained model.
        """
        with self.model.frozen_originals() as ldm:
            return ldm.predict(noisy_latents, timesteps, context)  # (B, C, H, W)
