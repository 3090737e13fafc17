"""This library as it is, as an arm of the stopwatch: its functions in the order of its two commands.

The parts *mask*, *threshold* and *step* are measured here; the whole job runs the library's two algorithms themselves
(`stopwatch_parts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks.stopwatch_arms import ALPHA, C_GUIDANCE, LR, Arm, Careful, Examples, Plain, Values
from mu.algorithms.saliency_unlearning.masking import accumulate_saliency, save_mask, threshold_masks
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer, salun_loss
from mu.ldm import LatentDiffusion, save_checkpoint
from mu.unlearning.batches import ForgetBatch, RetainBatch
from mu.unlearning.compute import Compute, computing


class Ours(Careful):
    """The library's own functions, in the order in which its two algorithms call them; it encodes as careful does."""

    def __init__(self, model: LatentDiffusion, *, substitute: str, autocast: bool) -> None:
        super().__init__(model, substitute=substitute, autocast=autocast)
        self.compute = Compute(
            precision="bf16-mixed" if autocast else "fp32", channels_last=self.device.type == "cuda"
        )
        self.training = ExitStack()

    def ready(self, batch: Examples, reference_prompt: str) -> ForgetBatch:
        context, reference = (self.context(prompt, len(batch)) for prompt in (batch.prompt, reference_prompt))
        return ForgetBatch(*self.latents(batch), context, reference)

    def saliency(self, batches: Iterable[Examples]) -> Values:
        ready: Iterator[ForgetBatch] = (self.ready(batch, "") for batch in batches)
        with computing(self.model, self.compute):
            return accumulate_saliency(self.model, ready, c_guidance=C_GUIDANCE, compute=self.compute)

    @staticmethod
    def mask(saliency: Values, threshold: float) -> Values:
        return threshold_masks(saliency, [threshold])[0]

    def save_mask(self, mask: Values, folder: Path) -> Path:
        path = folder / "mask.safetensors"
        save_mask(mask, path, {})
        return path

    def start_training(self, mask: Values, train_method: str) -> None:
        on_device = {name: marked.to(self.device) for name, marked in mask.items()}
        self.unlearned = SaliencyUnlearnModel(self.model, train_method, on_device)
        self.training.enter_context(computing(self.model, self.compute))
        self.trainer = SaliencyUnlearnTrainer(self.unlearned, alpha=ALPHA, lr=LR, compute=self.compute)
        self.optimizer = self.trainer.optimizer

    def step(self, forget: Examples, retain: Examples) -> None:
        to_retain = RetainBatch(*self.ready(retain, retain.prompt)[:4])
        with self.precision():
            terms = salun_loss(self.model, self.ready(forget, self.substitute), to_retain, ALPHA)
        self.optimizer.zero_grad(set_to_none=True)
        terms[0].backward()
        self.trainer.check_finite(dict(zip(("loss", "forget", "retain"), terms, strict=True)), {})
        self.optimizer.step()

    def save_model(self, folder: Path) -> Path:
        path = folder / "model.safetensors"
        save_checkpoint(self.model, path)
        return path


ARMS: Mapping[str, type[Arm]] = {"plain": Plain, "careful": Careful, "ours": Ours}
