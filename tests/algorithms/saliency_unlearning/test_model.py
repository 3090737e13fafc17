from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mu.algorithms.saliency_unlearning.mask_file import MaskError
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.ldm import LatentDiffusion
from mu.ldm.params import UNetParams
from mu.ldm.unet import UNet
from mu.unlearning.moving import (
    TRAIN_METHODS,
    FrozenOriginal,
    TrainingError,
    TrainMethodError,
    names_of,
)
from tests.algorithms.saliency_unlearning.conftest import verify_unmasked

SD_V1_COUNTS = {
    "full": 859_520_964,
    "notime": 857_458_240,
    "noxattn": 813_495_680,
    "selfattn": 49_574_080,
    "xattn": 43_962_560,
    "selflayer": 8_193_920,
    "xlayer": 3_605_760,
}


def half_mask(unet: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in unet.named_parameters()}


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def sd_v1_unet() -> UNet:
    params = UNetParams(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        attention_resolutions=(4, 2, 1),
        num_res_blocks=2,
        channel_mult=(1, 2, 4, 4),
        num_heads=8,
        context_dim=768,
    )
    with torch.device("meta"):
        return UNet(params)


def test_train_methods_of_stable_diffusion_v1_have_the_published_counts(sd_v1_unet: UNet) -> None:
    sizes = {name: p.numel() for name, p in sd_v1_unet.named_parameters()}
    counts = {method: sum(sizes[name] for name in names_of(sd_v1_unet, method)) for method in TRAIN_METHODS}
    assert counts == SD_V1_COUNTS


def test_names_are_relative_to_the_unet_and_in_its_order(sd_v1_unet: UNet) -> None:
    every = [name for name, _ in sd_v1_unet.named_parameters()]
    assert names_of(sd_v1_unet, "full") == every
    xattn = names_of(sd_v1_unet, "xattn")
    assert xattn == [name for name in every if name in set(xattn)]
    assert xattn[0] == "input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    assert "out.2.weight" not in names_of(sd_v1_unet, "notime")
    assert "time_embed.0.weight" not in names_of(sd_v1_unet, "noxattn")


def test_an_unknown_method_and_one_without_weights_are_refused(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(TrainMethodError, match=r"is not one of: full, notime.*Did you mean 'xattn'\?"):
        names_of(tiny_model.unet, "xatn")
    with pytest.raises(TrainMethodError, match=r"these do: full, notime, noxattn, selfattn, xattn$"):
        names_of(tiny_model.unet, "selflayer")


def test_what_moves_is_train_method_and_mask(tiny_model: LatentDiffusion) -> None:
    mask = half_mask(tiny_model.unet)
    xattn = names_of(tiny_model.unet, "xattn")
    mask[xattn[0]][:] = False
    model = SaliencyUnlearnModel(tiny_model, "xattn", mask)
    assert list(model.selected) == xattn[1:] == [name for name, _ in model.parameters_to_train()]
    assert all(torch.equal(model.selected[name], mask[name]) for name in xattn[1:])
    parameters = dict(tiny_model.unet.named_parameters())
    moving = {name for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert moving == {f"model.diffusion_model.{name}" for name in xattn[1:]}
    assert model.counts == {
        "total": sum(p.numel() for p in parameters.values()),
        "train_method": sum(parameters[name].numel() for name in xattn),
        "mask": sum(int(marked.sum()) for marked in mask.values()),
        "selected": sum(int(mask[name].sum()) for name in xattn),
    }


def test_without_a_mask_the_whole_method_moves(
    tiny_model: LatentDiffusion, make_tiny_model: Callable[..., LatentDiffusion]
) -> None:
    model = SaliencyUnlearnModel(tiny_model, "full")
    assert model.counts["selected"] == model.counts["total"] == model.counts["mask"]
    with torch.no_grad():
        for parameter in tiny_model.unet.parameters():
            parameter.add_(1.0)
    verify_unmasked(model, make_tiny_model())


def test_masks_that_do_not_fit_are_refused(tiny_model: LatentDiffusion) -> None:
    mask = half_mask(tiny_model.unet)
    prefixed = {f"model.diffusion_model.{name}": marked for name, marked in mask.items()}
    with pytest.raises(MaskError, match="another model"):
        SaliencyUnlearnModel(tiny_model, "full", prefixed)
    without = {name: marked & ("attn2" not in name) for name, marked in mask.items()}
    with pytest.raises(MaskError, match="none of the weights that train_method 'xattn' moves"):
        SaliencyUnlearnModel(tiny_model, "xattn", without)


def test_selected_entries_may_change(
    tiny_model: LatentDiffusion, make_tiny_model: Callable[..., LatentDiffusion]
) -> None:
    model = SaliencyUnlearnModel(tiny_model, "noxattn", half_mask(tiny_model.unet))
    with torch.no_grad():
        for name, parameter in model.parameters_to_train():
            parameter[model.selected[name]] += 1.0
    verify_unmasked(model, make_tiny_model())


def test_promise_23_one_bit_outside_the_mask_is_found(
    tiny_model: LatentDiffusion, make_tiny_model: Callable[..., LatentDiffusion]
) -> None:
    mask, original = half_mask(tiny_model.unet), make_tiny_model()
    name = "middle_block.0.in_layers.2.weight"
    outside = tuple((~mask[name]).nonzero()[0].tolist())
    model = SaliencyUnlearnModel(tiny_model, "full", mask)
    with torch.no_grad():
        original.unet.get_parameter(name)[outside] = 0.0
        tiny_model.unet.get_parameter(name)[outside] = -0.0
    with pytest.raises(
        TrainingError, match=f"model.diffusion_model.{name} differs from .* outside what may move"
    ):
        verify_unmasked(model, original)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.time_embed.0.bias",  # in the mask, not in the train method
        "first_stage_model.decoder.conv_in.weight",
        "first_stage_model.post_quant_conv.bias",
        "betas",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_promise_23_frozen_tensors_are_watched(
    tiny_model: LatentDiffusion, make_tiny_model: Callable[..., LatentDiffusion], name: str
) -> None:
    model = SaliencyUnlearnModel(tiny_model, "noxattn", half_mask(tiny_model.unet))
    verify_unmasked(model, make_tiny_model())
    tiny_model.state_dict()[name].view(-1)[-1] += 1e-3
    with pytest.raises(TrainingError, match=name):
        verify_unmasked(model, make_tiny_model())


def test_it_stays_in_eval_mode(tiny_model: LatentDiffusion) -> None:
    tiny_model.train()
    model = SaliencyUnlearnModel(tiny_model, "full")
    wrapper = nn.ModuleList([model]).train()
    assert wrapper.training
    assert not any(module.training for module in model.modules())


def test_state_dict_keys_of_the_model_itself_stay_those_of_compvis(tiny_model: LatentDiffusion) -> None:
    keys = list(tiny_model.state_dict())
    model = SaliencyUnlearnModel(tiny_model, "full")
    assert list(model.ldm.state_dict()) == keys


@pytest.mark.parametrize("masked", [True, False])
def test_the_frozen_original_stands_in_and_leaves_no_trace(
    make_tiny_model: Callable[..., LatentDiffusion], masked: bool
) -> None:
    ldm, reference = make_tiny_model(), make_tiny_model()
    model = SaliencyUnlearnModel(ldm, "full", half_mask(ldm.unet) if masked else None)
    original = FrozenOriginal(model)
    with torch.no_grad():
        for name, parameter in model.parameters_to_train():
            parameter[model.selected[name]] += 0.1
    trained = bits_of(ldm)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    context, t = torch.randn(2, 5, 32, generator=generator), torch.tensor([3, 700])

    prediction = original.predict(noisy, t, context)
    with torch.no_grad():
        assert torch.equal(prediction, reference.predict(noisy, t, context))
        assert not torch.equal(prediction, ldm.predict(noisy, t, context))
    assert not prediction.requires_grad
    assert all(torch.equal(value, trained[name]) for name, value in ldm.state_dict().items())
    verify_unmasked(model, reference)


def test_a_failure_inside_still_brings_the_trained_weights_back(tiny_model: LatentDiffusion) -> None:
    model = SaliencyUnlearnModel(tiny_model, "full", half_mask(tiny_model.unet))
    with pytest.raises(RuntimeError, match="keep_originals"), model.frozen_originals():
        pass
    model.keep_originals()
    with torch.no_grad():
        for name, parameter in model.parameters_to_train():
            parameter[model.selected[name]] += 0.1
    trained = bits_of(tiny_model)
    with pytest.raises(ZeroDivisionError), model.frozen_originals():
        raise ZeroDivisionError
    assert all(torch.equal(value, trained[name]) for name, value in tiny_model.state_dict().items())
