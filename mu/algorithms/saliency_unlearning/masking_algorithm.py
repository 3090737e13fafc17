"""Stage 1 of saliency unlearning (Fan et al. 2024), from a config to the files of a run.

MaskingAlgorithm(saliency_unlearning_generate_mask_emoji_canvas, template_name="Noto").run()
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mu import ranks
from mu.algorithms.saliency_unlearning.configs import MaskConfig
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.masking import (
    Mask,
    MaskBatch,
    MaskError,
    MaskLossError,
    accumulate_within_memory,
    count_marked,
    save_mask,
    threshold_masks,
)
from mu.algorithms.saliency_unlearning.plan import plan_mask
from mu.algorithms.saliency_unlearning.utils import (
    layer_groups,
    unet_fingerprint,
)
from mu.config import config_of, require_paths
from mu.datasets.index import concept_label
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion
from mu.run_folder import RunFolder
from mu.unlearning.compute import (
    choose,
    computing,
)
from mu.unlearning.moving import names_of
from mu.unlearning.output import model_of
from mu.unlearning.plan import Plan
from mu.unlearning.runs import (
    Result,
    open_run,
    save_result,
)
from mu.verbosity import bars_off


class MaskingAlgorithm:
    """Stage 1: which weights of the UNet are salient for a concept.

    Args:
        config: a MaskConfig, or a mapping of some of its keys (an OmegaConf DictConfig too); it is not changed.
        overrides: keys of the config with other values.

    Raises:
        ConfigError: a key is unknown, or a value wrong.
    """

    def __init__(self, config: MaskConfig | Mapping[str, Any], **overrides: Any) -> None:
        self.config = config_of(MaskConfig, config, **overrides)
        self._plan: Plan | None = None  # of the run that was begun, in the main process

    def plan(self) -> Plan:
        """What `run` would do and write, with sizes. Nothing is made, sampled or encoded.

        What `run` would fail of is in the plan's `problems` and `later_problems`; to find all of it, the checkpoint
        and the images are read.

        Raises:
            ConfigError: a path is missing.
            ModelConfigError: the model's YAML cannot be used.
        """
        require_paths(self.config)
        return plan_mask(self.config).examined()

    def run(self) -> Result:
        """Make one mask for each threshold, from one pass of gradients.

        Returns:
            `run`, the run's folder; `masks`, threshold -> path; `kept`, threshold -> number of weights; `total`;
            `images`; `seconds`.

        Raises:
            ConfigError: a path is missing; names the command that makes what is missing.
            MuError: the checkpoint, the data or the gradients cannot be used; see the message.
        """
        require_paths(self.config)
        return on_ranks(_masking, self.config, self.config.devices)

    def run_here(self) -> Result:
        """As `run`, in this process: as one of its group, if it has joined one (`mu.ranks.joined`)."""
        config = self.config
        started = time.monotonic()
        warnings = ranks.on_main(self._checked)
        with open_run(config) as folder:
            for warning in warnings:
                folder.logger.warning("%s", warning)
            model = model_of(config)
            pool = names_of(model.unet, config.train_method) if config.pool == "train_method" else None
            data = SaliencyUnlearnDataHandler(config, model, rows=self._plan.rows if self._plan else None)

            saliency = self._saliency(model, data)
            masks = threshold_masks(saliency, config.thresholds, pool=pool)
            del saliency  # 4 bytes a weight
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
                result = self._write(folder, masks, described)
                result |= {"images": len(data.rows.forget), "seconds": time.monotonic() - started}
                save_result(folder, result)
                return result

            return ranks.on_main(write)

    def _checked(self) -> Sequence[str]:
        """The warnings of the plan, which is kept in this process, once nothing in it stops the run."""
        self._plan = plan_mask(self.config).require()
        return self._plan.warnings

    def _write(self, folder: RunFolder, masks: Sequence[Mask], described: Mapping[str, Any]) -> Result:
        """Write a file for each threshold; returns `run`, `masks`, `kept` and `total`."""
        paths, kept = {}, {}
        for threshold, mask in zip(self.config.thresholds, masks, strict=True):
            # All digits: thresholds that differ must not share a file.
            paths[threshold] = folder.path / f"mask_{repr(threshold).removesuffix('.0')}.safetensors"
            groups = {"kept_fraction": layer_groups(mask)}
            save_mask(mask, paths[threshold], {**described, "threshold": threshold, **groups})
            kept[threshold] = sum(count_marked(marked) for marked in mask.values())
            folder.logger.info(
                "threshold %g keeps %d weights: %s", threshold, kept[threshold], paths[threshold]
            )
        total = sum(marked.numel() for marked in masks[0].values())
        return {"run": folder.path, "masks": paths, "kept": kept, "total": total}

    def _saliency(self, model: LatentDiffusion, data: SaliencyUnlearnDataHandler) -> dict[str, Tensor]:
        config = self.config
        data.mask_batches()  # samples and encodes what is missing, by the model as it was loaded

        def batches() -> Iterable[MaskBatch]:
            found = data.mask_batches()
            return tqdm(found, total=data.mask_batch_count, desc="saliency", unit="batch", disable=bars_off())

        compute = choose(
            config,
            model,
            images=ranks.largest_share(config.batch_size) * (2 if config.c_guidance else 1),
            latent_shape=model.latent_shape(data.image_size),
            reserved=4 * sum(parameter.numel() for parameter in model.unet.parameters()),
        )
        try:
            with computing(model, compute):
                return accumulate_within_memory(
                    model,
                    batches,
                    c_guidance=config.c_guidance,
                    batch_size=config.batch_size,
                    compute=compute,
                )
        except MaskLossError as error:
            raise MaskError(f"{error}; its images: {', '.join(data.mask_images(error.batch))}") from error


def _masking(config: MaskConfig) -> Result:
    return MaskingAlgorithm(config).run_here()
