"""The two stages of saliency unlearning (Fan et al. 2024), from a config to the files of a run.

MaskingAlgorithm(saliency_unlearning_generate_mask_emoji_canvas, template_name="Noto").run()
SaliencyUnlearningAlgorithm(saliency_unlearning_train_emoji_canvas, template_name="Noto").run()
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mu import ranks
from mu.algorithms.saliency_unlearning.checkpoints import Checkpoints, find_run_state, run_of
from mu.algorithms.saliency_unlearning.compute import choose, computing
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.fit import fit
from mu.algorithms.saliency_unlearning.masking import (
    Mask,
    MaskBatch,
    MaskError,
    MaskLossError,
    accumulate_within_memory,
    check_mask,
    count_marked,
    load_mask,
    load_mask_metadata,
    random_mask,
    save_mask,
    threshold_masks,
)
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel, names_of
from mu.algorithms.saliency_unlearning.preflight import Plan, plan_mask, plan_training, say_warnings
from mu.algorithms.saliency_unlearning.progress import Progress
from mu.algorithms.saliency_unlearning.progress_pictures import ProgressPictures
from mu.algorithms.saliency_unlearning.run_state import Head, RunState, read_run_state
from mu.algorithms.saliency_unlearning.shards import sharded, whole_mask
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer
from mu.algorithms.saliency_unlearning.utils import (
    find_mask,
    layer_groups,
    model_of,
    read_both,
    run_name,
    unet_fingerprint,
    verify_tensors,
    write_patch,
    write_unlearned,
)
from mu.config import config_of, require_paths
from mu.datasets.index import concept_label
from mu.devices import peak_memory_bytes
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion
from mu.run_folder import RESULT, RunFolder, shared_folder
from mu.verbosity import bars_off

Result = dict[str, Any]


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
        """What `run` would do, need and write, with its time, memory and sizes. Nothing is made or loaded.

        What `run` would fail of is in the plan's `problems`.

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
        warnings = ranks.on_main(lambda: plan_mask(config).require().warnings)
        with _run_folder(config) as folder:
            say_warnings(warnings, folder.logger)
            model = model_of(config)
            pool = names_of(model.unet, config.train_method) if config.pool == "train_method" else None
            data = SaliencyUnlearnDataHandler(config, model)

            saliency = self._saliency(model, data)
            shards = config.sharding == "full"
            masks = threshold_masks(saliency, config.thresholds, pool=pool, shards=shards)
            del saliency  # 4 bytes a weight
            if shards:
                masks = [whole_mask(mask, dict(model.unet.named_parameters())) for mask in masks]
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
                _save(folder, result)
                return result

            return ranks.on_main(write)

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
            images=config.batch_size * (2 if config.c_guidance else 1),
            latent_shape=model.latent_shape(data.image_size),
            reserved=4 * sum(parameter.numel() for parameter in model.unet.parameters()) // _parts(config),
        )
        try:
            with computing(model, compute), sharded(model) if config.sharding == "full" else nullcontext():
                return accumulate_within_memory(
                    model,
                    batches,
                    c_guidance=config.c_guidance,
                    batch_size=config.batch_size,
                    compute=compute,
                )
        except MaskLossError as error:
            raise MaskError(f"{error}; its images: {', '.join(data.mask_images(error.batch))}") from error


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
        """What `run` would do, need and write, with its time, memory and sizes. Nothing is made or loaded.

        What `run` would fail of is in the plan's `problems`.

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
            without); `mask`, its path (None without); `weights_selected`, `weights_changed` (in the file),
            `weights_total`; `steps`; `loss`, `forget_loss` and `retain_loss` of the last epoch; `seconds`;
            `peak_memory_bytes`, of the process so far.

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
        warnings = ranks.on_main(lambda: plan_training(config).require().warnings)
        resumed = _resumed(config) if config.resume is not None else None
        with (
            _run_folder(config, resumed) as folder,
            Checkpoints(folder.path, config) as checkpoints,
        ):
            say_warnings(warnings, folder.logger)
            # Once, and for all processes: in a folder of runs, this run will itself be the newest.
            mask_path = ranks.on_main(lambda: find_mask(config)) if config.masking == "saliency" else None
            source = ranks.on_main(config.checkpoint)
            ldm = model_of(config)
            mask = self._mask(ldm, mask_path)
            data = SaliencyUnlearnDataHandler(config, ldm)
            model = SaliencyUnlearnModel(ldm, config.train_method, mask)
            folder.logger.info("%(selected)d of %(total)d weights of the UNet may move", model.counts)
            checkpoints.identify(model, data.rows, resumed)

            pictures = ProgressPictures(config, ldm, data.rows)
            ranks.on_main(lambda: pictures.take("before"))
            losses = self._train(model, data, folder, pictures, checkpoints=checkpoints, resumed=resumed)
            gc.collect()  # the objects of the loop hold each other, and with them the optimizer's state
            with ranks.in_step():
                model.verify_unmasked()
            model.verify_same_everywhere()

            def finish() -> Result:
                pictures.take("after")
                written = self._write(folder, model, source)
                result = {
                    "run": folder.path,
                    **written,
                    "pictures": pictures.save(folder.path / "pictures" / "before_after.png"),
                    "mask": mask_path,
                    "weights_selected": model.counts["selected"],
                    "weights_total": model.counts["total"],
                    "steps": data.total_steps,
                    **losses,
                    "seconds": time.monotonic() - started,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
                _save(folder, result)
                return result

            return ranks.on_main(finish)

    def _write(self, folder: RunFolder, model: SaliencyUnlearnModel, source: Path) -> Result:
        """Write the checkpoint and the patch, compared with the original; `checkpoint`, `patch`, `weights_changed`."""
        config, ldm = self.config, model.ldm
        checkpoint = write_unlearned(ldm, config, folder.path, source=source)
        old, new = read_both(source, checkpoint, params=ldm.params, use_ema=config.use_ema)
        changed = verify_tensors(old, new, model.selected, before=source, after=checkpoint)
        folder.logger.info("%d weights changed, all of them in the mask: %s", changed, checkpoint)
        patch = write_patch(old, new, config, folder.path, source=source) if config.patch else None
        return {"checkpoint": checkpoint, "patch": patch, "weights_changed": changed}

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
            images=int(min(steps.batch_size, most) + min(steps.retain_batch_size, most)),
            latent_shape=model.ldm.latent_shape(data.image_size),
            reserved=(4 * model.counts["train_method"] + 12 * model.counts["selected"]) // _parts(config),
        )
        sharding = model.sharded() if config.sharding == "full" else nullcontext()
        with computing(model.ldm, compute) as originals, sharding:
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
                optimizer=config.optimizer,
                originals=originals,
            )
            progress = Progress(config, steps, pictures, folder)
            return fit(
                trainer, data, config, folder, callbacks=[progress], checkpoints=checkpoints, resumed=resumed
            )

    def _mask(self, ldm: LatentDiffusion, mask_path: Path | None) -> Mask | None:
        """The mask that `masking` asks for; None is all weights."""
        config = self.config
        if mask_path is not None:
            mask = load_mask(mask_path)
            metadata = load_mask_metadata(mask_path)
            check_mask(mask, ldm.unet, metadata=metadata, fingerprint=unet_fingerprint(ldm))
        elif config.masking == "random":
            pool = names_of(ldm.unet, config.train_method) if config.mask_pool == "train_method" else None
            parameters = dict(ldm.unet.named_parameters())
            mask = random_mask(parameters, config.threshold, seed=config.mask_seed, pool=pool)
        else:
            return None
        place = "cpu" if config.sharding == "full" else ldm.device  # there, only a part of it is to be
        return {name: marked.to(place) for name, marked in mask.items()}


SaliencyUnlearnAlgorithm = SaliencyUnlearningAlgorithm


def _masking(config: MaskConfig) -> Result:
    return MaskingAlgorithm(config).run_here()


def _unlearning(config: TrainConfig) -> Result:
    return SaliencyUnlearningAlgorithm(config).run_here()


def _parts(config: MaskConfig | TrainConfig) -> int:
    """Into how many parts weights, gradients and the optimizer's state are cut."""
    return ranks.world_size() if config.sharding == "full" else 1


def _resumed(config: TrainConfig) -> RunState:
    """The checkpoint that `resume` leads to; all processes take the one that the main one finds."""
    found: dict[str, RunState] = {}

    def find() -> Path:
        found["here"] = find_run_state(config)
        return found["here"].path

    path = ranks.on_main(find)
    return found["here"] if found else read_run_state(path)


def _run_folder(config: MaskConfig | TrainConfig, resumed: Head | None = None) -> RunFolder:
    """A new folder with its config.yaml; or that of the run which is resumed, where it lies in `output_dir`."""

    def open_it() -> RunFolder:
        if isinstance(config, TrainConfig) and resumed is not None and (run := run_of(resumed, config)):
            return RunFolder.go_on(run.parent, run.name)
        folder = RunFolder.create(config.output_dir, run_name(config))
        folder.save_config(config)
        return folder

    return shared_folder(open_it)


def _save(folder: RunFolder, result: Result) -> None:
    """Write the environment; and last, because it says that the run is done, a result as metrics.json."""
    folder.save_environment()
    folder.save_json(RESULT, _plain(result))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
