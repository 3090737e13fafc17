from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from mu.algorithms.saliency_unlearning import optim_8bit
from mu.algorithms.saliency_unlearning.optim import MaskedAdam
from mu.algorithms.saliency_unlearning.optim_8bit import MaskedAdam8bit, MissingPackageError

SHAPES = {"large": (130, 80), "small": (33,)}


def make(dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()
    }
    return parameters, {name: torch.rand(s, generator=generator) < 0.5 for name, s in SHAPES.items()}


def steps(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {name: torch.randn(s, generator=generator) + 0.5 for name, s in SHAPES.items()} for _ in range(count)
    ]


def run(optimizer: MaskedAdam, parameters: dict[str, nn.Parameter], grads: list[dict[str, Tensor]]) -> None:
    for step in grads:
        for name, parameter in parameters.items():
            parameter.grad = step[name].to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_follows_adam_to_the_rounding_of_its_moments(dtype: torch.dtype) -> None:
    (ours, mask), (theirs, _), (start, _) = make(), make(), make()
    if dtype == torch.bfloat16:
        ours, theirs, start = make(dtype)[0], make(dtype)[0], make(dtype)[0]
    optimizer = MaskedAdam8bit(ours.items(), mask, 1e-2)
    run(optimizer, ours, steps(20))
    run(MaskedAdam(theirs.items(), mask, 1e-2), theirs, steps(20))
    for name, parameter in ours.items():
        moved = (theirs[name] - start[name])[mask[name]].float()
        off = (parameter - theirs[name])[mask[name]].float()
        assert (off.norm() / moved.norm()).item() < 0.05
        assert torch.equal(parameter[~mask[name]], start[name][~mask[name]])
    state = optimizer.state[ours["large"]]
    count = int(mask["large"].sum())
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert sum(state[key].nbytes for key in ("exp_avg", "exp_avg_sq", "scale", "scale_sq")) < 2.1 * count
    assert optimizer.state[ours["small"]]["exp_avg"].dtype == torch.float32


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit() -> None:
    (whole, mask), (resumed, _) = make(), make()
    grads = steps(6)
    run(MaskedAdam8bit(whole.items(), mask, 1e-2), whole, grads)
    first = MaskedAdam8bit(resumed.items(), mask, 1e-2)
    run(first, resumed, grads[:3])
    second = MaskedAdam8bit(resumed.items(), mask, 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, resumed, grads[3:])
    assert all(torch.equal(resumed[name], whole[name]) for name in SHAPES)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    optim_8bit._library.cache_clear()
    parameters, mask = make()
    with pytest.raises(MissingPackageError, match=r"pip install bitsandbytes"):
        MaskedAdam8bit(parameters.items(), mask, 1e-2)
