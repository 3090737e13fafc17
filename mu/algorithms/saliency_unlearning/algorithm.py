"""Saliency unlearning (Fan et al. 2024), from a config to the files of a run: the training; the mask comes with it.

MaskingAlgorithm(saliency_unlearning_generate_mask_emoji_canvas, template_name="Noto").run()
SaliencyUnlearningAlgorithm(saliency_unlearning_train_emoji_canvas, template_name="Noto").run()
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mu import ranks
from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.masking import (
    Mask,
    check_mask,
    load_mask,
    random_mask,
)
from mu.algorithms.saliency_unlearning.masking_algorithm import MaskingAlgorithm
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.plan import plan_training
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer
from mu.config import config_of, require_paths
from mu.devices import peak_memory_bytes
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion
from mu.run_folder import RESULT, RunFolder
from mu.unlearning.checkpoints import (
    Checkpoints,
    find_run_state,
)
from mu.unlearning.compute import (
    choose,
    computing,
)
from mu.unlearning.fit import fit
from mu.unlearning.moving import names_of
from mu.unlearning.output import check_save_dtype, model_of, original_of, write_and_prove
from mu.unlearning.plan import Plan
from mu.unlearning.progress import Progress
from mu.unlearning.progress_pictures import ProgressPictures
from mu.unlearning.run_state import (
    RunState,
    read_run_state,
)
from mu.unlearning.runs import (
    Result,
    decorating,
    open_run,
    save_result,
)

__all__ = ["MaskingAlgorithm", "SaliencyUnlearnAlgorithm", "SaliencyUnlearningAlgorithm"]


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
        config = self.config
        started = time.monotonic()
        warnings, mask_path = ranks.on_main(self._checked)
        resumed = _resumed(config) if config.resume is not None else None
        with (
            open_run(config, resumed) as folder,
            Checkpoints(folder.path, config) as checkpoints,
        ):
            for warning in warnings:
                folder.logger.warning("%s", warning)
            if mask_path is not None:
                folder.logger.info("mask: %s", mask_path)
            source = ranks.on_main(config.checkpoint)
            ldm = model_of(config)
            original = original_of(source, ldm.params, use_ema=config.use_ema) if ranks.is_main() else {}
            ranks.on_main(lambda: check_save_dtype(original, config.save_dtype))
            mask = self._mask(ldm, mask_path)
            data = SaliencyUnlearnDataHandler(config, ldm, rows=self._plan.rows if self._plan else None)
            model = SaliencyUnlearnModel(ldm, config.train_method, mask)
            folder.logger.info("%(selected)d of %(total)d weights of the UNet may move", model.counts)
            checkpoints.identify(model, data.rows, original, resumed)

            pictures = ProgressPictures(config, ldm, data.rows)
            ranks.on_main(lambda: _draw(pictures, "before"))
            losses = self._train(model, data, folder, pictures, checkpoints=checkpoints, resumed=resumed)
            gc.collect()  # the objects of the loop hold each other, and with them the optimizer's state
            model.verify_same_everywhere()

            def finish() -> Result:
                written = write_and_prove(
                    ldm,
                    config,
                    folder,
                    source=source,
                    original=original,
                    selected=model.selected,
                    metadata={"train_method": config.train_method, "masking": config.masking},
                    base=self._plan.unet_fingerprint if self._plan is not None else None,
                    lr=config.lr,
                )
                _draw(pictures, "after")
                result = {
                    "run": folder.path,
                    **written,
                    "pictures": _saved(pictures, folder.path / "pictures" / "before_after.png"),
                    "mask": mask_path,
                    "weights_selected": model.counts["selected"],
                    "weights_total": model.counts["total"],
                    "steps": data.total_steps,
                    **losses,
                    "seconds": time.monotonic() - started,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
                with decorating(RESULT):
                    save_result(folder, result)
                return result

            return ranks.on_main(finish)

    def _checked(self) -> tuple[Sequence[str], Path | None]:
        """Warnings and mask of the plan, which is kept in this process, once nothing in it stops the run."""
        self._plan = plan_training(self.config).require()
        return self._plan.warnings, self._plan.inputs.get("mask_path")

    def _train(
        self,
        model: SaliencyUnlearnModel,
        data: SaliencyUnlearnDataHandler,
        folder: RunFolder,
        pictures: ProgressPictures,
        *,
        checkpoints: Checkpoints,
        resumed: RunState | None,
    ) -> dict[str, float]:
        """All steps; returns the losses of `fit`."""
        config = self.config
        steps = data.train_steps  # sampled and encoded here, by the model as it was loaded
        most = config.micro_batch_size or math.inf
        compute = choose(
            config,
            model.ldm,
            images=int(
                sum(min(ranks.largest_share(n), most) for n in (steps.batch_size, steps.retain_batch_size))
            ),
            latent_shape=model.ldm.latent_shape(data.image_size),
            reserved=4 * model.counts["train_method"] + 12 * model.counts["selected"],
        )
        with computing(model.ldm, compute):
            trainer = SaliencyUnlearnTrainer(
                model,
                alpha=config.alpha,
                lr=config.lr,
                decay_steps=data.total_steps if config.lr_schedule == "linear" else None,
                target=config.target,
                retain_target=config.retain_target,
                objective=config.objective,
                compute=compute,
                micro_batch_size=config.micro_batch_size,
            )
            progress = Progress(config, steps, pictures, folder)
            return fit(
                trainer, data, config, folder, callbacks=[progress], checkpoints=checkpoints, resumed=resumed
            )

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
            pool = names_of(ldm.unet, config.train_method) if config.mask_pool == "train_method" else None
            parameters = dict(ldm.unet.named_parameters())
            return random_mask(parameters, config.threshold, seed=config.mask_seed, pool=pool)
        return None


SaliencyUnlearnAlgorithm = SaliencyUnlearningAlgorithm


def _draw(pictures: ProgressPictures, moment: str) -> None:
    with decorating(f"pictures {moment}"):
        pictures.take(moment)


def _saved(pictures: ProgressPictures, path: Path) -> Path | None:
    saved = None
    with decorating(path.name):
        saved = pictures.save(path)
    return saved


def _unlearning(config: TrainConfig) -> Result:
    return SaliencyUnlearningAlgorithm(config).run_here()


def _resumed(config: TrainConfig) -> RunState:
    """The checkpoint that `resume` leads to; all processes take the one that the main one finds."""
    found: dict[str, RunState] = {}

    def find() -> Path:
        found["here"] = find_run_state(config)
        return found["here"].path

    path = ranks.on_main(find)
    return found["here"] if found else read_run_state(path)
