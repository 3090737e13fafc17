"""CLIP score: how well images fit their prompts (Hessel et al., 2021, arXiv 2104.08718), by open_clip.

Told is 100 max(cos, 0) of an image's and its prompt's embedding, as torchmetrics does; the paper's own factor is 2.5.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from mu.bars import bar
from mu.datasets.images import read_ahead
from mu.datasets.seen_prompts import cut_at
from mu.errors import MuError, first_line
from mu.evaluation.asked_images import AskedImage
from mu.memory import SCORING_ADVICE, AtOnce

_log = logging.getLogger(__name__)


class ClipError(MuError, ValueError):
    """A CLIP model that cannot be had."""


class ClipScorer:
    """A model of open_clip.

    Args:
        model_name: as open_clip calls it, such as ViT-L-14.
        weights: a file, or a tag of open_clip such as openai, whose file is downloaded once into its cache.

    Raises:
        ClipError: no such model or tag, no file and no network, or weights of another model.
    """

    def __init__(self, model_name: str, weights: str, device: str = "cpu") -> None:
        import open_clip  # late: it imports torchvision

        if model_name not in open_clip.list_models():
            raise ClipError(
                f"clip_model: open_clip has no {model_name!r}; it has: {', '.join(open_clip.list_models()[:20])}, ..."
            )
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if not Path(weights).is_file() and weights not in tags:
            raise ClipError(
                f"clip_weights: {weights!r} is neither a file nor one of open_clip's weights for {model_name}: "
                f"{', '.join(tags) or 'none'}"
            )
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                model_name, pretrained=weights, device=device
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise ClipError(
                f"clip_weights: the weights {weights!r} of {model_name} cannot be had ({reason}). Without a network, "
                "download them elsewhere and give the file's path"
            ) from error
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenizer = open_clip.get_tokenizer(model_name)
        # Of CLIP's own tokens alone it is known how many a prompt has.
        own = isinstance(self.tokenizer, open_clip.SimpleTokenizer)
        self._max_length: int | None = self.tokenizer.context_length if own else None
        self.device = device
        self.name = f"{model_name}, {os.path.basename(weights)}"

    @torch.no_grad()
    def scores(self, images: Sequence[AskedImage], *, batch_size: int) -> list[float]:
        """100 max(cos, 0) of each image and its prompt, in order."""
        prompts = sorted({image.prompt for image in images})
        if self._max_length is not None:
            for note in cut_at(self._max_length, prompts):
                _log.warning("CLIP score: %s", note)
            self._max_length = None  # said once, not of each model's images
        texts: dict[str, torch.Tensor] = {}
        embedding = AtOnce("prompt", advice=SCORING_ADVICE)
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            embedded = torch.cat(list(embedding.pieces(part, self._said)))  # (B, D)
            texts.update(zip(part, embedded, strict=True))
        found: list[float] = []
        seeing = AtOnce("image", advice=SCORING_ADVICE)
        with (
            closing(read_ahead([image.path for image in images], _picture)) as pictures,
            bar("CLIP score", total=len(images), unit="images") as progress,
        ):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                pixels = [self.preprocess(next(pictures)) for _ in batch]
                seen = torch.cat(list(seeing.pieces(pixels, self._seen)))  # (B, D)
                said = torch.stack([texts[image.prompt] for image in batch])  # (B, D)
                found += (100 * (seen * said).sum(dim=-1)).clamp(min=0).tolist()
                progress.update(len(batch))
        return found

    def _said(self, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(list(prompts)).to(self.device)
        embedded: torch.Tensor = self.model.encode_text(tokens, normalize=True)  # (B, D)
        return embedded

    def _seen(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        images = torch.stack(list(pixels)).to(self.device)
        embedded: torch.Tensor = self.model.encode_image(images, normalize=True)  # (B, D)
        return embedded


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")
