"""What the processes of the tests of shards do: the same steps on whole weights, or each with its rows."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rank_work
import torch
from torch import Tensor

from mu import ranks
from mu.algorithms.saliency_unlearning.compute import Compute, computing
from mu.algorithms.saliency_unlearning.masking import (
    MaskError,
    accumulate_saliency,
    random_mask,
    threshold_masks,
)
from mu.algorithms.saliency_unlearning.model import FrozenOriginal, SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.optim import MaskedAdam
from mu.algorithms.saliency_unlearning.shards import joined_on_main, local, own_rows, sharded, whole_mask
from mu.algorithms.saliency_unlearning.trainer import salun_loss
from mu.algorithms.saliency_unlearning.utils import UNET_PREFIX, verify_tensors
from mu.ldm import load_model

STEPS = 3
SAVED = 2
"""Steps after which the state is taken."""
THRESHOLDS = (0.01, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class Task:
    model_config: str
    checkpoint: str
    precision: str = "fp32"
    train_method: str = "full"
    steps: int = STEPS
    resumed: dict[str, Any] | None = None
    """What `trained` gave as `saved`."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """All that one launch is for."""

    fresh: Task
    resuming: Task
    lower: Task
    configs: tuple[Any, Any]


def everything(tasks: Tasks) -> dict[str, Any]:
    return {
        "trained": trained(tasks.fresh),
        "resumed": trained(tasks.resuming),
        "bf16": trained(tasks.lower),
        "bf16 saliency": saliency(tasks.lower),
        "stages": rank_work.both_stages(tasks.configs),
        "masks": masks(),
        "refused": refused(),
    }


def trained(task: Task) -> dict[str, Any]:
    """Masked steps towards the frozen original, on this process' share of four images; with several, on shards."""
    ldm = load_model(task.model_config, task.checkpoint)
    before = {name: parameter.detach().clone() for name, parameter in ldm.unet.named_parameters()}
    mask = random_mask(before, 0.4, seed=1)
    # Nothing of one tensor may move, and of another only something of the last row.
    mask["time_embed.0.weight"][:] = False
    mask["time_embed.2.weight"][:-1] = False
    model = SaliencyUnlearnModel(ldm, task.train_method, mask)
    compute = Compute(precision=task.precision, gradient_checkpointing=ranks.world_size() > 1)
    found: dict[str, Any] = {"counts": model.counts}
    with (
        computing(ldm, compute) as originals,
        model.sharded() if ranks.world_size() > 1 else nullcontext(),
    ):
        named = model.parameters_to_train()
        original = FrozenOriginal(model)
        optimizer = MaskedAdam(named, model.selected, lr=1e-3, eps=1e-3, originals=originals)
        start = 0
        if task.resumed is not None:
            start = SAVED
            model.write_selected_(task.resumed["weights"])
            optimizer.load_state_dict(task.resumed["optimizer"])
        losses = []
        for step in range(start, task.steps):
            losses.append(_step(model, original, optimizer, step))
            if step + 1 == SAVED:
                saved = {"weights": model.selected_values(), "optimizer": optimizer.state_dict()}
                found["saved"] = copy.deepcopy(saved)
        found["losses"] = losses
        found["bytes"] = _bytes(named, optimizer)
        for name, parameter in named:
            if originals:
                optimizer.write_master_(parameter, originals[name])
    after = {name: parameter.detach() for name, parameter in ldm.unet.named_parameters()}
    verify_tensors(
        *({UNET_PREFIX + name: value for name, value in values.items()} for values in (before, after)),
        selected=model.selected,
        before=Path("before"),
        after=Path("after"),
    )
    found["alike"] = (
        len(set(ranks.gathered(sum(float(values.double().sum()) for values in after.values())))) == 1
    )
    found["moved"] = {name: after[name] - before[name] for name in before}
    found["by_rank"] = ranks.gathered(found["bytes"])
    found["plain"] = all(type(parameter) is torch.nn.Parameter for parameter in ldm.unet.parameters())
    return found


def _step(model: SaliencyUnlearnModel, original: FrozenOriginal, optimizer: MaskedAdam, step: int) -> float:
    forget, retain = _batch(step), _batch(100 + step)
    context = torch.randn(4, 77, 32, generator=torch.Generator().manual_seed(200 + step))
    mine = slice(ranks.rank(), None, ranks.world_size())
    forget, retain, context = [t[mine] for t in forget], [t[mine] for t in retain], context[mine]
    loss, _, _ = salun_loss(model.ldm, (*forget, context), tuple(retain), 0.5, original, retain_model=None)
    (loss / ranks.world_size()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return sum(ranks.gathered(loss.item())) / ranks.world_size()


def _batch(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    return [latents, timesteps, noise, torch.randn(4, 77, 32, generator=generator)]


def _bytes(named: list[tuple[str, Tensor]], optimizer: MaskedAdam) -> int:
    """Of weights, of gradients as large as they are, and of the optimizer's state, in this process."""
    weights = sum(local(parameter.detach()).untyped_storage().nbytes() for _, parameter in named)
    state = sum(value.nbytes for kept in optimizer.state.values() for value in kept.values())
    return 2 * weights + state


def saliency(task: Task) -> dict[str, Tensor]:
    """That of four images, in the task's precision; of shards, put together again."""
    ldm = load_model(task.model_config, task.checkpoint)
    shapes = {name: parameter.shape for name, parameter in ldm.unet.named_parameters()}
    batches = [
        (*_batch(0), torch.zeros(1, 77, 32)),
        (*(part[:1] for part in _batch(1)), torch.zeros(1, 77, 32)),
    ]
    compute = Compute(precision=task.precision)
    split = ranks.world_size() > 1
    with computing(ldm, compute), sharded(ldm) if split else nullcontext():
        found = accumulate_saliency(ldm, batches, c_guidance=7.5, compute=compute)
    if split:
        found = joined_on_main({name: values.reshape(-1) for name, values in found.items()})
    return {name: values.view(shapes[name]) for name, values in found.items()}


def saliencies() -> dict[str, dict[str, Tensor]]:
    """Cases whose edges lie among equal values, in rows that do not come out even."""
    generator = torch.Generator().manual_seed(0)

    def case(levels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        shapes = {"wide": (7, 5, 3), "one_row": (1, 40), "vector": (301,), "even": (8, 6)}
        return {
            name: torch.randint(0, levels, shape, generator=generator).to(dtype) / levels
            for name, shape in shapes.items()
        }

    distinct = {name: torch.rand(values.shape, generator=generator) for name, values in case(2).items()}
    signed_zeros = {name: torch.where(values > 0.5, values, -0.0) for name, values in case(3).items()}
    return {
        "two levels": case(2),
        "five levels": case(5),
        "float64": case(5, torch.float64),
        "distinct": distinct,
        "signed zeros": signed_zeros,
        "small": {"bias": torch.full((3,), 1e-42)},
    }


def masks() -> dict[str, dict[str, Any]]:
    """The masks of each case from every process' rows, whole again; and those of a pool."""
    found: dict[str, dict[str, Any]] = {}
    for name, saliency in saliencies().items():
        rows = {key: own_rows(values) for key, values in saliency.items()}
        thresholds = THRESHOLDS if name != "small" else (0.5, 1.0)
        made = threshold_masks(rows, thresholds, shards=True)
        pool = list(saliency)[-1:]
        made += threshold_masks(rows, thresholds[1:], pool=pool, shards=True)
        found[name] = {
            "thresholds": thresholds,
            "pool": pool,
            "masks": [whole_mask(mask, saliency) for mask in made],
        }
    return found


def refused() -> list[list[str]]:
    """What each process says of saliencies that cannot be ranked, by case."""
    nan = torch.ones(4, 2)
    nan[3, 1] = torch.nan  # in the last rows alone
    negative = torch.ones(4, 2)
    negative[0] = -1
    said = []
    for values in (nan, negative, torch.zeros(4, 2)):
        rows = {"zeros": own_rows(torch.zeros(2)), "layer.weight": own_rows(values)}
        try:
            threshold_masks(rows, [0.5], shards=True)
        except MaskError as error:
            said.append(ranks.gathered(str(error)))
    return said
