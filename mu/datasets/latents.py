"""Latents and prompt embeddings, computed once and kept on disk.

What is kept of an image are the moments of its posterior, so that every epoch can draw its own sample. An image is
encoded alone, not in a batch: its moments then depend on the image and the weights and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from mu.atomic import write_atomically
from mu.datasets.images import load_image
from mu.datasets.index import DataError, Row, raise_problems
from mu.ldm.checkpoint import fingerprint
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.verbosity import bars_off

_FORMAT = "1"
_log = logging.getLogger(__name__)


class LatentCache:
    """Posterior moments of images and embeddings of prompts, under `folder`.

    One file holds the images of one folder (a style and an object), and each image is checked by the sha256 of its
    file: an image that was replaced is encoded again. Weights and image size are part of the path:
    `<folder>/<first stage's fingerprint>-<size>px/<Style>/<Object>.safetensors` and
    `<folder>/prompts-<text encoder's fingerprint>.safetensors`.

    Args:
        model: in eval mode; its device and dtype do the work, results are fp32 on the CPU.
        folder: where the files are kept; made when needed.
        image_size: side in pixels to which images are brought before they are encoded.
    """

    def __init__(self, model: LatentDiffusion, folder: Path | str, *, image_size: int) -> None:
        if model.training:
            raise DataError("images are encoded by a model in eval mode: call model.eval() first.")
        self.model = model
        self.image_size = image_size
        self._shape = tuple(model.latent_shape(image_size))
        self._encoder = _part_fingerprint(model, "first_stage_model.")
        self._images = Path(folder) / f"{_short(self._encoder)}-{image_size}px"
        self._text_encoder = _part_fingerprint(model, "cond_stage_model.") if _has_text_encoder(model) else ""
        self._prompts = Path(folder) / f"prompts-{_short(self._text_encoder)}.safetensors"

    @torch.no_grad()
    def moments(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """mean and logvar, each (N, C, h, w) fp32 on the CPU, unscaled, in the order of `rows`.

        Raises:
            DataError: images that are missing, unreadable or too small (all of them in one message), or whose
                moments contain NaN or Inf.
        """
        if not rows:
            raise DataError("there are no images to encode.")
        hashes, problems = _hash_files(rows)
        groups: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row.relative.rpartition("/")[0], []).append(place)

        kept = {group: self._read_group(group) for group in groups}
        todo = {}
        for group, places in groups.items():
            known = kept[group]
            new = [place for place in places if rows[place].relative not in known]
            stale = [
                place
                for place in places
                if rows[place].relative in known and known[rows[place].relative][0] != hashes.get(place)
            ]
            if stale:
                first = rows[stale[0]].image
                _log.info("%d images changed since their latents were kept (%s ...)", len(stale), first)
            if new or stale:
                todo[group] = [place for place in sorted(new + stale) if place in hashes]
        self._encode(rows, hashes, todo, kept=kept, problems=problems)

        moments = [kept[group][rows[place].relative] for group, place in _in_order(groups)]
        means, logvars = [mean for _, mean, _ in moments], [logvar for _, _, logvar in moments]
        return torch.stack(means), torch.stack(logvars)

    @torch.no_grad()
    def contexts(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Embedding (L, D) fp32 on the CPU of every distinct prompt; each is embedded once, and alone.

        Raises:
            DataError: the model has no text encoder, or an embedding contains NaN or Inf.
        """
        wanted = list(dict.fromkeys(prompts))
        if not self._text_encoder:
            raise DataError(
                "this model has no text encoder (cond_stage_config: __is_unconditional__); unlearning a concept "
                "needs one, because the concept is named by prompts."
            )
        kept = self._read_prompts()
        new = [prompt for prompt in wanted if prompt not in kept]
        for prompt in tqdm(new, desc="embedding prompts", unit="prompt", disable=bars_off(), leave=False):
            kept[prompt] = self.model.embed([prompt])[0].float().cpu().contiguous()
            if not torch.isfinite(kept[prompt]).all():
                raise DataError(f"the embedding of the prompt {prompt!r} contains NaN or Inf.")
        if new:
            names = list(kept)
            tensors = {str(number): kept[name] for number, name in enumerate(names)}
            metadata = {"format": _FORMAT, "text_encoder": self._text_encoder, "prompts": json.dumps(names)}
            write_atomically(self._prompts, save(tensors, metadata))
        return {prompt: kept[prompt] for prompt in wanted}

    def _encode(
        self,
        rows: Sequence[Row],
        hashes: dict[int, str],
        todo: dict[str, list[int]],
        *,
        kept: dict[str, dict[str, tuple[str, Tensor, Tensor]]],
        problems: list[str],
    ) -> None:
        """Encodes the rows at the places in `todo` into `kept`, and writes each group when it is done."""
        count = sum(len(places) for places in todo.values())
        if count:
            _log.info("encoding %d of %d images at %d px", count, len(rows), self.image_size)
        weight = next(self.model.first_stage_model.parameters())
        with tqdm(
            total=count, desc="encoding images", unit="image", disable=bars_off(), leave=False
        ) as progress:
            for group, places in todo.items():
                for place in places:
                    row = rows[place]
                    progress.update()
                    try:
                        image = load_image(row.image, self.image_size)
                    except DataError as error:
                        problems.append(str(error))
                    if problems:  # the rest is only read, so that one message can name every bad image
                        continue
                    mean, logvar = self.model.encode(image[None].to(weight))  # each (1, C, h, w)
                    moments = mean[0].float().cpu().contiguous(), logvar[0].float().cpu().contiguous()
                    if not all(bool(torch.isfinite(moment).all()) for moment in moments):
                        raise DataError(f"{row.image}: the first stage gives it a latent with NaN or Inf.")
                    kept[group][row.relative] = (hashes[place], *moments)
                if not problems:
                    self._write_group(group, kept[group])
        raise_problems(
            problems,
            what="images cannot be used",
            advice="Replace them, or delete them together with their rows.",
        )

    def _path(self, group: str) -> Path:
        return self._images / f"{group or 'images'}.safetensors"

    def _read_group(self, group: str) -> dict[str, tuple[str, Tensor, Tensor]]:
        """What is kept for one folder of images: relative path -> (sha256 of the file, mean, logvar)."""
        path = self._path(group)
        found = _read(path)
        if found is None:
            return {}
        tensors, metadata = found
        hashes = json.loads(metadata.get("images", "{}"))
        whole = (
            metadata.get("format") == _FORMAT
            and metadata.get("first_stage") == self._encoder
            and metadata.get("image_size_px") == str(self.image_size)
            and all(tuple(tensor.shape) == self._shape for tensor in tensors.values())
            and set(tensors) == {f"{kind} {name}" for name in hashes for kind in ("mean", "logvar")}
        )
        if not whole:
            _log.warning("%s was kept for other weights or another size: its images are encoded again", path)
            return {}
        return {name: (hashes[name], tensors[f"mean {name}"], tensors[f"logvar {name}"]) for name in hashes}

    def _write_group(self, group: str, entries: dict[str, tuple[str, Tensor, Tensor]]) -> None:
        metadata = {
            "format": _FORMAT,
            "first_stage": self._encoder,
            "image_size_px": str(self.image_size),
            "images": json.dumps({name: digest for name, (digest, _, _) in entries.items()}),
        }
        tensors = {f"mean {name}": mean for name, (_, mean, _) in entries.items()}
        tensors |= {f"logvar {name}": logvar for name, (_, _, logvar) in entries.items()}
        write_atomically(self._path(group), save(tensors, metadata))

    def _read_prompts(self) -> dict[str, Tensor]:
        found = _read(self._prompts)
        if found is None:
            return {}
        tensors, metadata = found
        names = json.loads(metadata.get("prompts", "[]"))
        if (
            metadata.get("format") != _FORMAT
            or metadata.get("text_encoder") != self._text_encoder
            or set(tensors) != {str(number) for number in range(len(names))}
        ):
            _log.warning("%s was kept for another text encoder: prompts are embedded again", self._prompts)
            return {}
        return {name: tensors[str(number)] for number, name in enumerate(names)}


def _in_order(groups: dict[str, list[int]]) -> list[tuple[str, int]]:
    """(group, place) by place."""
    return sorted(
        ((group, place) for group, places in groups.items() for place in places), key=lambda pair: pair[1]
    )


def _hash_files(rows: Sequence[Row]) -> tuple[dict[int, str], list[str]]:
    """sha256 of each row's file by place, and the files that cannot be read."""
    hashes, problems = {}, []
    for place, row in enumerate(rows):
        try:
            hashes[place] = hashlib.sha256(row.image.read_bytes()).hexdigest()
        except FileNotFoundError:
            problems.append(f"{row.image}: missing")
        except OSError as error:
            problems.append(f"{row.image}: unreadable ({error})")
    return hashes, problems


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a safetensors file; None when there is none, or (said in the log) it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        _log.warning("%s is damaged (%s): what it held is computed again", path, error)
        return None


def _part_fingerprint(model: LatentDiffusion, prefix: str) -> str:
    return fingerprint({name: value for name, value in model.state_dict().items() if name.startswith(prefix)})


def _has_text_encoder(model: LatentDiffusion) -> bool:
    return model.cond_stage_model is not None


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12] or "none"
