"""Saliency unlearning (Fan et al. 2024) from a config to the files of a run: the mask, and the training under it.

MaskingAlgorithm(saliency_unlearning_generate_mask_emoji_canvas, template_name="Noto").run()
SaliencyUnlearningAlgorithm(saliency_unlearning_train_emoji_canvas, template_name="Noto").run()
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mu import ranks
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.mask_file import (
    check_fingerprint,
    check_shapes,
    load_mask_metadata,
    marks_of,
)
from mu.algorithms.saliency_unlearning.masking import (
    MaskError,
    MaskLossError,
    accumulate_within_memory,
    count_marked,
    load_mask,
    random_mask,
    save_mask,
    threshold_masks,
)
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.trainer import objective_of
from mu.algorithms.saliency_unlearning.utils import find_mask, layer_groups, unet_fingerprint
from mu.bars import bar
from mu.config import ConfigError
from mu.datasets.index import concept_label
from mu.ldm import LatentDiffusion
from mu.unlearning.batches import ForgetBatch
from mu.unlearning.compute import choose, computing
from mu.unlearning.config import model_of
from mu.unlearning.image_data import training_steps
from mu.unlearning.inspection import Inspection
from mu.unlearning.method import Loaded, Method, TrainingMethod
from mu.unlearning.moving import MovingModel, names_of
from mu.unlearning.plan import Plan, PlannedFiles
from mu.unlearning.runs import Result, open_run, save_result
from mu.unlearning.trainer import Objective

__all__ = ["MaskingAlgorithm", "SaliencyUnlearnAlgorithm", "SaliencyUnlearningAlgorithm"]

_MASK_HEADER_BYTES = 160
"""What the head of a mask takes for a tensor: name, place and shape."""


class MaskingAlgorithm(Method[MaskConfig]):
    """Stage 1: which weights of the UNet are salient for a concept; one mask for each threshold, from one pass."""

    config_class = MaskConfig

    def make_plan(self) -> Plan:
        config, seen = self.config, Inspection(self.config)
        seen.read_rows(retain=False)
        images = max(1, len(seen.rows.forget)) * config.draws_per_image

        # Whether a threshold keeps anything.
        names = seen.noting(lambda: names_of(seen.unet, config.train_method)) or []
        total, in_method = sum(seen.numel.values()), sum(seen.numel[name] for name in names)
        ranked = in_method if config.pool == "train_method" else total
        for threshold in config.thresholds:
            if not int(threshold * ranked):
                seen.problems.append(
                    ConfigError([f"threshold: {threshold} keeps none of {ranked:,} weights"])
                )

        masks = PlannedFiles(  # a bit a weight
            what="mask_*.safetensors",
            folder=Path(config.output_dir),
            key="output_dir",
            bytes=len(config.thresholds) * (total // 8 + _MASK_HEADER_BYTES * len(seen.numel)),
        )
        return seen.plan(
            "mask",
            steps=math.ceil(images / config.batch_size),
            weights={
                "total": total,
                "train_method": in_method,
                "selected": int(max(config.thresholds) * ranked),
            },
            files=[masks, *seen.cache_files()],
        )

    def run_here(self) -> Result:
        """Sum the gradients, mark the most salient weights, and write.

        Returns:
            `run`, the run's folder; `masks`, threshold -> path; `kept`, threshold -> number of weights; `total`;
            `images`; `seconds`.

        Raises:
            MaskError: a gradient is missing or not finite; names the images.
        """
        config, started = self.config, time.monotonic()

        # 1. Plan: what stops the run is found before anything is made.
        plan, _ = self.required_plan()
        with open_run(config) as folder:
            if plan is not None:
                plan.say_warnings(folder.logger)

            # 2. Load the model; sample and encode what is missing, by the model as it was loaded
            model = model_of(config)
            data = SaliencyUnlearnDataHandler(config, model, rows=plan.rows if plan is not None else None)
            data.mask_batches()

            # 3. Saliency: the absolute value of the summed gradients
            compute = choose(
                config,
                model,
                images=ranks.largest_share(config.batch_size) * (2 if config.c_guidance else 1),
                latent_shape=model.latent_shape(data.image_size),
                reserved=4 * sum(parameter.numel() for parameter in model.unet.parameters()),
            )

            def batches() -> Iterable[ForgetBatch]:
                found, count = data.mask_batches(), data.mask_batch_count
                with bar("summing gradients", total=count, unit="batches") as progress:
                    for batch in found:
                        yield batch
                        progress.update()

            try:
                with computing(model, compute):
                    saliency = accumulate_within_memory(
                        model,
                        batches,
                        c_guidance=config.c_guidance,
                        batch_size=config.batch_size,
                        compute=compute,
                    )
            except MaskLossError as error:
                images = ", ".join(data.mask_images(error.batch))
                raise MaskError(f"{error}; its images: {images}") from error

            # 4. Masks: the most salient weights, exactly as many as each threshold says
            pool = names_of(model.unet, config.train_method) if config.pool == "train_method" else None
            masks = threshold_masks(saliency, config.thresholds, pool=pool)
            del saliency  # 4 bytes a weight

            # 5. Write
            described = {
                "concept": concept_label(config.concepts),
                "template": config.template,
                "template_name": config.concepts[0] if len(config.concepts) == 1 else list(config.concepts),
                "pool": config.pool,
                "train_method": config.train_method if pool is not None else "full",
                "model_fingerprint": unet_fingerprint(model),
                "c_guidance": config.c_guidance,
                "images": len(data.rows.forget),
                "draws_per_image": config.draws_per_image,
                "seed": config.seed,
            }

            def write() -> Result:
                paths, kept = {}, {}
                for threshold, mask in zip(config.thresholds, masks, strict=True):
                    # All digits: thresholds that differ must not share a file.
                    path = folder.path / f"mask_{repr(threshold).removesuffix('.0')}.safetensors"
                    own = {"threshold": threshold, "kept_fraction": layer_groups(mask)}
                    save_mask(mask, path, {**described, **own})
                    paths[threshold], kept[threshold] = path, sum(map(count_marked, mask.values()))
                    folder.logger.info("threshold %g keeps %d weights: %s", threshold, kept[threshold], path)
                result = {
                    "run": folder.path,
                    "masks": paths,
                    "kept": kept,
                    "total": sum(marked.numel() for marked in masks[0].values()),
                    "images": len(data.rows.forget),
                    "seconds": time.monotonic() - started,
                }
                save_result(folder, result)
                return result

            return ranks.on_main(write)


class SaliencyUnlearningAlgorithm(TrainingMethod[TrainConfig]):
    """Stage 2: make the model forget the concept, moving only the weights in its mask."""

    config_class = TrainConfig

    def make_plan(self) -> Plan:
        config, seen = self.config, Inspection(self.config)
        seen.read_rows(retain=True)
        steps = training_steps(config, seen.rows)

        # The mask: found, of this structure, marks something that may move, made from these very weights.
        names = seen.noting(lambda: names_of(seen.unet, config.train_method)) or []
        mask = seen.noting(lambda: find_mask(config)) if config.masking == "saliency" else None
        selected: dict[str, int] = {}
        if mask is not None or config.masking != "saliency":
            selected = seen.noting(lambda: _selected(config, seen, names, mask)) or {}
        fingerprint = None
        if mask is not None and not seen.problems:
            fingerprint = seen.noting(lambda: _checked_fingerprint(seen, mask))

        pictured = 2 + (steps // config.sample_every_steps if config.sample_every_steps is not None else 0)
        return seen.plan(
            "training",
            steps=steps,
            weights={
                "total": sum(seen.numel.values()),
                "train_method": sum(seen.numel[name] for name in names),
                "selected": sum(selected.values()),
            },
            files=[
                *seen.output_files(selected, pictured=pictured),
                *seen.run_checkpoints(selected, steps=steps),
                *seen.cache_files(),
            ],
            inputs={"mask_path": mask} if mask is not None else {},
            unet_fingerprint=fingerprint,
        )

    def moving(self, ldm: LatentDiffusion, inputs: Mapping[str, Path]) -> MovingModel:
        """The weights in train method AND mask.

        The mask stays in main memory: on a GPU it would take a byte a weight for the whole run. The optimizer takes its
        places over tensor by tensor.
        """
        config, mask = self.config, None
        if (
            config.masking == "saliency"
        ):  # whether it was made from these very weights, the plan has found out
            mask = load_mask(inputs["mask_path"])
        elif config.masking == "random":
            parameters: dict[str, Tensor] = dict(ldm.unet.named_parameters())
            mask = random_mask(parameters, config.random_fraction, seed=config.seed)
        return SaliencyUnlearnModel(ldm, config.train_method, mask)

    def data(self, loaded: Loaded, plan: Plan | None) -> SaliencyUnlearnDataHandler:
        rows = plan.rows if plan is not None else None
        return SaliencyUnlearnDataHandler(self.config, loaded.ldm, rows=rows)

    def objective(self, model: MovingModel) -> Objective:
        config = self.config
        return objective_of(
            config.objective,
            model,
            alpha=config.alpha,
            target=config.target,
            retain_target=config.retain_target,
        )

    def described(self) -> dict[str, Any]:
        return {**super().described(), "masking": self.config.masking}

    def told(self, inputs: Mapping[str, Path]) -> Result:
        """`mask`, its path; None without."""
        return {"mask": inputs.get("mask_path")}


SaliencyUnlearnAlgorithm = SaliencyUnlearningAlgorithm


def _checked_fingerprint(seen: Inspection, mask: Path) -> str | None:
    """The UNet's, once compared with the one that the mask was made from; None where the mask tells none."""
    metadata = load_mask_metadata(mask)
    if "model_fingerprint" not in metadata:
        return None
    fingerprint = seen.unet_fingerprint()
    check_fingerprint(metadata, fingerprint)
    return fingerprint


def _selected(config: TrainConfig, seen: Inspection, names: list[str], mask: Path | None) -> dict[str, int]:
    """Name -> entries that will move, of tensors that have any.

    Raises:
        MaskError: the mask is damaged, is of another model, or marks nothing that may move.
    """
    if mask is not None:
        shapes, marks = marks_of(mask)
        check_shapes(shapes, seen.unet)
    elif config.masking == "random":
        # The draw is over all of them together: this is what a tensor has on average.
        marks = {name: math.ceil(config.random_fraction * count) for name, count in seen.numel.items()}
    else:
        marks = seen.numel
    selected = {name: marks[name] for name in names if marks[name]}
    if not selected and names:
        raise MaskError(
            f"mask_path: the mask marks none of the weights that train_method {config.train_method!r} moves"
        )
    return selected
