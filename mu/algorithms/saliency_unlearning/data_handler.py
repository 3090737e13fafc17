"""From a config and a model to SalUn's batches: for fine-tuning as `ImageData` gives them, and for the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mu.unlearning.batches import EncodedRows, ForgetBatch, Places, on_device
from mu.unlearning.image_data import ImageData


class SaliencyUnlearnDataHandler(ImageData):
    """Everything a mask or training run reads; made from its config, a MaskConfig or TrainConfig, as `ImageData` is."""

    @property
    def mask_batch_count(self) -> int:
        """Batches that `mask_batches` yields."""
        return math.ceil(len(self.rows.forget) * self.config.draws_per_image / self.config.batch_size)

    def mask_batches(self) -> Iterator[ForgetBatch]:
        """Batches of the images to forget, `draws_per_image` draws of each, fp32 on the model's device.

        The context is that of the image's own prompt, the reference context that of "". Images are sampled and encoded
        in this call, not while the batches are taken.
        """
        return self._mask_batches(self.encoded_forget)

    def _mask_batches(self, forget: EncodedRows) -> Iterator[ForgetBatch]:
        device = next(self.model.parameters()).device
        num_timesteps = min(self.config.num_timesteps, self.model.num_timesteps)
        for wanted in self._mask_draws():
            drawn = forget.batch(wanted, seed=self.config.seed, stage="mask", num_timesteps=num_timesteps)
            yield on_device(
                ForgetBatch(*drawn, forget.context(wanted), forget.reference_context(wanted, "")), device
            )

    def mask_images(self, batch_index: int) -> list[str]:
        """The image files of that batch of `mask_batches`, for messages."""
        return [str(self.rows.forget[place].image) for _, place in self._mask_draws()[batch_index]]

    def _mask_draws(self) -> list[Places]:
        """(number of the draw, place of the row) of each batch for the mask."""
        places = range(len(self.rows.forget))
        wanted = [(number, place) for number in range(self.config.draws_per_image) for place in places]
        size = self.config.batch_size
        return [wanted[first : first + size] for first in range(0, len(wanted), size)]
