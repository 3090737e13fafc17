"""Text to image: prompts and noise in, images out, in pieces that memory holds.

The UNet takes a batch of images, or halves of it where memory runs out. Each image is decoded by itself, since decoding
takes far more memory than the UNet: its pixels then follow from its latent alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mu.errors import MuError
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.sampler import sample_ddim
from mu.memory import SAMPLING_ADVICE, AtOnce, telling

PRECISIONS = ("auto", "fp32", "bf16")
"""Arithmetic of sampling: bf16 is autocast to bf16, auto see `sampling_precision`."""
_NOTE = "; such images may differ by rounding from those of a whole batch"


class SamplingError(MuError, ArithmeticError):
    """The model gave an image that is none."""


def sampling_precision(precision: str, device: torch.device | str) -> str:
    """One of `PRECISIONS` without auto, which is bf16 on a GPU that computes in bf16, else fp32."""
    if precision != "auto":
        return precision
    cuda = torch.device(device).type == "cuda"
    return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


class TextToImage:
    """Samples images with DDIM from a model; what memory did not hold once is not tried again.

    Args:
        model: in eval mode, with a text encoder.
        steps: DDIM steps.
        shape: (C, h, w) of a latent.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        precision: one of `PRECISIONS`; latents stay fp32 between the steps, only the networks compute in bf16.

    Attributes:
        done: is told how much of an image, or of several, has been done since it was last told; may be set.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        *,
        steps: int,
        shape: tuple[int, int, int],
        eta: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        self.model = model
        self.steps = steps
        self.shape = shape
        self.eta = eta
        self.half = sampling_precision(precision, model.device) == "bf16"
        self.done: Callable[[float], object] | None = None
        self._sampling = AtOnce("image", advice=SAMPLING_ADVICE, note=_NOTE)

    @torch.no_grad()
    def images(
        self,
        prompts: Sequence[str],
        *,
        guidance_scale: float,
        noise: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        context: Tensor | None = None,
        first_step: int = 0,
    ) -> Iterator[Tensor]:
        """One image for each prompt, of one batch.

        Args:
            guidance_scale: of classifier-free guidance; 1 is none.
            noise: (B, C, h, w) from which the images begin; without it, it is drawn from the seeds.
            seeds: one for each image, for what is drawn; needed without `noise`, and where eta is above 0.
            context: (B, L, D) that is taken in place of the prompts' embeddings.
            first_step: see `sample_ddim`; `noise` must be as noisy as that step's timestep.

        Yields:
            (3, H, W) fp32, about [-1, 1], on the CPU, in the order of the prompts.

        Raises:
            OutOfMemoryError: memory does not suffice for one image.
        """

        steps = self.steps - first_step
        told = 0.0  # images: of a batch that is begun again with less at once, no step is told twice

        def tell(upto: float) -> None:
            nonlocal told
            if self.done is not None and upto > told:
                self.done(upto - told)
                told = upto

        def sample(places: Sequence[int]) -> Tensor:
            part = len(places) / (steps + 1)  # the last is for decoding
            if context is None:
                contexts = self.model.embed([prompts[place] for place in places])  # (B, L, D)
            else:
                contexts = context[list(places)]  # (B, L, D)
            uncond_context = self.model.embed([""])  # (1, L, D)
            with self._arithmetic():
                return sample_ddim(
                    self.model,
                    contexts,
                    shape=self.shape,
                    steps=self.steps,
                    guidance_scale=guidance_scale,
                    uncond_context=uncond_context,
                    eta=self.eta,
                    initial_noise=None if noise is None else noise[list(places)].to(contexts),
                    generator=None
                    if seeds is None
                    else [torch.Generator().manual_seed(seeds[place]) for place in places],
                    first_step=first_step,
                    after_step=lambda step: tell(places[0] + step * part),
                )  # (B, C, h, w)

        first = 0
        for latents in self._sampling.pieces(range(len(prompts)), sample):
            steps_done = steps * len(latents) / (steps + 1)
            for number, latent in enumerate(latents, start=1):
                with telling("while decoding an image", advice=SAMPLING_ADVICE), self._arithmetic():
                    image = self.model.decode(latent[None])[0].float().cpu()  # (3, H, W)
                tell(first + steps_done + number / (steps + 1))
                yield image
            first += len(latents)

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.half)


def sample_images(
    model: LatentDiffusion,
    pairs: Sequence[tuple[str, int]],
    *,
    steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    batch_size: int = 8,
    image_size: int | None = None,
    precision: str = "fp32",
    done: Callable[[float], object] | None = None,
) -> Iterator[Tensor]:
    """One image for each (prompt, seed). A seed belongs to its image: the batch it is in does not matter.

    Args:
        precision: "fp32", "bf16" (autocast; latents stay fp32 between the steps) or "auto", see `sampling_precision`.
        done: see `TextToImage`.

    Yields:
        (3, H, W), about [-1, 1], on the CPU.

    Raises:
        OutOfMemoryError: memory does not suffice for one image at a time.
    """
    sampler = TextToImage(
        model,
        steps=steps,
        shape=model.latent_shape(image_size),
        eta=eta,
        precision=precision,
    )
    sampler.done = done
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        prompts, seeds = zip(*batch, strict=True)
        yield from sampler.images(prompts, guidance_scale=guidance_scale, seeds=seeds)
