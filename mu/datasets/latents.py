"""Latents and prompt embeddings, computed once and kept on disk.

What is kept of an image are the moments of its posterior, so that every epoch can draw its own sample. An image is
encoded alone, not in a batch: its moments then depend on the image and the weights and on nothing else.

The processes of a run share the work, the main one writes, and all get the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mu import ranks
from mu.bars import bar
from mu.datasets.images import ADVICE, UNUSABLE, load_pixels, read_ahead, to_unit_range
from mu.datasets.index import DataError, Row, raise_problems
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.tensor_file import fingerprint, write_state_dict
from mu.memory import ENCODING_ADVICE, telling

S = TypeVar("S")
T = TypeVar("T")
_Group = dict[str, tuple[str, Tensor, Tensor]]
"""What is kept of one folder of images: relative path -> (sha256 of the file, mean, logvar)."""
_FORMAT = "1"
_TOGETHER = 16
"""So many results of each process are exchanged at once."""
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
            OutOfMemoryError: memory does not suffice for one image.
        """
        if not rows:
            raise DataError("there are no images to encode.")
        hashes, problems = _hash_files(rows)
        kept = {group: self._read_group(group) for group in dict.fromkeys(map(_group, rows))}
        todo = _lacking(rows, hashes, kept)
        self._encode(rows, hashes, todo, kept=kept, problems=problems)

        moments = [kept[_group(row)][row.relative] for row in rows]
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
        known = set(kept).intersection(*ranks.gathered(set(kept)))
        new = [prompt for prompt in wanted if prompt not in known]
        size = _TOGETHER * ranks.world_size()
        with bar("embedding prompts", total=len(new), unit="prompts") as progress:
            for first in range(0, len(new), size):
                prompts = new[first : first + size]
                kept |= zip(prompts, _together(prompts, self._embed, progress), strict=True)
        if new:
            ranks.on_main(partial(self._write_prompts, kept, new))
        return {prompt: kept[prompt] for prompt in wanted}

    def _embed(self, prompt: str) -> Tensor:
        with telling("while embedding a prompt", advice=ENCODING_ADVICE):
            return self.model.embed([prompt])[0].float().cpu().contiguous()  # (L, D)

    def _encode(
        self,
        rows: Sequence[Row],
        hashes: Mapping[int, str],
        todo: Sequence[int],
        *,
        kept: dict[str, _Group],
        problems: dict[int, str],
    ) -> None:
        """Encodes the rows at the places in `todo` into `kept`, and writes each group when it is done."""
        if todo:
            _log.info("encoding %d of %d images at %d px", len(todo), len(rows), self.image_size)
        weight = next(self.model.first_stage_model.parameters())
        pieces = list(_whole_groups(rows, todo))

        def read(place: int) -> Tensor | DataError:
            try:
                return load_pixels(rows[place].image, self.image_size)
            except DataError as error:
                return error

        def encode(place: int) -> tuple[Tensor, Tensor] | None:
            pixels = next(loaded)
            if isinstance(pixels, DataError):
                problems[place] = str(pixels)
            if problems or isinstance(pixels, DataError):
                return None  # the rest is only read, so that one message can name every bad image
            with telling("while encoding an image", advice=ENCODING_ADVICE):
                image = to_unit_range(pixels)  # (3, H, W)
                mean, logvar = self.model.encode(image[None].to(weight))  # each (1, C, h, w)
                return mean[0].float().cpu().contiguous(), logvar[0].float().cpu().contiguous()

        mine = [place for places in pieces for place in ranks.share(places)]
        with (
            closing(read_ahead(mine, read)) as loaded,
            bar("encoding images", total=len(todo), unit="images") as progress,
        ):
            for places in pieces:
                found = _together(places, encode, progress)
                for theirs in ranks.gathered(problems):
                    problems |= theirs
                if problems:
                    continue
                for place, moments in zip(places, found, strict=True):
                    assert moments is not None
                    kept[_group(rows[place])][rows[place].relative] = (hashes[place], *moments)
                ranks.on_main(partial(self._write_groups, [rows[place] for place in places], kept))
        ranks.on_main(
            lambda: raise_problems(
                [problems[place] for place in sorted(problems)],
                what=UNUSABLE,
                advice=ADVICE,
            )
        )

    def _path(self, group: str) -> Path:
        return self._images / f"{group or 'images'}.safetensors"

    def _read_group(self, group: str) -> _Group:
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

    def _write_groups(self, rows: Sequence[Row], kept: Mapping[str, _Group]) -> None:
        for row in rows:
            _, *moments = kept[_group(row)][row.relative]
            if not all(bool(torch.isfinite(moment).all()) for moment in moments):
                raise DataError(f"{row.image}: the first stage gives it a latent with NaN or Inf.")
        for group in dict.fromkeys(map(_group, rows)):
            self._write_group(group, kept[group])

    def _write_group(self, group: str, entries: _Group) -> None:
        metadata = {
            "format": _FORMAT,
            "first_stage": self._encoder,
            "image_size_px": str(self.image_size),
            "images": json.dumps({name: digest for name, (digest, _, _) in entries.items()}),
        }
        tensors = {f"mean {name}": mean for name, (_, mean, _) in entries.items()}
        tensors |= {f"logvar {name}": logvar for name, (_, _, logvar) in entries.items()}
        write_state_dict(tensors, self._path(group), metadata)

    def _write_prompts(self, kept: Mapping[str, Tensor], new: Sequence[str]) -> None:
        for prompt in new:
            if not torch.isfinite(kept[prompt]).all():
                raise DataError(f"the embedding of the prompt {prompt!r} contains NaN or Inf.")
        names = list(kept)
        tensors = {str(number): kept[name] for number, name in enumerate(names)}
        metadata = {"format": _FORMAT, "text_encoder": self._text_encoder, "prompts": json.dumps(names)}
        write_state_dict(tensors, self._prompts, metadata)

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


def _group(row: Row) -> str:
    """The folder of its image, whose moments are in one file."""
    return row.relative.rpartition("/")[0]


def _lacking(rows: Sequence[Row], hashes: Mapping[int, str], kept: Mapping[str, _Group]) -> list[int]:
    """The places of the rows that are to be encoded, those of one group together.

    A file system may show its files to the processes at different moments: what one of them lacks counts for all.
    """
    new, stale = [], []
    for place, digest in hashes.items():
        entry = kept[_group(rows[place])].get(rows[place].relative)
        if entry is None:
            new.append(place)
        elif entry[0] != digest:
            stale.append(place)
    if stale:
        first = rows[stale[0]].image
        _log.info("%d images changed since their latents were kept (%s ...)", len(stale), first)
    lacking: set[int] = set().union(*ranks.gathered(new + stale))
    order = {group: number for number, group in enumerate(kept)}
    return sorted(lacking, key=lambda place: (order[_group(rows[place])], place))


def _whole_groups(rows: Sequence[Row], todo: Sequence[int]) -> Iterator[list[int]]:
    """The places in `todo` in pieces of whole groups, with work for each process; alone, group by group."""
    enough = _TOGETHER * ranks.world_size() if ranks.world_size() > 1 else 1
    piece: list[int] = []
    for _, places in groupby(todo, lambda place: _group(rows[place])):
        piece += places
        if len(piece) >= enough:
            yield piece
            piece = []
    if piece:
        yield piece


def _together(items: Sequence[S], work: Callable[[S], T], progress: Any) -> list[T]:
    """What `work` gives for each item, of which each process does its share."""
    mine = []
    for item in ranks.share(items):
        mine.append(work(item))
        progress.update()
    progress.update(len(items) - len(mine))
    return ranks.together(mine)


def _hash_files(rows: Sequence[Row]) -> tuple[dict[int, str], dict[int, str]]:
    """sha256 of each row's file by place, and what is wrong with those that cannot be read."""
    hashes: dict[int, str] = {}
    problems: dict[int, str] = {}

    def digest(place: int) -> tuple[str | None, str]:
        """The hash, or else what is wrong."""
        image = rows[place].image
        try:
            return hashlib.sha256(image.read_bytes()).hexdigest(), ""
        except FileNotFoundError:
            return None, f"{image}: missing"
        except OSError as error:
            return None, f"{image}: unreadable ({error})"

    mine = ranks.share(range(len(rows)))
    with bar("looking at images", total=len(mine), unit="images") as progress:
        for place, (found, problem) in zip(mine, read_ahead(mine, digest), strict=True):
            progress.update()
            if found is None:
                problems[place] = problem
            else:
                hashes[place] = found
    for their_hashes, their_problems in ranks.gathered((hashes, problems)):
        hashes |= their_hashes
        problems |= their_problems
    return dict(sorted(hashes.items())), problems


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
