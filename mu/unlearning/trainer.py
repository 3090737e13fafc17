"""The training loop of every method: a method is its `Objective`, and the loop does the rest.

    trainer = Trainer(model, objective, lr=1e-5)
    trainer.fit(batches, log=..., progress=..., checkpoints=...)

In each step the gradient of the objective on a batch is looked at, the selected entries make one step of Adam, the
losses are written, and between two steps the run may be saved, or stopped. Nothing here knows of a mask: which entries
may move is `MovingModel.selected`. With several processes each takes its share of every batch, and the gradients of the
selected entries are added up: all then make the same step, that of one process to rounding.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from mu import ranks
from mu.atomic import WriteError
from mu.bars import bar
from mu.errors import Terminated, first_line
from mu.ldm import LatentDiffusion
from mu.ldm.tensor_file import CheckpointError
from mu.unlearning.batches import Batch, Batches, Part, on_device, pieces
from mu.unlearning.checkpoints import Checkpoints
from mu.unlearning.compute import Compute, is_out_of_memory, less_at_once
from mu.unlearning.loggers import LossLog
from mu.unlearning.moving import MovingModel, TrainingError
from mu.unlearning.optim import MaskedAdam
from mu.unlearning.progress import Progress
from mu.unlearning.run_state import (
    RunState,
    restore_tables,
    restore_training_,
    table_tensors,
    training_tensors,
)

TERMS = ("forget", "retain")
"""The terms that an objective may have."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nstopping after this step, with a checkpoint; once more: at once, without\n"


class Objective(Protocol):
    """What a method minimises: a weighed sum of terms, each the mean over the images of its part of a batch."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> its weight in the loss, such as {"forget": 1.0, "retain": alpha}: the terms that `terms` gives."""
        ...

    def terms(self, model: LatentDiffusion, forget: Any, retain: Any) -> dict[str, Tensor]:
        """The terms of a batch, or of a piece of one: "forget", "retain" or both, each an fp32 scalar.

        Args:
            model: as it is now; gradients flow into its weights that may move. A method that needs the model as it
                was takes a `mu.unlearning.moving.FrozenOriginal` when it is made.
            forget, retain: see `Batch`; on the model's device. retain is None where the batches have none.
        """
        ...


def weighed(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss: the sum of the terms, each times its weight."""
    return reduce(add, [weight * terms[name] for name, weight in weights.items()])


class Trainer:
    """Trains the entries of a model's weights that may move, with Adam.

    A batch goes through the UNet in pieces if asked, or if memory does not suffice for the whole; its loss and gradient
    are the same to rounding.

    Args:
        model: which entries move. It has to be on its device already.
        objective: what is minimised.
        lr: learning rate of Adam.
        decay_steps: the learning rate falls linearly to 0 over so many steps; None keeps it constant.
        compute: the precision of the arithmetic, see `computing`, within which training has to take place.
        micro_batch_size: images of each part, forget and retain, that go through the UNet at once; None: all.

    Raises:
        TrainingError: in a step, a loss or a gradient is NaN or infinite, which names the step and its images; or a
            tensor that may move has no gradient, which names it. No weight has been moved by it.
        OutOfMemoryError: in a step, memory does not suffice for one image of each part.
    """

    def __init__(
        self,
        model: MovingModel,
        objective: Objective,
        *,
        lr: float,
        decay_steps: int | None = None,
        compute: Compute | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.compute = compute or Compute()
        self.micro_batch_size = micro_batch_size
        self.optimizer = MaskedAdam(model.parameters_to_train(), model.selected, lr)
        self.schedule = (
            None
            if decay_steps is None
            else LinearLR(self.optimizer, start_factor=1.0, end_factor=0.0, total_iters=decay_steps)
        )
        self.steps_done = 0

    def fit(
        self,
        batches: Batches,
        *,
        log: LossLog,
        progress: Progress,
        checkpoints: Checkpoints,
        resumed: RunState | None = None,
    ) -> dict[str, float]:
        """All steps of a run; of one that is resumed, those after its checkpoint.

        Args:
            log: the losses of each step go to it.
            progress: is shown the model before the first step and after each.
            checkpoints: says when the run is saved, and writes.
            resumed: the checkpoint that the run goes on from.

        Returns:
            `loss`, `forget_loss` and `retain_loss`, each the mean over the last epoch.

        Raises:
            TrainingError, OutOfMemoryError: see the class.
            ResumeError: the checkpoint is of other weights than those that move.
            WriteError: the losses of a step could not be written; a checkpoint that has them was, if that could.
            KeyboardInterrupt, Terminated: SIGINT or SIGTERM; a checkpoint was written after the step.
        """
        if resumed is not None:
            self.restore_(resumed)
            ranks.on_main(lambda: restore_tables(resumed, checkpoints.run))
        total = batches.total_steps
        shown = bar("training", total=total, unit="steps", initial=self.steps_done)
        with log.open(), stopping_between_steps() as stop, shown:
            if self.steps_done == 0:
                progress.look(0, self.losses)
            asked: int | None = None
            for step in range(self.steps_done, total):
                # 1. The gradients of the batch, and one step of Adam on the selected entries
                terms = self.step(batches[step])

                # 2. The losses on disk and in the loggers; validation and pictures where they are due
                unwritten = log.append(self.steps_done, terms)
                shown.set_postfix({name: f"{value:.3g}" for name, value in terms.items()}, refresh=False)
                shown.update()
                progress.look(self.steps_done, self.losses)

                # 3. A checkpoint where one is due, at the end of a run that was worth some, and before a stop.
                # Signals and clocks do not reach all processes between the same two steps: they agree on it.
                last = self.steps_done == total and bool(checkpoints.paths)
                due = unwritten is not None or last or checkpoints.is_due(self.steps_done)
                told = ranks.gathered((stop.signum, due))
                asked = next((signum for signum, _ in told if signum is not None), None)
                if asked is not None or told[0][1]:
                    ranks.on_main(lambda: self._save(checkpoints, log, unwritten))  # noqa: B023
                if asked is not None:
                    break
            else:  # 4. A signal may have come after the last step had looked for one
                asked = next((signum for signum in ranks.gathered(stop.signum) if signum is not None), None)
                if asked is not None:
                    ranks.on_main(lambda: self._save(checkpoints, log, None))
            if asked is not None:
                raise KeyboardInterrupt if asked == signal.SIGINT else Terminated
        return log.means(last=batches.steps_per_epoch)

    def restore_(self, state: RunState) -> None:
        """Go on from a checkpoint of a run of this objective, on this model as it was loaded.

        Raises:
            ResumeError: it is of other weights than those that move.
        """
        restore_training_(state, self.model, self.optimizer)
        if self.schedule is not None:
            self.schedule.load_state_dict(state.schedule)
            self.optimizer.param_groups[0]["lr"] = self.schedule.get_last_lr()[0]
        self.steps_done = state.step

    def step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimizer on a batch; returns `loss`, `forget` and `retain`."""
        terms = self.check_finite(self._gradients_within_memory(batch), batch.images)
        self.optimizer.sum_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self.steps_done += 1
        return {name: float(terms[name]) if name in terms else 0.0 for name in ("loss", *TERMS)}

    @torch.no_grad()
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` and its terms of a whole batch, with the weights as they are, in fp32."""
        ldm = self.model.ldm
        forget, retain = (part and on_device(part, ldm.device) for part in (batch.forget, batch.retain))
        terms = self.objective.terms(ldm, forget, retain)
        return {"loss": weighed(terms, self.objective.weights), **terms}

    def _gradients_within_memory(self, batch: Batch) -> dict[str, Tensor]:
        """`_gradients`, begun again with less at once whenever memory runs out, see `compute.less_at_once`."""
        ldm = self.model.ldm
        parts = [on_device(part, ldm.device) for part in (batch.forget, batch.retain) if part is not None]
        while True:
            try:
                return self._gradients(parts)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Only here is the error, which holds the tensors of the pass that failed, gone.
            for _, parameter in self.model.parameters_to_train():
                parameter.grad = None
            most = ranks.largest_share(max(len(part[0]) for part in parts))
            images = min(most, self.micro_batch_size or most)
            self.micro_batch_size = less_at_once(ldm.unet, self.compute, images, reason=reason)

    def _gradients(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss of a batch in the parameters; returns the loss and its terms."""
        ldm = self.model.ldm
        totals: dict[str, Tensor] = {}
        for piece in pieces(parts, self.micro_batch_size):
            # Of a part that goes through in pieces, each piece counts as much as it has images.
            shares = {
                name: number / len(part[0])
                for name, part, (_, number) in zip(TERMS, parts, piece, strict=False)
            }
            forget, retain = piece[0][0], piece[1][0] if len(piece) > 1 else None
            with self.compute.autocast(ldm.device):
                terms = self.objective.terms(ldm, forget, retain)
            terms = {name: shares[name] * term for name, term in terms.items()}
            loss = weighed(terms, self.objective.weights)
            loss.backward()
            for name, term in {"loss": loss, **terms}.items():
                totals[name] = totals[name] + term.detach() if name in totals else term.detach()
        return totals

    def check_finite(
        self, terms: Mapping[str, Tensor], images: Mapping[str, Sequence[str]]
    ) -> dict[str, Tensor]:
        """Look at the losses and at all gradients before any weight moves.

        Args:
            terms: `loss` and its terms, of this process' share.
            images: see `Batch`; for messages.

        Returns:
            The terms of all processes together.

        Raises:
            TrainingError: in one of the processes something is NaN or infinite, or a gradient is missing.
        """
        named = self.model.parameters_to_train()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        without = [name for name, _ in named if name not in gradients]
        largest = torch.nn.utils.get_total_norm(gradients.values(), norm_type=float("inf"))
        largest = largest.to(terms["loss"].device)
        sums = torch.stack([*terms.values(), largest, largest.new_tensor(float(len(without)))])
        ranks.sum_([sums])  # a sum is finite if each process' number is
        *found, largest, lacking = sums.unbind()
        terms = dict(zip(terms, found, strict=True))
        if lacking:
            names = sorted({name for names in ranks.gathered(without) for name in names})
            raise TrainingError(
                f"step {self.steps_done}: {len(names)} of {len(named)} tensors that may move have no gradient "
                f"({', '.join(names)}): they are frozen, or take no part in the prediction, or this release of torch "
                f"({torch.__version__}) loses their gradient. Training stops before any weight has moved"
            )
        source = "; ".join(f"{part}: {', '.join(files)}" for part, files in images.items())
        if not torch.isfinite(terms["loss"]):
            each = ", ".join(f"{name} {term.item()}" for name, term in terms.items() if name != "loss")
            raise TrainingError(
                f"step {self.steps_done}: the loss is {terms['loss'].item()} ({each}) on the images to {source}. "
                "Training stops before any weight is changed by it"
            )
        if not torch.isfinite(largest):
            here = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            names = sorted({name for names in ranks.gathered(here) for name in names})
            raise TrainingError(
                f"step {self.steps_done}: the gradients of {len(names)} tensors are not finite "
                f"({', '.join(names[:5])}), from the images to {source}. Training stops before any weight is changed "
                "by them"
            )
        return terms

    def _save(self, checkpoints: Checkpoints, log: LossLog, unwritten: WriteError | None) -> None:
        """Write a checkpoint, with the rows of this step also where they could not be written."""
        tensors = training_tensors(self.model, self.optimizer)
        tensors |= table_tensors(checkpoints.run, {"metrics.csv": log.table()})
        schedule = {} if self.schedule is None else self.schedule.state_dict()
        try:
            checkpoints.save(self.steps_done, tensors, schedule)
        except CheckpointError as error:
            if unwritten is not None:
                raise WriteError(f"{unwritten}. Nor could a checkpoint: {error}") from error
            raise
        if unwritten is not None:
            raise unwritten


class StopRequest:
    """Whether a signal has asked the run to stop."""

    signum: int | None = None


@contextmanager
def stopping_between_steps() -> Iterator[StopRequest]:
    """While the block lasts, SIGINT and SIGTERM are noted, for the loop to stop at; a second one acts at once."""
    request = StopRequest()
    before: dict[int, Any] = {}  # signal -> what handles it outside
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        handlers = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        before = {signum: handler for signum, handler in handlers.items() if handler is not signal.SIG_IGN}

    def give_back() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def note(signum: int, _: object) -> None:
        request.signum = signum
        give_back()
        os.write(2, _NOTE)  # print and logging may be in the middle of a line

    for signum in before:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        give_back()
