"""Names and shapes in diffusers' format are those of diffusers' and transformers' own networks, and lead back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from mu.algorithms.saliency_unlearning.configs import PACKAGED
from mu.ldm import CheckpointError, LatentDiffusion, load_model
from mu.ldm.diffusers_configs import diffusers_configs
from mu.ldm.diffusers_tensors import from_diffusers, to_diffusers
from mu.ldm.schedule import SCHEDULE_KEYS
from tests.conftest import TINY_V2
from tests.ldm import diffusers_names

diffusers = pytest.importorskip("diffusers")
ModelMaker = Callable[..., LatentDiffusion]

TINY: dict[str, dict[str, Any]] = {
    "as SD v1": {},
    "as SD v2": TINY_V2,
    "three levels, attention at one": {
        "unet": {"channel_mult": [1, 2, 2], "attention_resolutions": [2], "num_res_blocks": 2},
        "autoencoder": {"ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [8]},
    },
    "no attention but in the middle": {"unet": {"attention_resolutions": [], "num_res_blocks": 2}},
    "one level": {"unet": {"channel_mult": [1]}, "autoencoder": {"ch_mult": [1]}},
}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def their_networks(model: LatentDiffusion) -> dict[str, nn.Module]:
    """diffusers' and transformers' networks of the configuration files that are written, without values."""
    configs = diffusers_configs(model.params)
    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }


def in_one(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As one file has them: the component before each name."""
    return {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}


def text_name(name: str) -> str:
    """As published files have it, whatever release of transformers is installed."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def assert_names_are_theirs(model: LatentDiffusion) -> None:
    ours = to_diffusers(model.state_dict(), model.params)
    for part, network in their_networks(model).items():
        theirs = {name: tensor for name, tensor in network.state_dict().items() if "position_ids" not in name}
        if part == "text_encoder":
            theirs = {text_name(name): tensor for name, tensor in theirs.items()}
        assert shapes(ours[part]) == shapes(theirs), part
    back = from_diffusers(in_one(ours), model.params, source="there and back")
    assert shapes(back) == shapes({k: t for k, t in model.state_dict().items() if k not in SCHEDULE_KEYS})


@pytest.mark.parametrize(
    ("name", "unet_weights"),
    [("model_config", 859_520_964), ("sd_v2_base", 865_910_724), ("sd_v2_v", 865_910_724)],
)
def test_stable_diffusion(name: str, unet_weights: int) -> None:
    model = load_model(PACKAGED / f"{name}.yaml", device="meta")
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == unet_weights
    assert model.image_size == (768 if name == "sd_v2_v" else 512)
    assert model.params.parameterization == ("v" if name == "sd_v2_v" else "eps")
    assert_names_are_theirs(model)


@pytest.mark.parametrize("sections", TINY.values(), ids=TINY.keys())
def test_other_shapes(make_tiny_model: ModelMaker, sections: dict[str, Any]) -> None:
    assert_names_are_theirs(make_tiny_model(**sections).to("meta"))


@pytest.mark.parametrize("sections", TINY.values(), ids=TINY.keys())
def test_each_tensor_gets_the_name_of_its_place_and_keeps_its_bits(
    make_tiny_model: ModelMaker, sections: dict[str, Any]
) -> None:
    """Shapes alone would not show two tensors of one shape that change places."""
    model = make_tiny_model(**sections)
    state = dict(model.state_dict())
    ours = to_diffusers(state, model.params)
    unet, vae = model.params.unet, model.params.first_stage
    for key, tensor in state.items():
        if key.startswith("model.diffusion_model."):
            name = diffusers_names.unet_name(key.removeprefix("model.diffusion_model."), unet.num_res_blocks)
            assert ours["unet"][name] is tensor
        elif key.startswith("first_stage_model."):
            name = diffusers_names.vae_name(key.removeprefix("first_stage_model."), len(vae.ch_mult))
            assert torch.equal(ours["vae"][name].flatten(), tensor.flatten())
    back = from_diffusers(in_one(ours), model.params, source="there and back")
    assert back.keys() == state.keys() - SCHEDULE_KEYS
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_old_names_of_the_autoencoder_and_both_spellings_of_the_text_encoder(
    make_tiny_model: ModelMaker,
) -> None:
    model = make_tiny_model()
    state = dict(model.state_dict())
    parts = to_diffusers(state, model.params)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new_name, old_name in old.items():
        parts["vae"] = {
            name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in parts["vae"].items()
        }
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in parts["vae"]
    parts["text_encoder"] = {
        name.removeprefix("text_model."): tensor for name, tensor in parts["text_encoder"].items()
    }
    parts["text_encoder"]["embeddings.position_ids"] = torch.arange(77)[None]
    parts["text_encoder"]["logit_scale"] = torch.tensor(4.6)
    back = from_diffusers(in_one(parts), model.params, source="old folder")
    assert back.keys() == state.keys() - SCHEDULE_KEYS
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_tensors_without_a_place_are_listed(make_tiny_model: ModelMaker) -> None:
    for sections in ({}, TINY_V2):
        model = make_tiny_model(**sections)
        parts = to_diffusers(model.state_dict(), model.params)
        parts["unet"]["add_embedding.linear_1.weight"] = torch.zeros(1)
        parts["vae"]["encoder.extra.weight"] = torch.zeros(1)
        with pytest.raises(
            CheckpointError, match=r"f: .*2 unexpected \(unet: add_embedding.*vae: encoder\.extra"
        ):
            from_diffusers(in_one(parts), model.params, source="f:")


@pytest.mark.parametrize(
    "sections",
    [{"unet": {"channel_mult": [2, 2]}}, {"autoencoder": {"ch_mult": [2, 2]}}],
    ids=["UNet", "VAE"],
)
def test_a_network_that_diffusers_does_not_have_is_refused(
    make_tiny_model: ModelMaker, sections: dict[str, Any]
) -> None:
    model = make_tiny_model(**sections)
    with pytest.raises(CheckpointError, match="mult begins with 2: diffusers has no such network"):
        to_diffusers(model.state_dict(), model.params)


def test_a_piece_of_query_key_and_value_that_is_missing_is_named(make_tiny_model: ModelMaker) -> None:
    model = make_tiny_model(**TINY_V2)
    parts = to_diffusers(model.state_dict(), model.params)
    del parts["text_encoder"]["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"resblocks\.1\.attn\.in_proj_bias, k_proj is missing"):
        from_diffusers(in_one(parts), model.params, source="folder")
