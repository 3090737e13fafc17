from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mu.algorithms.saliency_unlearning.optim import MaskedAdam
from mu.unlearning import optim
from mu.unlearning.optim import SelectionError

SHAPES: dict[str, tuple[int, ...]] = {
    "conv": (5, 3, 3, 3),
    "linear": (7, 11),
    "bias": (33,),
    "one": (1,),
    "rest": (6,),
}


def make_parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def make_mask(density: float = 0.4, seed: int = 1) -> dict[str, Tensor]:
    """Partly selected tensors, one that is wholly selected, and one of which nothing is."""
    generator = torch.Generator().manual_seed(seed)
    mask = {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}
    mask["one"][:] = True
    mask["rest"][:] = False
    return mask


def gradients(steps: int, seed: int = 2) -> list[dict[str, Tensor]]:
    """Of very different sizes, zero at times."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            n: torch.randn(s, generator=generator) * 10.0 ** (k % 5 - 3) * (k % 4 > 0)
            for n, s in SHAPES.items()
        }
        for k in range(steps)
    ]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the rounding of the fused update, a bit or two a step."""
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def set_gradients(parameters: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.grad = grads[name].to(parameter.dtype)


def selected_bytes(optimizer: MaskedAdam) -> int:
    return sum(v.nbytes for state in optimizer.state.values() for key, v in state.items() if key != "step")


@pytest.mark.parametrize("bucket", [1, 50, 1 << 25])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_it_is_dense_adam_on_masked_gradients(
    monkeypatch: pytest.MonkeyPatch, density: float, bucket: int
) -> None:
    monkeypatch.setattr(optim, "_BUCKET_ENTRIES", bucket)
    parameters, dense, start = make_parameters(), make_parameters(), make_parameters()
    mask = make_mask(density)
    ours = MaskedAdam(parameters.items(), mask, 1e-2, betas=(0.8, 0.99), eps=1e-6)
    theirs = torch.optim.Adam(dense.values(), lr=1e-2, betas=(0.8, 0.99), eps=1e-6)
    for grads in gradients(20):
        set_gradients(parameters, grads)
        set_gradients(dense, {name: grad * mask[name] for name, grad in grads.items()})
        ours.step()
        theirs.step()
        for name, parameter in parameters.items():
            assert_close(parameter, dense[name])
    for name, parameter in parameters.items():
        assert torch.equal(bits(parameter)[~mask[name]], bits(start[name])[~mask[name]])
        assert not (parameter == start[name])[mask[name]].any()


def test_entries_outside_are_never_written_whatever_they_hold() -> None:
    """NaN with a payload, -0.0 and infinities stay what they are, to the bit."""
    parameters, mask = make_parameters(), make_mask()
    strange = torch.tensor([0x7FC01234, -0x80000000, 0x7F800000, 1], dtype=torch.int64).to(torch.int32)
    for name, parameter in parameters.items():
        outside = bits(parameter)[~mask[name]]
        outside[:] = strange.repeat(math.ceil(len(outside) / 4))[: len(outside)]
        with torch.no_grad():
            parameter[~mask[name]] = outside.view(torch.float32)
    before = {name: bits(parameter).clone() for name, parameter in parameters.items()}
    optimizer = MaskedAdam(parameters.items(), mask, 1e-2)
    for grads in gradients(3):
        set_gradients(parameters, grads)
        optimizer.step()
    for name, parameter in parameters.items():
        assert torch.equal(bits(parameter)[~mask[name]], before[name][~mask[name]])


def test_state_is_kept_for_selected_entries_alone() -> None:
    parameters, mask = make_parameters(), make_mask()
    optimizer = MaskedAdam(parameters.items(), mask, 1e-2)
    set_gradients(parameters, gradients(2)[1])
    optimizer.step()
    count = sum(int(marked.sum()) for marked in mask.values())
    assert selected_bytes(optimizer) == 2 * 4 * count
    assert parameters["rest"] not in optimizer.state
    assert all(
        parameter is not parameters["rest"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_lower_precision_are_refused(dtype: torch.dtype) -> None:
    """Steps that are below half of the last bit would be lost, as most are at 1e-5."""
    with pytest.raises(ValueError, match=rf"parameter \w+ is {dtype}: train in fp32"):
        MaskedAdam(make_parameters(dtype).items(), make_mask(), 1e-5)


def test_no_weight_moves_when_memory_runs_out_for_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, mask = make_parameters(), make_mask()
    before = {name: bits(parameter).clone() for name, parameter in parameters.items()}
    optimizer = MaskedAdam(parameters.items(), mask, 1e-2)
    monkeypatch.setattr(optim, "_BUCKET_ENTRIES", 1)
    set_gradients(parameters, gradients(2)[1])
    whole, last = torch.zeros, int(mask["bias"].sum())

    def too_much(size: Any, **options: Any) -> Tensor:
        return whole(2**52 if size == last else size, **options)

    monkeypatch.setattr(torch, "zeros", too_much)
    with pytest.raises(RuntimeError, match="allocate"):
        optimizer.step()
    assert all(torch.equal(bits(parameter), before[name]) for name, parameter in parameters.items())


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit() -> None:
    mask, steps = make_mask(), gradients(10)
    whole = make_parameters()
    optimizer = MaskedAdam(whole.items(), mask, 1e-2)
    for k, grads in enumerate(steps):
        if k == 4:
            weights = {name: p.detach().clone() for name, p in whole.items()}
            state = copy.deepcopy(optimizer.state_dict())
        set_gradients(whole, grads)
        optimizer.step()

    resumed = {name: nn.Parameter(value) for name, value in weights.items()}
    again = MaskedAdam(resumed.items(), mask, 0.5)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == 1e-2
    for grads in steps[4:]:
        set_gradients(resumed, grads)
        again.step()
    for name, parameter in resumed.items():
        assert torch.equal(bits(parameter), bits(whole[name]))
    assert all(state["exp_avg"].dtype == torch.float32 for state in again.state.values())


def test_a_loaded_state_is_a_copy() -> None:
    parameters, mask = make_parameters(), make_mask()
    optimizer = MaskedAdam(parameters.items(), mask, 1e-2)
    set_gradients(parameters, gradients(2)[1])
    optimizer.step()
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other_parameters = make_parameters()
    other = MaskedAdam(other_parameters.items(), mask, 1e-2)
    other.load_state_dict(saved)
    set_gradients(other_parameters, gradients(2)[1])
    other.step()
    for index, state in before["state"].items():
        assert all(torch.equal(value, saved["state"][index][key]) for key, value in state.items())


def test_the_state_of_another_mask_is_refused() -> None:
    parameters = make_parameters()
    optimizer = MaskedAdam(parameters.items(), make_mask(0.4), 1e-2)
    set_gradients(parameters, gradients(2)[1])
    optimizer.step()
    with pytest.raises(SelectionError, match="another mask"):
        MaskedAdam(make_parameters().items(), make_mask(0.6), 1e-2).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("grad_channels_last", [False, True])
def test_channels_last_weights_are_updated_in_place(density: float, grad_channels_last: bool) -> None:
    mask = make_mask(density)
    plain, last = make_parameters(), make_parameters()
    last["conv"].data = last["conv"].data.to(memory_format=torch.channels_last)
    ours, theirs = MaskedAdam(last.items(), mask, 1e-2), MaskedAdam(plain.items(), mask, 1e-2)
    for grads in gradients(3):
        set_gradients(plain, grads)
        set_gradients(last, grads)
        if grad_channels_last:
            last["conv"].grad = grads["conv"].to(memory_format=torch.channels_last)
        ours.step()
        theirs.step()
    assert last["conv"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last["conv"], plain["conv"])


def test_other_layouts_are_refused() -> None:
    parameter = nn.Parameter(torch.randn(4, 6).t())
    with pytest.raises(ValueError, match="contiguous"):
        MaskedAdam([("w", parameter)], {"w": torch.ones(6, 4, dtype=torch.bool)}, 1e-2)


def test_a_view_into_a_larger_storage_is_updated_where_it_lies() -> None:
    storage = torch.zeros(12)
    parameter = nn.Parameter(storage[4:8])
    parameter.grad = torch.ones(4)
    MaskedAdam([("w", parameter)], {"w": torch.tensor([True, False, True, True])}, 0.5).step()
    torch.testing.assert_close(storage, torch.tensor([0.0] * 4 + [-0.5, 0.0, -0.5, -0.5] + [0.0] * 4))


def test_parameters_without_gradient_wait() -> None:
    parameters, mask = make_parameters(), make_mask()
    optimizer = MaskedAdam(parameters.items(), mask, 1e-2)
    set_gradients(parameters, gradients(2)[1])
    parameters["conv"].grad = None
    before = parameters["conv"].detach().clone()
    optimizer.step()
    assert torch.equal(parameters["conv"], before)
    assert parameters["conv"] not in optimizer.state
    assert optimizer.state[parameters["linear"]]["step"].item() == 1


def test_a_closure_is_called_with_gradients_on_and_a_schedule_can_set_the_rate() -> None:
    parameters, dense, mask = make_parameters(), make_parameters(), make_mask(1.0)
    ours = MaskedAdam(parameters.items(), mask, 1e-2)
    theirs = torch.optim.Adam([p for n, p in dense.items() if n != "rest"], lr=1e-2)

    def loss_of(values: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in values.values()]).sum()
            loss.backward()
            return loss

        return closure

    for rate in (1e-2, 1e-3, 0.1):
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = rate
        assert ours.step(loss_of(parameters, ours)) == theirs.step(loss_of(dense, theirs))
    for name, parameter in parameters.items():
        assert_close(parameter, dense[name])


def test_masks_that_do_not_fit_are_refused() -> None:
    parameters = make_parameters()
    with pytest.raises(SelectionError, match="no entry for parameter conv"):
        MaskedAdam(
            parameters.items(), {f"model.{name}": marked for name, marked in make_mask().items()}, 1e-2
        )
    with pytest.raises(SelectionError, match=r"linear has shape \(11, 7\)"):
        MaskedAdam(parameters.items(), {**make_mask(), "linear": torch.ones(11, 7, dtype=torch.bool)}, 1e-2)
    with pytest.raises(SelectionError, match="not bool"):
        MaskedAdam(parameters.items(), {**make_mask(), "linear": torch.ones(7, 11)}, 1e-2)
    with pytest.raises(SelectionError, match="nothing to train"):
        MaskedAdam([("rest", parameters["rest"])], make_mask(), 1e-2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"eps": -1e-8},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        MaskedAdam(make_parameters().items(), make_mask(), **{"lr": 1e-3, **wrong})  # type: ignore[arg-type]
