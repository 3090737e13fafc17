"""The model of saliency unlearning: what moves is in the train method AND in the mask."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mu.algorithms.saliency_unlearning.mask_file import MaskError, check_mask
from mu.ldm import LatentDiffusion
from mu.unlearning.moving import MovingModel, names_of

__all__ = ["SaliencyUnlearnModel"]


class SaliencyUnlearnModel(MovingModel):
    """A latent diffusion model of which only the weights in train method AND mask may move; see `MovingModel`.

    Args:
        mask: UNet-relative name -> bool tensor, for all of the UNet's parameters; None selects all of them.

    Raises:
        TrainMethodError: see `names_of`.
        MaskError: the mask is of another model, or marks nothing that the train method moves.
    """

    def __init__(
        self, ldm: LatentDiffusion, train_method: str, mask: Mapping[str, Tensor] | None = None
    ) -> None:
        names = names_of(ldm.unet, train_method)
        if mask is not None:
            check_mask(mask, ldm.unet)
            if not any(mask[name].any() for name in names):
                raise MaskError(
                    f"the mask marks none of the weights that train_method {train_method!r} moves"
                )
        super().__init__(ldm, train_method, mask)
