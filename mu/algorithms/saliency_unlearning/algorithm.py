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
from tqdm import tqdm

from mu import ranks
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.masking import (
    Mask,
    MaskError,
    MaskLossError,
    accumulate_within_memory,
    check_mask,
    count_marked,
    load_mask,
    random_mask,
    save_mask,
    threshold_masks,
)
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.plan import plan_mask, plan_training
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer
from mu.algorithms.saliency_unlearning.utils import layer_groups, unet_fingerprint
from mu.config import config_of, require_paths
from mu.datasets.index import concept_label
from mu.devices import peak_memory_bytes
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion
from mu.run_folder import RESULT
from mu.unlearning.batches import ForgetBatch
from mu.unlearning.checkpoints import Checkpoints, resumed_state
from mu.unlearning.compute import choose, computing
from mu.unlearning.loggers import LossLog, RunLogger
from mu.unlearning.moving import names_of
from mu.unlearning.output import check_save_dtype, model_of, original_of, write_and_prove
from mu.unlearning.plan import Plan
from mu.unlearning.progress import Progress, ProgressPictures
from mu.unlearning.runs import Result, decorating, open_run, save_result
from mu.verbosity import bars_off

__all__ = ["MaskingAlgorithm", "SaliencyUnlearnAlgorithm", "SaliencyUnlearningAlgorithm"]


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
        config, started = self.config, time.monotonic()

        # 1. Plan: what stops the run is found before anything is made
        plans: list[Plan] = []  # in the main process
        ranks.on_main(lambda: plans.append(plan_mask(config).require()))
        with open_run(config) as folder:
            for plan in plans:
                plan.say_warnings(folder.logger)

            # 2. Load the model; sample and encode what is missing, by the model as it was loaded
            model = model_of(config)
            data = SaliencyUnlearnDataHandler(config, model, rows=plans[0].rows if plans else None)
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
                return tqdm(found, total=count, desc="saliency", unit="batch", disable=bars_off())

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


class SaliencyUnlearningAlgorithm:
    """Stage 2: make the model forget the concept, moving only the weights in its mask.

    Args:
        config: a TrainConfig, or a mapping of some of its keys (an OmegaConf DictConfig too); it is not changed.
        overrides: keys of the config with other values.

    Raises:
        ConfigError: a key is unknown, or a value wrong.
    """

    def __init__(self, config: TrainConfig | Mapping[str, Any], **overrides: Any) -> None:
        self.config = config_of(TrainConfig, config, **overrides)

    def plan(self) -> Plan:
        """What `run` would do and write, as `MaskingAlgorithm.plan`."""
        require_paths(self.config)
        return plan_training(self.config).examined()

    def run(self) -> Result:
        """Fine-tune under the mask, check that nothing else moved, and write the unlearned checkpoint.

        Returns:
            `run`, the run's folder; `checkpoint`; `patch`, its path (None without); `pictures`, before and after (None
            without); `mask`, its path (None without); `weights_selected`; `weights_changed`, that differ from the
            original in the file; `weights_moved`, that did so before they were rounded to the file's dtype, and
            `weights_rounded_back`, the others of them; `weights_total`; `steps`; `loss`, `forget_loss` and
            `retain_loss` of the last epoch; `seconds`; `peak_memory_bytes`, of the process so far.

        Raises:
            ConfigError: a path is missing; names the command that makes what is missing. Or `resume` leads to a run
                with other settings; names the keys.
            ResumeError: `resume` leads to no checkpoint.
            KeyboardInterrupt, Terminated: SIGINT or SIGTERM; while training, a checkpoint was written before.
            TrainingError: a loss or gradient was not finite, or a weight outside the mask changed.
            MuError: the checkpoint, the mask or the data cannot be used; see the message.
        """
        require_paths(self.config)
        return on_ranks(_unlearning, self.config, self.config.devices)

    def run_here(self) -> Result:
        """As `run`, in this process: as one of its group, if it has joined one (`mu.ranks.joined`)."""
        config, started = self.config, time.monotonic()

        # 1. Plan: what stops the run is found before anything is made
        plans: list[Plan] = []  # in the main process

        def planned() -> Path | None:
            plans.append(plan_training(config).require())
            return plans[0].inputs.get("mask_path")

        mask_path = ranks.on_main(planned)
        resumed = resumed_state(config) if config.resume is not None else None
        with open_run(config, resumed) as folder, Checkpoints(folder.path, config) as checkpoints:
            for plan in plans:
                plan.say_warnings(folder.logger)

            # 2. Load the model, and what of it may move
            source = ranks.on_main(config.checkpoint)
            ldm = model_of(config)
            original = original_of(source, ldm.params, use_ema=config.use_ema) if ranks.is_main() else {}
            ranks.on_main(lambda: check_save_dtype(original, config.save_dtype))
            if mask_path is not None:
                folder.logger.info("mask: %s", mask_path)
            model = SaliencyUnlearnModel(ldm, config.train_method, self._mask(ldm, mask_path))
            folder.logger.info("%(selected)d of %(total)d weights of the UNet may move", model.counts)

            # 3. The images: listed, sampled and encoded by the model as it was loaded
            data = SaliencyUnlearnDataHandler(config, ldm, rows=plans[0].rows if plans else None)
            checkpoints.identify(model, data.listed(), original, resumed)
            pictures = ProgressPictures(config, ldm, data.rows)
            ranks.on_main(lambda: pictures.draw("before"))
            batches = data.train_batches

            # 4. Train
            most = config.micro_batch_size or math.inf
            sizes = (batches.batch_size, batches.retain_batch_size)
            compute = choose(
                config,
                ldm,
                images=int(sum(min(ranks.largest_share(size), most) for size in sizes)),
                latent_shape=ldm.latent_shape(data.image_size),
                reserved=4 * model.counts["train_method"] + 12 * model.counts["selected"],
            )
            logger = RunLogger(config, folder.path)
            with computing(ldm, compute):
                trainer = SaliencyUnlearnTrainer(
                    model,
                    alpha=config.alpha,
                    lr=config.lr,
                    decay_steps=batches.total_steps if config.lr_schedule == "linear" else None,
                    target=config.target,
                    retain_target=config.retain_target,
                    objective=config.objective,
                    compute=compute,
                    micro_batch_size=config.micro_batch_size,
                )
                losses = trainer.fit(
                    batches,
                    log=LossLog(folder, logger),
                    progress=Progress(config, batches, pictures, folder=folder, logger=logger),
                    checkpoints=checkpoints,
                    resumed=resumed,
                )
            del trainer  # and with it the optimizer's state
            model.verify_same_everywhere()

            # 5. Write, prove that nothing else moved, and make the patch
            def finish() -> Result:
                written = write_and_prove(
                    ldm,
                    config,
                    folder,
                    source=source,
                    original=original,
                    selected=model.selected,
                    metadata={"train_method": config.train_method, "masking": config.masking},
                    base=plans[0].unet_fingerprint,
                    lr=config.lr,
                )

                # 6. Tell of it: pictures from the written weights, and last metrics.json
                pictures.draw("after")
                result = {
                    "run": folder.path,
                    **written,
                    "pictures": pictures.save(folder.path / "pictures" / "before_after.png"),
                    "mask": mask_path,
                    "weights_selected": model.counts["selected"],
                    "weights_total": model.counts["total"],
                    "steps": batches.total_steps,
                    **losses,
                    "seconds": time.monotonic() - started,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
                with decorating(RESULT):
                    save_result(folder, result)
                return result

            return ranks.on_main(finish)

    def _mask(self, ldm: LatentDiffusion, mask_path: Path | None) -> Mask | None:
        """The mask that `masking` asks for, in main memory; None is all weights.

        On a GPU it would take a byte a weight for the whole run. The optimizer takes its places over tensor by tensor.
        """
        config = self.config
        if mask_path is not None:
            mask = load_mask(mask_path)
            check_mask(mask, ldm.unet)  # whether it was made from these very weights, the plan has found out
            return mask
        if config.masking == "random":
            parameters: dict[str, Tensor] = dict(ldm.unet.named_parameters())
            return random_mask(parameters, config.random_fraction, seed=config.seed)
        return None


SaliencyUnlearnAlgorithm = SaliencyUnlearningAlgorithm


def _masking(config: MaskConfig) -> Result:
    return MaskingAlgorithm(config).run_here()


def _unlearning(config: TrainConfig) -> Result:
    return SaliencyUnlearningAlgorithm(config).run_here()
