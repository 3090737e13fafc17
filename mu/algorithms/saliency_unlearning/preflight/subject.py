"""What a run is about: its model's structure, its checkpoint's layout, its rows; nothing of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mu import ranks
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.config import resolve_path
from mu.datasets.generated_images import folders_like
from mu.datasets.index import ForgetRetain, Row
from mu.datasets.seen_prompts import cut_notes
from mu.devices import device_names, resolve_devices
from mu.ldm import LatentDiffusion, LatentDiffusionParams, load_model
from mu.ldm.checkpoint import check_layout
from mu.ldm.formats import read_checkpoint
from mu.ldm.tensor_file import read_layout
from mu.ldm.text_to_image import sampling_precision
from mu.ldm.unet import UNet
from mu.unlearning.rows import (
    checked_image_size,
    checked_rows,
    retained_places,
    sampled_images,
)

T = TypeVar("T")
_NOT_SAMPLED_YET = "<model>"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """See `Subject.of`."""

    ldm: LatentDiffusion
    """On the meta device, with what loading would note of the file."""
    checkpoint: Path
    description: str
    numel: dict[str, int]
    """UNet-relative name -> entries, of every parameter."""
    processes: int
    """That share the work."""
    device: torch.device
    image_size: int
    rows: ForgetRetain
    """Those that the run reads."""
    notes: tuple[str, ...]
    """What of the input the run does not read."""
    listed: ForgetRetain | None
    """All of them; None where images are sampled, whose folder only the loaded model tells, or something is wrong."""
    images: dict[str, int]
    """See `Plan.images`."""

    @classmethod
    def of(cls, config: MaskConfig | TrainConfig, noting: Callable[[Callable[[], Any]], Any]) -> Subject:
        """Look at what a config names.

        Args:
            noting: calls what it is given, and notes an error and gives None instead of raising it.

        Raises:
            ModelConfigError: the model's YAML cannot be used.
        """
        path = config.checkpoint()
        ldm = load_model(resolve_path(config.model_config_path), device="meta")
        found = noting(lambda: read_checkpoint(path, ldm.params, use_ema=config.use_ema, read=read_layout))
        tensors = None
        if found is not None:
            tensors = noting(lambda: check_layout(ldm, found.tensors, source=path))
            ldm.file_has_ema = found.description.ema
        if tensors is not None:
            own = ldm.state_dict()
            ldm.file_dtypes = {key: tensor.dtype for key, tensor in tensors.items() if key in own}
            ldm.carried = {key: tensor for key, tensor in tensors.items() if key not in own}
        size = noting(lambda: checked_image_size(config.image_size, ldm)) or ldm.image_size
        device = _device(config.devices, noting)
        nothing = ForgetRetain((), ())
        listed = noting(lambda: _listed(config, ldm.params, size, device))
        rows = noting(lambda: _read(config, listed)) if listed is not None else nothing
        numel = {name: parameter.numel() for name, parameter in ldm.unet.named_parameters()}
        sampled = sampled_images(config, size) is not None
        rows = rows or nothing
        missing = sum(not row.image.exists() for row in (*rows.forget, *rows.retain)) if sampled else 0
        processes = max(ranks.started_world_size(), len(device_names(config.devices)))
        return cls(
            ldm=ldm,
            checkpoint=path,
            description=str(found.description) if found is not None else f"{path}: see below",
            numel=numel,
            processes=processes,
            device=device,
            image_size=size,
            rows=rows,
            notes=(*rows.notes, *cut_notes(ldm.params, _prompts(config, rows))),
            listed=None if sampled else listed,
            images={"forget": len(rows.forget), "retain": len(rows.retain), "to_sample": missing},
        )

    @property
    def params(self) -> LatentDiffusionParams:
        return self.ldm.params

    @property
    def unet(self) -> UNet:
        return self.ldm.unet

    @property
    def total(self) -> int:
        """Weights of the UNet."""
        return sum(self.numel.values())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.ldm.latent_shape(self.image_size)


def _device(devices: str, noting: Callable[[Callable[[], Any]], Any]) -> torch.device:
    # resolve_devices says once a process where there is no GPU: let that stand in the log of a run.
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Not this process' own alone: a run whose other processes fail at their start has failed too.
    found = [noting(partial(resolve_devices, name)) for name in device_names(devices)]
    return torch.device(resolve_devices(devices) if all(found) else "cpu")


def _prompts(config: MaskConfig | TrainConfig, rows: ForgetRetain) -> list[str]:
    """All that the text encoder is given."""
    prompts = [row.prompt for row in (*rows.forget, *rows.retain)]
    prompts += [row.substitute_prompt for row in rows.forget if row.substitute_prompt is not None]
    return prompts + list((config.sample_prompts if isinstance(config, TrainConfig) else None) or ())


def _listed(
    config: MaskConfig | TrainConfig, params: LatentDiffusionParams, image_size: int, device: torch.device
) -> ForgetRetain:
    """All rows; the indexes of data sets have looked at the heads of their images.

    Raises:
        DataError: an image is missing or none, or the data set cannot serve this config.
    """
    folder = None
    if (sampled := sampled_images(config, image_size)) is not None:
        settings, kind = sampled
        settings = replace(settings, precision=sampling_precision(settings.precision, device))
        # Which of them is this model's would take its fingerprint: the fullest is taken for it.
        like = folders_like(config.processed_dataset_dir, params, settings, **kind)
        folder = max(
            like, key=lambda path: sum(1 for _ in path.rglob("*.png")), default=Path(_NOT_SAMPLED_YET)
        )
    return checked_rows(config, folder, params)


def _read(config: MaskConfig | TrainConfig, rows: ForgetRetain) -> ForgetRetain:
    """The rows that a run reads.

    Raises:
        DataError: there is nothing to retain.
    """
    retained: tuple[Row, ...] = ()
    if isinstance(config, TrainConfig):
        retained = tuple(rows.retain[place] for place in retained_places(config, rows))
    return ForgetRetain(rows.forget, retained, rows.notes)
