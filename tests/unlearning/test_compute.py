"""Each faster or smaller way to compute, against the simple one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.masking import accumulate_saliency
from mu.algorithms.saliency_unlearning.trainer import salun_loss
from mu.config import override, resolve_path
from mu.ldm import LatentDiffusion, load_model
from mu.ldm.unet import UNet
from mu.unlearning import compute as compute_module
from mu.unlearning.compute import (
    Compute,
    OutOfMemoryError,
    activation_bytes,
    choose,
    choose_for,
    computing,
    encoders_at_hand,
    free_bytes,
    halved,
    is_out_of_memory,
    less_at_once,
)
from tests.algorithms.saliency_unlearning.test_trainer import tiny_batch

LATENT = (4, 8, 8)
AUTO = SimpleNamespace(
    AUTO_PRECISION="bf16-mixed",
    precision="auto",
    channels_last=None,
    gradient_checkpointing=None,
    compile=False,
)


def gradients(ldm: LatentDiffusion, compute: Compute) -> Tensor:
    """(n,) of the loss of training, over all weights of the UNet."""
    batch = tiny_batch(0)
    ldm.requires_grad_(True)
    with computing(ldm, compute):
        with compute.autocast(ldm.device):
            loss, *_ = salun_loss(ldm, batch.forget, batch.retain, 0.5)
        loss.backward()
        found = torch.cat([p.grad.float().reshape(-1) for p in ldm.unet.parameters()])  # type: ignore[union-attr]
        ldm.zero_grad(set_to_none=True)
    return found


def saliency(ldm: LatentDiffusion, compute: Compute) -> Tensor:
    """(n,), from one batch."""
    latents, timesteps, noise, context, uncond = tiny_batch(0).forget
    with computing(ldm, compute):
        found = accumulate_saliency(
            ldm, [(latents, timesteps, noise, context, uncond)], c_guidance=7.5, compute=compute
        )
    assert all(values.dtype == torch.float32 and values.is_contiguous() for values in found.values())
    return torch.cat([values.reshape(-1) for values in found.values()])


@pytest.mark.parametrize("measure", [gradients, saliency])
@pytest.mark.parametrize(
    ("compute", "bound"),
    [
        (Compute(gradient_checkpointing=True), 1e-6),
        (Compute(channels_last=True), 1e-5),
        (Compute(channels_last=True, gradient_checkpointing=True), 1e-5),
        (Compute(precision="bf16-mixed"), 0.05),
        (Compute(precision="bf16-mixed", gradient_checkpointing=True), 0.05),
        (Compute(precision="bf16-mixed", channels_last=True), 0.05),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_simple_way(
    tiny_model: LatentDiffusion, measure: Any, compute: Compute, bound: float
) -> None:
    """The bound is on the norm of the difference, relative to the gradient's."""
    simple, found = measure(tiny_model, Compute()), measure(tiny_model, compute)
    assert ((found - simple).norm() / simple.norm()).item() < bound
    if compute.precision != "fp32":
        assert not torch.equal(found, simple)  # it did compute in another precision


@pytest.mark.slow
def test_compiled_gradients_are_those_of_the_simple_way(tiny_model: LatentDiffusion) -> None:
    simple, found = gradients(tiny_model, Compute()), gradients(tiny_model, Compute(compile=True))
    assert ((found - simple).norm() / simple.norm()).item() < 1e-5


def test_compile_translates_the_unet_and_is_undone(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def translated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            calls.append(args)
            return forward(*args)

        return run

    monkeypatch.setattr(torch, "compile", translated)
    names = [name for name, _ in tiny_model.named_parameters()]
    simple = gradients(tiny_model, Compute())
    assert not calls
    assert torch.equal(gradients(tiny_model, Compute(compile=True)), simple)
    assert len(calls) == 2
    assert torch.equal(gradients(tiny_model, Compute()), simple)
    assert len(calls) == 2
    assert [name for name, _ in tiny_model.named_parameters()] == names


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_what_it_was(tiny_model: LatentDiffusion, fails: bool) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    parameters = list(tiny_model.unet.parameters())
    compute = Compute(precision="bf16-mixed", channels_last=True, gradient_checkpointing=True)
    layout = tiny_model.unet.input_blocks[0][0].weight  # type: ignore[index]
    try:
        with computing(tiny_model, compute):
            assert {p.dtype for p in parameters} == {torch.float32}
            assert layout.is_contiguous(memory_format=torch.channels_last)
            assert not layout.is_contiguous()
            assert tiny_model.unet.gradient_checkpointing
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert all(p is q for p, q in zip(parameters, tiny_model.unet.parameters(), strict=True))
    assert not tiny_model.unet.gradient_checkpointing
    for name, value in tiny_model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert value.is_contiguous()
        assert torch.equal(value, before[name])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is 'bf16'; known: fp32, tf32, bf16-mixed"):
        Compute(precision="bf16")


# ---- what is chosen


def chosen(ldm: LatentDiffusion, **keys: Any) -> Compute:
    wanted = SimpleNamespace(**{**vars(AUTO), **keys})
    return choose(wanted, ldm, images=4, latent_shape=LATENT, reserved=0)


def test_on_a_cpu_with_memory_the_choice_is_the_simple_way(tiny_model: LatentDiffusion) -> None:
    assert chosen(tiny_model) == Compute(recompute_if_short=True)


def test_what_is_asked_for_is_taken(tiny_model: LatentDiffusion) -> None:
    asked = {
        "precision": "bf16-mixed",
        "channels_last": True,
        "gradient_checkpointing": True,
        "compile": True,
    }
    assert chosen(tiny_model, **asked) == Compute(**asked)  # type: ignore[arg-type]


def saved_bytes(unet: UNet, images: int, side: int) -> int:
    """What autograd keeps of a forward pass, counted as it keeps it."""
    kept: dict[int, Tensor] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    context = torch.zeros(images, 77, unet.params.context_dim or 1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(torch.zeros(images, 4, side, side), torch.zeros(images, dtype=torch.int64), context)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("model", ["tiny", "emoji"])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(
    tiny_model: LatentDiffusion, model: str
) -> None:
    unet = tiny_model.unet
    if model == "emoji":
        unet = load_model(resolve_path("package:assets/emoji_canvas/model_config.yaml")).unet
    unet.requires_grad_(True)
    counted = saved_bytes(unet, 4, 16) / 4
    assert 0.7 < activation_bytes(unet.params, (4, 16, 16)) / counted < 1.5


def test_activations_that_do_not_fit_a_cpu_are_computed_again(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * activation_bytes(tiny_model.params.unet, LATENT)
    for free, expected in ((1.3 * needed, False), (1.2 * needed, True)):
        monkeypatch.setattr(compute_module, "free_bytes", lambda _, free=free: int(free))
        assert chosen(tiny_model).gradient_checkpointing is expected
        assert chosen(tiny_model, gradient_checkpointing=False).gradient_checkpointing is False
    monkeypatch.setattr(compute_module, "free_bytes", lambda _: int(1.3 * needed))
    reserving = choose(AUTO, tiny_model, images=4, latent_shape=LATENT, reserved=needed)
    assert reserving.gradient_checkpointing


def test_free_memory_is_less_than_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    free = free_bytes(torch.device("cpu"))
    assert 0 < free < 2**50
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(compute_module, "_CGROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 2000


# ---- out of memory


def test_errors_of_allocation_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value)


def test_half_as_many_images_until_there_is_one() -> None:
    assert [halved(n, reason="full") for n in (8, 7, 3, 2)] == [4, 3, 1, 1]
    with pytest.raises(OutOfMemoryError, match=r"one image at a time \(full\).*gradient_checkpointing true"):
        halved(1, reason="full")


def test_promise_22_recompute_first_then_halve(tiny_model: LatentDiffusion) -> None:
    unet, left_open = tiny_model.unet, Compute(recompute_if_short=True)
    seen = []
    with computing(tiny_model, left_open):
        images = 8
        for _ in range(3):
            images = less_at_once(unet, left_open, images, reason="full")
            seen.append((images, unet.gradient_checkpointing))
    assert seen == [(8, True), (4, True), (2, True)]
    assert not unet.gradient_checkpointing
    with computing(tiny_model, Compute()):  # asked for: gradient_checkpointing false
        assert less_at_once(unet, Compute(), 8, reason="full") == 4
        assert not unet.gradient_checkpointing


# ---- on a GPU


@pytest.mark.gpu
def test_on_a_gpu_encoders_leave_its_memory_and_come_back(make_tiny_model: Any) -> None:
    ldm = make_tiny_model().cuda()
    before = {name: value.clone() for name, value in ldm.state_dict().items()}
    found = chosen(ldm)
    assert found.channels_last
    assert found.precision == "bf16-mixed"
    with computing(ldm, found):
        assert {p.device.type for p in ldm.first_stage_model.parameters()} == {"cpu"}
        assert {p.device.type for p in ldm.cond_stage_model.parameters()} == {"cpu"}
        assert {p.device.type for p in ldm.unet.parameters()} == {"cuda"}
    assert {p.device.type for p in ldm.parameters()} == {"cuda"}
    assert all(torch.equal(value, before[name]) for name, value in ldm.state_dict().items())


def test_tf32_is_for_what_asks_for_it_and_beside_bf16(make_tiny_model: Any) -> None:
    ldm = make_tiny_model()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision in ("fp32", "tf32", "bf16-mixed"):
        with computing(ldm, Compute(precision=precision)):
            allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            assert set(allowed) == {precision != "fp32"}
            with encoders_at_hand(ldm):
                assert not torch.backends.cuda.matmul.allow_tf32
                assert not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_promise_29_autocast_keeps_no_rounded_weights() -> None:
    """Before torch 2.11 those of a prediction without gradient would serve, without gradient, the next one."""
    kept = torch.is_autocast_cache_enabled()
    for precision in ("fp32", "bf16-mixed"):
        with Compute(precision=precision).autocast(torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") is (precision == "bf16-mixed")
            assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled() is kept


@pytest.mark.parametrize(
    ("config", "capability", "expected"),
    [
        (MaskConfig, (8, 0), "tf32"),
        (MaskConfig, (7, 5), "fp32"),
        (TrainConfig, (8, 0), "bf16-mixed"),
        (TrainConfig, (7, 5), "fp32"),
    ],
)
def test_auto_is_tf32_for_a_mask_and_bf16_for_training(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    config: type[MaskConfig] | type[TrainConfig],
    capability: tuple[int, int],
    expected: str,
) -> None:
    """Of a GPU's generation only what torch tells is stood in for; the choice is made without computing there."""
    keys = config(**({} if config is MaskConfig else {"masking": "none"}), gradient_checkpointing=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))

    def precision(device: str, **changes: Any) -> str:
        return choose_for(override(keys, **changes), torch.device(device)).precision

    assert precision("cuda") == expected
    assert precision("cpu") == "fp32"
    assert not caplog.records
    assert precision("cuda", precision="tf32") == ("tf32" if capability >= (8, 0) else "fp32")
    assert bool(caplog.records) is (capability < (8, 0))
    caplog.clear()
    assert precision("cpu", precision="tf32") == "fp32"
    assert "precision tf32: cpu does not have it" in caplog.text


def test_what_the_allocator_keeps_for_itself_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    assert free_bytes(torch.device("cuda", 0)) == 1400
