"""A method, from a config to the files of a run: what all methods do, in one order.

A method that trains is a config class, a plan, batches and an objective:

    class Mine(TrainingMethod[MyConfig]):
        config_class = MyConfig

        def make_plan(self) -> Plan: ...
        def data(self, loaded, plan) -> TrainingData: ...
        def objective(self, model) -> Objective: ...

    Mine(config, template_name="Noto").run()
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from mu import ranks
from mu.config import config_of, require_paths
from mu.devices import peak_memory_bytes
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion
from mu.run_folder import RESULT, RunFolder
from mu.unlearning.batches import Batches
from mu.unlearning.checkpoints import Checkpoints, resumed_state
from mu.unlearning.compute import choose, computing
from mu.unlearning.config import OutputKeys, RunKeys, model_of
from mu.unlearning.loggers import LossLog, RunLogger
from mu.unlearning.moving import MovingModel
from mu.unlearning.output import check_save_dtype, original_of, write_and_prove
from mu.unlearning.plan import Plan
from mu.unlearning.progress import Progress, ProgressPictures
from mu.unlearning.runs import Result, decorating, open_run, save_result
from mu.unlearning.trainer import Objective, Trainer
from mu.unlearning.training_config import TrainingKeys

R = TypeVar("R", bound=RunKeys)
T = TypeVar("T", bound=TrainingKeys)


class Method(ABC, Generic[R]):
    """What a config is made into.

    Args:
        config: a `config_class`, or a mapping of some of its keys (an OmegaConf DictConfig too); it is not changed.
        overrides: keys of the config with other values.

    Raises:
        ConfigError: a key is unknown, or a value wrong.
    """

    config_class: ClassVar[type[Any]]

    def __init__(self, config: R | Mapping[str, Any], **overrides: Any) -> None:
        self.config: R = config_of(self.config_class, config, **overrides)

    def plan(self) -> Plan:
        """What `run` would do and write, with sizes. Nothing is made, sampled or encoded.

        What `run` would fail of is in the plan's `problems` and `later_problems`; to find all of it, the checkpoint
        and the images are read.

        Raises:
            ConfigError: a path is missing.
            ModelConfigError: the model's YAML cannot be used.
        """
        require_paths(self.config)
        return self.make_plan().examined()

    def run(self) -> Result:
        """Do it, in as many processes as `devices` names; see `run_here` for what comes back.

        Raises:
            ConfigError: a path is missing; names the command that makes what is missing.
            MuError: the checkpoint or the data cannot be used; see the message.
        """
        require_paths(self.config)
        return on_ranks(partial(_run_here, type(self)), self.config, self.config.devices)

    @abstractmethod
    def make_plan(self) -> Plan:
        """The plan of the run; see `mu.unlearning.inspection`."""

    @abstractmethod
    def run_here(self) -> Result:
        """The run, in this process: as one of its group, if it has joined one (`mu.ranks.joined`)."""

    def required_plan(self) -> tuple[Plan | None, Mapping[str, Path]]:
        """The plan, in the main process alone, and its inputs, in all; raises what stops the run."""
        plans: list[Plan] = []

        def inputs() -> Mapping[str, Path]:
            plans.append(self.make_plan().require())
            return plans[0].inputs

        found = ranks.on_main(inputs)
        return (plans[0] if plans else None), found


def _run_here(method: type[Method[Any]], config: RunKeys) -> Result:
    return method(config).run_here()


@dataclass(frozen=True)
class Loaded:
    """A model, and the file that it was loaded from."""

    ldm: LatentDiffusion
    source: Path
    original: Mapping[str, Tensor]
    """The tensors of that file as they are there, mapped; empty but in the main process."""


def load(config: OutputKeys) -> Loaded:
    """The model of a config.

    Raises:
        CheckpointError: it cannot be loaded, or its UNet cannot be written in the dtype that `save_dtype` names.
    """
    source = ranks.on_main(config.checkpoint)
    ldm = model_of(config)
    original = original_of(source, ldm.params, use_ema=config.use_ema) if ranks.is_main() else {}
    ranks.on_main(lambda: check_save_dtype(original, config.save_dtype))
    return Loaded(ldm, source, original)


def tell(folder: RunFolder, pictures: ProgressPictures, result: Result, *, started: float) -> Result:
    """Pictures after; and last metrics.json, which says that the run is done. A failure is a warning.

    Args:
        result: what the run has found out so far.
        started: by `time.monotonic`.

    Returns:
        `result` with `run`, `pictures`, `seconds` and `peak_memory_bytes`.
    """
    pictures.draw("after")
    result = {
        "run": folder.path,
        **result,
        "pictures": pictures.save(folder.path / "pictures" / "before_after.png"),
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    with decorating(RESULT):
        save_result(folder, result)
    return result


class TrainingData(Protocol):
    """What a method trains on; made from a config and its model, as it was loaded."""

    @property
    def forgotten(self) -> Sequence[str]:
        """All prompts that are forgotten; some of them are shown before and after."""
        ...

    @property
    def retained(self) -> Sequence[str]:
        """All prompts that are kept."""
        ...

    def listed(self) -> object:
        """What tells it from another run's, as JSON knows it: a run that is resumed must have the same."""
        ...

    @property
    def train_batches(self) -> Batches:
        """The batches by step; when first asked for, what is missing is sampled and encoded."""
        ...


class TrainingMethod(Method[T]):
    """A method that fine-tunes: its data and objective, in the run that all such methods share."""

    @abstractmethod
    def data(self, loaded: Loaded, plan: Plan | None) -> TrainingData:
        """What is trained on; `plan` is there in the main process alone."""

    @abstractmethod
    def objective(self, model: MovingModel) -> Objective:
        """What is minimised; `model` has not been trained yet."""

    def moving(self, ldm: LatentDiffusion, inputs: Mapping[str, Path]) -> MovingModel:  # noqa: ARG002
        """What may move: all weights of the train method. `inputs` are those of the plan."""
        return MovingModel(ldm, self.config.train_method)

    def described(self) -> dict[str, Any]:
        """What the patch says of the method."""
        return {"train_method": self.config.train_method}

    def told(self, inputs: Mapping[str, Path]) -> Result:  # noqa: ARG002
        """What the result says of the plan's inputs."""
        return {}

    def run_here(self) -> Result:
        """Fine-tune, check that nothing else moved, and write the unlearned checkpoint.

        Returns:
            `run`, the run's folder; `checkpoint`; `patch`, its path (None without); `pictures`, before and after (None
            without); what `told` gives; `weights_selected`; `weights_changed`, that differ
            from the original in the file; `weights_moved`, that did so before they were rounded to the file's dtype,
            and `weights_rounded_back`, the others of them; `weights_total`; `steps`; `loss`, `forget_loss` and
            `retain_loss` of the last epoch; `seconds`; `peak_memory_bytes`, of the process so far.

        Raises:
            ResumeError, ConfigError: `resume` leads to no checkpoint, or to a run with other settings.
            KeyboardInterrupt, Terminated: SIGINT or SIGTERM; while training, a checkpoint was written before.
            TrainingError: a loss or gradient was not finite, or a weight changed that had to stay.
        """
        config, started = self.config, time.monotonic()

        # 1. Plan: what stops the run is found before anything is made.
        plan, inputs = self.required_plan()
        resumed = resumed_state(config) if config.resume is not None else None
        with open_run(config, resumed) as folder, Checkpoints(folder.path, config) as checkpoints:
            if plan is not None:
                plan.say_warnings(folder.logger)

            # 2. Load the model, and what of it may move.
            loaded = load(config)
            ldm = loaded.ldm
            for key, path in inputs.items():
                folder.logger.info("%s: %s", key, path)
            model = self.moving(ldm, inputs)
            folder.logger.info("%(selected)d of %(total)d weights of the UNet may move", model.counts)

            # 3. The data: listed, sampled and encoded by the model as it was loaded.
            data = self.data(loaded, plan)
            checkpoints.identify(model, data.listed(), loaded.original, resumed)
            pictures = ProgressPictures(config, ldm, data.forgotten, data.retained)
            ranks.on_main(lambda: pictures.draw("before"))
            batches = data.train_batches

            # 4. Train.
            most = config.micro_batch_size or math.inf
            compute = choose(
                config,
                ldm,
                images=int(sum(min(ranks.largest_share(size), most) for size in batches.part_sizes)),
                latent_shape=ldm.latent_shape(config.image_size),
                reserved=4 * model.counts["train_method"] + 12 * model.counts["selected"],
            )
            logger = RunLogger(config, folder.path)
            with computing(ldm, compute):
                trainer = Trainer(
                    model,
                    self.objective(model),
                    lr=config.lr,
                    decay_steps=batches.total_steps if config.lr_schedule == "linear" else None,
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

            # 5. Write, prove that nothing else moved, and tell of it.
            def finish() -> Result:
                written = write_and_prove(
                    ldm,
                    config,
                    folder,
                    source=loaded.source,
                    original=loaded.original,
                    selected=model.selected,
                    metadata=self.described(),
                    base=plan.unet_fingerprint if plan is not None else None,
                    lr=config.lr,
                )
                counted = {f"weights_{name}": model.counts[name] for name in ("selected", "total")}
                result = {**written, **self.told(inputs), **counted, "steps": batches.total_steps, **losses}
                return tell(folder, pictures, result, started=started)

            return ranks.on_main(finish)
