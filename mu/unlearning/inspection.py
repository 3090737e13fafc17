"""What a run is about, seen before its model is loaded, and gathered into its plan.

    seen = Inspection(config)                     # the model's structure, the checkpoint's layout, the device
    seen.read_rows(retain=True)                   # the images, of a method that needs some
    names = seen.noting(lambda: names_of(...))    # what is wrong is noted, not raised: a plan names all of it
    return seen.plan("training", weights=..., files=[*seen.output_files(selected)])

Nothing is loaded, sampled or written. Sizes of files are estimates, from names, shapes and types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from mu import ranks
from mu.config import ConfigError, resolve_path
from mu.datasets.generated_images import folders_like
from mu.datasets.images import check_images
from mu.datasets.index import ForgetRetain
from mu.datasets.seen_prompts import cut_notes
from mu.devices import device_names, resolve_devices
from mu.errors import MuError
from mu.ldm import load_model
from mu.ldm.checkpoint import check_layout, check_state_dict, read_checkpoint, tensors_of
from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.patch import base_fingerprint
from mu.ldm.tensor_file import open_state_dict, read_layout
from mu.ldm.text_to_image import sampling_precision
from mu.ldm.unet_dtype import SAVE_DTYPES
from mu.unlearning.checkpoints import find_run_state, run_checkpoint_bytes
from mu.unlearning.config import DataKeys, OutputKeys, RunKeys
from mu.unlearning.find_checkpoint import DIFFUSERS_NAME, PATCH_NAME
from mu.unlearning.image_data import checked_image_size, checked_rows, retained_places, sampled_images
from mu.unlearning.moving import names_of
from mu.unlearning.output import check_save_dtype, original_of
from mu.unlearning.plan import Plan, PlannedFiles, disk_problems
from mu.unlearning.training_config import TrainingKeys

T = TypeVar("T")

_TEXTS = "config.yaml, log.txt, metrics"
_TEXTS_BYTES = 500_000
_TOKENIZER_BYTES = 1_500_000  # CLIP's vocabulary, in a diffusers folder
_PICTURED_PROMPTS = 8
SLOW_ON_A_CPU = 300_000_000
"""Weights of a UNet whose pictures take a CPU minutes each."""
_CAPTION_TOKENS = 77
_HEADER_BYTES, _PATCH_HEADER_BYTES = 150, 600
"""What the head of a file takes for a tensor: name, type and place; in a patch, two of these and two SHA-256."""


class Inspection:
    """What a run is about, seen without loading it: structure, layout of the checkpoint, device, images.

    Args:
        config: of the run.

    Raises:
        ModelConfigError: the model's YAML cannot be used; all else that is wrong is noted in `problems`.
    """

    def __init__(self, config: RunKeys) -> None:
        self.config = config
        self.problems: list[MuError] = []
        self.warnings: list[str] = list(config.doubts())
        self.checkpoint = config.checkpoint()
        self.ldm = load_model(resolve_path(config.model_config_path), device="meta")
        """On the meta device, with what loading would note of the file."""
        self.description = f"{self.checkpoint}: see below"
        self._read_layout()
        self.unet = self.ldm.unet
        self.numel = {name: parameter.numel() for name, parameter in self.unet.named_parameters()}
        """UNet-relative name -> entries, of every parameter."""
        self.image_size = (
            self.noting(lambda: checked_image_size(config.image_size, self.ldm)) or self.ldm.image_size
        )
        self.device = self._find_device()
        self.listed: ForgetRetain | None = None
        """All rows; None where images are sampled, whose folder only the loaded model tells, or something is wrong."""
        self.rows = ForgetRetain((), ())
        """Those that the run reads."""
        self.prompts = list(config.sample_prompts or ()) if isinstance(config, OutputKeys) else []
        """All that the text encoder is given; a method adds its own."""
        self._to_sample = 0

    def noting(self, check: Callable[[], T]) -> T | None:
        """What `check` gives; or None, and its error is noted."""
        try:
            return check()
        except MuError as error:
            self.problems.append(error)
            return None

    def _read_layout(self) -> None:
        """Compare names, shapes and types of the checkpoint with the model's, and note them in it."""
        ldm, path, use_ema = self.ldm, self.checkpoint, self.config.use_ema
        found = self.noting(lambda: read_checkpoint(path, ldm.params, use_ema=use_ema, read=read_layout))
        if found is None:
            return
        self.description = str(found.description)
        ldm.file_has_ema = found.description.ema
        tensors = self.noting(lambda: check_layout(ldm, found.tensors, source=path))
        if tensors is not None:
            own = ldm.state_dict()
            ldm.file_dtypes = {key: tensor.dtype for key, tensor in tensors.items() if key in own}
            ldm.carried = {key: tensor for key, tensor in tensors.items() if key not in own}

    def _find_device(self) -> torch.device:
        devices = self.config.devices
        # resolve_devices says once a process where there is no GPU: let that stand in the log of a run.
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Not this process' own alone: a run whose other processes fail at their start has failed too.
        found = [self.noting(partial(resolve_devices, name)) for name in device_names(devices)]
        return torch.device(resolve_devices(devices) if all(found) else "cpu")

    # ---- images

    def read_rows(self, *, retain: bool) -> None:
        """List the images that the config means, and look at their heads.

        Args:
            retain: those to retain too, as many as a training run reads.
        """
        config = self.config
        assert isinstance(config, DataKeys)
        sampled = sampled_images(config, self.image_size)
        folder = None
        if sampled is not None:
            settings, kind = sampled
            precision = sampling_precision(settings.precision, self.device)
            settings = replace(settings, precision=precision)
            # Which of them is this model's would take its fingerprint: the fullest is taken for it.
            like = folders_like(config.processed_dataset_dir, self.ldm.params, settings, **kind)
            folder = max(like, key=_pictures_in, default=Path("<model>"))
        listed = self.noting(lambda: checked_rows(config, folder, self.ldm.params))
        places = self.noting(lambda: retained_places(config, listed)) if listed and retain else ()
        if listed is not None and places is not None:
            self.rows = replace(listed, retain=tuple(listed.retain[place] for place in places))
        if sampled is None:
            self.listed = listed
        else:
            self._to_sample = sum(not row.image.exists() for row in (*self.rows.forget, *self.rows.retain))
        self.warnings += self.rows.notes
        self.prompts += [row.prompt for row in (*self.rows.forget, *self.rows.retain)]
        self.prompts += [
            row.substitute_prompt for row in self.rows.forget if row.substitute_prompt is not None
        ]

    # ---- files

    def cache_files(self) -> Iterator[PlannedFiles]:
        """Sampled images, latents and embeddings: made where they are not there yet."""
        assert isinstance(self.config, DataKeys)
        planned = partial(
            PlannedFiles,
            folder=Path(self.config.processed_dataset_dir),
            key="processed_dataset_dir",
            certain=False,
        )
        params, images = self.ldm.params, len(self.rows.forget) + len(self.rows.retain)
        if self._to_sample:
            yield planned(what="generated*/*.png", bytes=self._to_sample * _png_bytes(self.image_size))
        if images:
            channels, height, width = self.ldm.latent_shape(self.image_size)
            moments = 2 * 4 * channels * height * width  # mean and logvar in fp32, and the image's SHA-256
            yield planned(what="latents/*.safetensors", bytes=images * (moments + 3 * _HEADER_BYTES))
        if params.cond_stage is not None and self.prompts:
            embedding = 4 * _CAPTION_TOKENS * params.cond_stage.hidden_size
            yield planned(
                what="latents/prompts-*.safetensors", bytes=(1 + len(set(self.prompts))) * embedding
            )

    def output_files(self, selected: Mapping[str, int], *, pictured: int = 2) -> Iterator[PlannedFiles]:
        """The unlearned checkpoint, its patch and its pictures.

        Args:
            selected: UNet-relative name -> entries that may move.
            pictured: how often pictures are taken: before, after, ...
        """
        config, ldm = self.config, self.ldm
        assert isinstance(config, OutputKeys)
        planned = partial(PlannedFiles, folder=Path(config.output_dir), key="output_dir")
        # 1. The checkpoint: the source's tensors, the UNet in the dtype that save_dtype names.
        diffusers = config.output_format == "diffusers"
        name = DIFFUSERS_NAME if diffusers else f"model.{config.output_format}"
        tensors = tensors_of(ldm, Path(config.output_dir) / name, unet_dtype=SAVE_DTYPES[config.save_dtype])
        sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
        copies = 2 if ldm.file_has_ema else 1
        unet = sum(size for key, size in sizes.items() if key.startswith(UNET_PREFIX))
        head = _HEADER_BYTES * len(sizes)
        more = _TOKENIZER_BYTES if diffusers else (copies - 1) * unet
        yield planned(what=name, bytes=head + sum(sizes.values()) + more)
        # 2. The patch: the values that may move, and where they lie, as a bit of each weight or as numbers.
        if config.patch:
            patch = sum(
                count * sizes[UNET_PREFIX + key] // self.numel[key]
                + min(self.numel[key] // 8, 4 * count)
                + _PATCH_HEADER_BYTES
                for key, count in selected.items()
            )
            yield planned(what=PATCH_NAME, bytes=copies * patch, certain=False)
        # 3. What is small.
        prompts = _PICTURED_PROMPTS if config.sample_prompts is None else len(config.sample_prompts)
        if cells := prompts * len(config.sample_seeds) * pictured:
            side = max(64, min(256, self.image_size))
            yield planned(what="pictures/*.png", bytes=cells * _png_bytes(side), certain=False)
            if self.device.type == "cpu" and sum(self.numel.values()) >= SLOW_ON_A_CPU:
                self.warnings.append(
                    "sample_prompts: on a CPU this model takes minutes for each picture before and after; "
                    "[] leaves the pictures out"
                )
        report = ", report.html" if isinstance(config, TrainingKeys) and config.report else ""
        yield planned(what=_TEXTS + report, bytes=_TEXTS_BYTES, certain=False)

    def run_checkpoints(self, selected: Mapping[str, int], *, steps: int) -> Iterator[PlannedFiles]:
        """Checkpoints of a training run, of 12 bytes for each weight that moves: those that are kept, and one more."""
        config = self.config
        assert isinstance(config, TrainingKeys)
        due = steps // config.checkpoint_every_steps if config.checkpoint_every_steps is not None else 0
        if not due and config.checkpoint_every_minutes is None:
            return
        one = 12 * sum(selected.values())  # the value and Adam's two moments, in fp32
        kept = min(config.keep_checkpoints, due) if due else config.keep_checkpoints
        there = self.noting(lambda: run_checkpoint_bytes(config)) or 0  # of the run that this one resumes
        planned = partial(PlannedFiles, folder=Path(config.output_dir), key="keep_checkpoints")
        yield planned(
            what="checkpoints/step-*.safetensors",
            bytes=max(0, kept * one - there),
            certain=bool(due) and config.resume is None,
        )
        if due > kept or not due:  # while one is written, as many as are kept are still there
            yield planned(what="checkpoints/.step-*.tmp", bytes=one, certain=False)

    # ---- the plan

    def unet_fingerprint(self) -> str:
        """SHA-256 of the UNet's weights in the checkpoint, which are read for it."""
        config, params = self.config, self.ldm.params
        found = read_checkpoint(self.checkpoint, params, use_ema=config.use_ema, read=open_state_dict)
        return base_fingerprint(found.tensors)

    def training_plan(self, *, steps: int) -> Plan:
        """The plan of a training run that moves all weights of its train method; with rows, see `read_rows` first."""
        config = self.config
        assert isinstance(config, TrainingKeys)
        names = self.noting(lambda: names_of(self.unet, config.train_method)) or []
        selected = {name: self.numel[name] for name in names}
        pictured = 2 + (steps // config.sample_every_steps if config.sample_every_steps is not None else 0)
        return self.plan(
            "training",
            steps=steps,
            weights={"total": sum(self.numel.values()), "selected": sum(selected.values())},
            files=[
                *self.output_files(selected, pictured=pictured),
                *self.run_checkpoints(selected, steps=steps),
                *(self.cache_files() if isinstance(config, DataKeys) else ()),
            ],
        )

    def plan(
        self,
        stage: str,
        *,
        weights: Mapping[str, int],
        files: Sequence[PlannedFiles],
        steps: int = 0,
        inputs: Mapping[str, Path] | None = None,
        unet_fingerprint: str | None = None,
    ) -> Plan:
        """All of it as a Plan, see there, once it is known whether the files fit."""
        lacking, warnings = disk_problems(files)
        images = {"forget": len(self.rows.forget), "retain": len(self.rows.retain)}
        return Plan(
            stage=stage,
            device=str(self.device),
            processes=max(ranks.started_world_size(), len(device_names(self.config.devices))),
            checkpoint=self.description,
            images={**images, "to_sample": self._to_sample} if self.rows.forget else {},
            steps=steps,
            weights=weights,
            files=files,
            inputs=inputs or {},
            problems=[*self.problems, *(ConfigError([message]) for message in lacking)],
            warnings=[*self.warnings, *cut_notes(self.ldm.params, self.prompts), *warnings],
            rows=self.listed,
            unet_fingerprint=unet_fingerprint,
            examine=self._problems_in_values,
        )

    def _problems_in_values(self) -> list[MuError]:
        """What a run would refuse when it reads all weights, all pixels and the state that it goes on from."""
        config, params, path = self.config, self.ldm.params, self.checkpoint
        before = len(self.problems)

        def weights() -> None:
            found = read_checkpoint(path, params, use_ema=config.use_ema)
            check_state_dict(self.ldm, found.tensors, source=path)
            if isinstance(config, OutputKeys):
                check_save_dtype(original_of(path, params, use_ema=config.use_ema), config.save_dtype)

        def pixels() -> None:
            rows = (*self.rows.forget, *self.rows.retain)
            check_images([row.image for row in rows if row.image.exists()], self.image_size)

        self.noting(weights)
        self.noting(pixels)
        if isinstance(config, TrainingKeys) and config.resume is not None:
            self.noting(lambda: find_run_state(config))
        return self.problems[before:]


def _pictures_in(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.png"))


def _png_bytes(side_px: int) -> int:
    """Of photographs and paintings, about half of their pixels' three bytes."""
    return 3 * side_px * side_px // 2
