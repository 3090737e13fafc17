"""Each kind of checkpoint is recognised and said; a file that is none is called what it is; a base completes parts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mu.algorithms.saliency_unlearning.mask_file import save_mask
from mu.commands.convert import ConvertConfig
from mu.config import check_paths
from mu.ldm import CheckpointError, LatentDiffusion, describe_checkpoint, load_model, save_checkpoint
from mu.ldm.convert import convert_checkpoint
from mu.ldm.diffusers_tensors import to_diffusers
from mu.ldm.ema import ema_name
from mu.ldm.patch import PatchError, patch_checkpoint
from mu.ldm.recognise import COMPVIS, READ_HERE, kind_of, other_kind
from mu.ldm.tensor_file import read_state_dict, write_state_dict
from tests.conftest import TINY_V2, tiny_model_yaml

ModelMaker = Callable[..., LatentDiffusion]
UNET = "model.diffusion_model."


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.full((2, 2), 0.5) for name in names}


# ---- what is read


def test_each_kind_is_recognised_read_and_said(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    count = sum(parameter.numel() for parameter in tiny_model.unet.parameters())
    save_checkpoint(tiny_model, tmp_path / "compvis.safetensors")
    convert_checkpoint(
        tmp_path / "compvis.safetensors", tmp_path / "folder", model_config_path=tiny_yaml, format="diffusers"
    )
    parts = to_diffusers(tiny_model.state_dict(), tiny_model.params)
    joined = {f"{part}.{name}": t for part, found in parts.items() for name, t in found.items()}
    write_state_dict(joined, tmp_path / "whole.safetensors")
    torch.save(dict(tiny_model.state_dict()), tmp_path / "bare.pth")
    copies = {ema_name(key): t for key, t in tiny_model.state_dict().items() if key.startswith(UNET)}
    write_state_dict({**tiny_model.state_dict(), **copies}, tmp_path / "ema.ckpt")
    kinds = {
        "compvis.safetensors": "CompVis checkpoint",
        "folder": "diffusers folder",
        "whole.safetensors": "diffusers checkpoint",
        "bare.pth": "CompVis checkpoint",
        "ema.ckpt": "CompVis checkpoint",
    }
    for name, kind in kinds.items():
        described = describe_checkpoint(tmp_path / name)
        assert (described.kind, described.text_encoder, described.context_dim) == (kind, "CLIP", 32), name
        assert (described.unet_weights, described.ema) == (count, name == "ema.ckpt"), name
        assert described.dtypes[0] == "float32"
        with caplog.at_level(logging.INFO, logger="mu"):
            caplog.clear()
            model = load_model(tiny_yaml, tmp_path / name)
        for key, tensor in tiny_model.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), (name, key)
        assert f"{tmp_path / name} is a {kind}: UNet of {count:,} weights" in caplog.text


def test_the_text_encoder_of_sd_v2_is_said(tmp_path: Path, make_tiny_model: ModelMaker) -> None:
    save_checkpoint(make_tiny_model(**TINY_V2), tmp_path / "v2.safetensors")
    described = describe_checkpoint(tmp_path / "v2.safetensors")
    assert described.text_encoder == "OpenCLIP"
    assert str(described).endswith("prompts 32 wide, text encoder OpenCLIP, no EMA weights; float32")


# ---- what is not

# What it is called, a part of the advice, and a file of the kind: names as the programs write them.
MERGE, STEERS = "fuse_lora", "give the Stable Diffusion that it steers"
OTHERS: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "LoRA of kohya": (
        "a LoRA",
        MERGE,
        named("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_x.alpha"),
    ),
    "LoRA of peft": ("a LoRA", MERGE, named("unet.down_blocks.0.attentions.0.to_q.lora_A.weight")),
    "LoRA of peft, adapter": (
        "a LoRA",
        MERGE,
        named("base_model.model.mid_block.to_k.lora_B.default.weight"),
    ),
    "LoRA of diffusers": ("a LoRA", MERGE, named("unet.up_blocks.1.attn1.processor.to_q_lora.down.weight")),
    "LoHa": ("a LoRA", MERGE, named("lora_unet_mid_block_x.hada_w1_a", "lora_unet_mid_block_x.hada_w1_b")),
    "embedding": ("a textual-inversion embedding", "new words", {"<cat-toy>": torch.rand(768)}),
    "embedding, file": ("a textual-inversion embedding", "new words", {"emb_params": torch.rand(4, 768)}),
    "embedding of SDXL": (
        "a textual-inversion embedding",
        "new words",
        {"clip_g": torch.rand(2, 1280), "clip_l": torch.rand(2, 768)},
    ),
    "ControlNet": ("a ControlNet", STEERS, named("control_model.time_embed.0.weight", f"{UNET}out.2.bias")),
    "ControlNet of diffusers": (
        "a ControlNet",
        STEERS,
        named("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
    ),
    "IP-Adapter": ("an IP-Adapter", STEERS, named("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    "Flux": ("Flux", READ_HERE, named("double_blocks.0.img_attn.qkv.weight", "img_in.weight")),
    "Flux of ComfyUI": ("Flux", READ_HERE, named(f"{UNET}double_blocks.0.img_attn.qkv.weight")),
    "Flux of diffusers": ("Flux", READ_HERE, named("single_transformer_blocks.0.attn.to_q.weight")),
    "SD 3": ("Stable Diffusion 3", READ_HERE, named(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight")),
    "SD 3 of diffusers": (
        "Stable Diffusion 3",
        READ_HERE,
        named("transformer_blocks.0.attn.add_q_proj.weight"),
    ),
    "PixArt": ("a diffusion transformer", READ_HERE, named("transformer_blocks.0.attn1.to_q.weight")),
    "SDXL": (
        "SDXL",
        READ_HERE,
        named(
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
            f"{UNET}label_emb.0.0.weight",
            "first_stage_model.quant_conv.bias",
        ),
    ),
    "SDXL's UNet": ("SDXL", READ_HERE, named("add_embedding.linear_1.weight", "conv_in.weight")),
    "inpainting": (
        "an inpainting model",
        "take the text-to-image model",
        {
            f"{UNET}input_blocks.0.0.weight": torch.rand(32, 9, 3, 3),
            f"{UNET}out.2.weight": torch.rand(4, 32, 3, 3),
            "first_stage_model.quant_conv.bias": torch.rand(8),
        },
    ),
    "inpainting's UNet": (
        "an inpainting model",
        "take the text-to-image model",
        {"conv_in.weight": torch.rand(32, 9, 3, 3), "conv_out.weight": torch.rand(4, 32, 3, 3)},
    ),
    "InstructPix2Pix": (
        "InstructPix2Pix",
        "take the text-to-image model",
        {
            f"{UNET}input_blocks.0.0.weight": torch.rand(32, 8, 3, 3),
            f"{UNET}out.2.weight": torch.rand(4, 32, 3, 3),
        },
    ),
    "VAE": (
        r"an autoencoder \(VAE\) alone",
        "whole checkpoint",
        named("encoder.down.0.block.0.conv1.weight"),
    ),
    "VAE of diffusers": (
        r"an autoencoder \(VAE\) alone",
        "whole checkpoint",
        named("encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"),
    ),
    "VAE, prefixed": (r"an autoencoder \(VAE\) alone", "whole", named("first_stage_model.quant_conv.weight")),
    "CLIP text": (
        "a text encoder alone",
        "whole checkpoint",
        named("text_model.encoder.layers.0.mlp.fc1.weight", "text_model.final_layer_norm.bias"),
    ),
    "CLIP": (
        "a whole CLIP",
        "whole checkpoint",
        named("text_model.final_layer_norm.bias", "vision_model.x.bias"),
    ),
    "T5": ("a T5 text encoder alone", "Flux", named("encoder.block.0.layer.0.SelfAttention.q.weight")),
    "no UNet": (
        "a checkpoint without its UNet",
        "whole checkpoint",
        named(
            "first_stage_model.quant_conv.bias",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        ),
    ),
    "classifier": (
        "an image classifier",
        "classifier_path",
        named("blocks.0.attn.qkv.weight", "head.weight"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_promise_03_a_file_that_is_no_checkpoint_is_called_what_it_is(
    tmp_path: Path, tiny_yaml: Path, name: str
) -> None:
    called, advice, tensors = OTHERS[name]
    write_state_dict(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is {called}.*, not a checkpoint") as raised:
        load_model(tiny_yaml, tmp_path / "x.safetensors")
    assert advice in str(raised.value)
    assert "Give the model YAML that belongs" not in str(raised.value)
    assert describe_checkpoint(tmp_path / "x.safetensors").kind in str(raised.value)
    with pytest.raises(CheckpointError, match=called):
        patch_checkpoint(tmp_path / "x.safetensors", tmp_path / "y.safetensors", [])


def test_files_of_this_package_are_called_what_they_are(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in tiny_model.unet.named_parameters()}
    save_mask(mask, tmp_path / "mask.safetensors", {})
    torch.save({name: marked.float() for name, marked in mask.items()}, tmp_path / "mask.pt")
    write_state_dict(named("xor/a"), tmp_path / "p.patch.safetensors", {"patch_format": "1"})
    write_state_dict(named("a.b"), tmp_path / "state.safetensors", {"run_state": "{}"})
    for name, says in {
        "mask.safetensors": "is a mask of this package, .*give it to mask_path",
        "mask.pt": "is a mask, as SalUn's authors write it, .*give it to mask_path",
        "p.patch.safetensors": "is a patch of this package, .*unlearn_diff patch CHECKPOINT OUTPUT --patches",
        "state.safetensors": "is the state of a training run, .*--resume",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            load_model(tiny_yaml, tmp_path / name)


def test_a_patch_is_applied_to_whole_checkpoints(tmp_path: Path, tiny_model: LatentDiffusion) -> None:
    write_state_dict(named("backbone.layer.weight"), tmp_path / "x.safetensors")
    write_part(parts_of(tiny_model)["attn2.pt"], tmp_path / "attn2.pt")
    for name, advice in (
        ("x.safetensors", "of no known kind: .*; give the checkpoint that the patches were made from"),
        ("attn2.pt", "is a UNet in diffusers' names: .*; convert with --base_ckpt_path"),
    ):
        with pytest.raises(PatchError, match=advice):
            patch_checkpoint(tmp_path / name, tmp_path / "y.safetensors", [])


def test_an_embedding_of_the_web_interface_is_called_so(tmp_path: Path, tiny_yaml: Path) -> None:
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.rand(1, 768)},
        "name": "x",
        "step": 5,
    }
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a textual-inversion embedding"):
        load_model(tiny_yaml, tmp_path / "x.pt")


def test_a_file_of_no_known_kind_is_not_said_to_need_a_yaml(tmp_path: Path, tiny_yaml: Path) -> None:
    write_state_dict(named("backbone.layer.weight"), tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"None of its names is one of Stable Diffusion's: .*no model YAML"
    ):
        load_model(tiny_yaml, tmp_path / "x.safetensors")


def test_a_yaml_is_asked_for_where_it_helps(
    tmp_path: Path, tiny_yaml: Path, make_tiny_model: ModelMaker
) -> None:
    save_checkpoint(make_tiny_model(unet={"num_res_blocks": 2}), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="Give the model YAML that belongs"):
        load_model(tiny_yaml, tmp_path / "a.safetensors")
    state = dict(make_tiny_model().state_dict())
    del state[f"{UNET}out.2.bias"]
    write_state_dict(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"the file is not whole.*--base_ckpt_path.*1 missing"):
        load_model(tiny_yaml, tmp_path / "b.safetensors")


def test_the_yaml_of_the_other_stable_diffusion_is_named(
    tmp_path: Path, tiny_yaml: Path, make_tiny_model: ModelMaker
) -> None:
    save_checkpoint(make_tiny_model(**TINY_V2), tmp_path / "v2.safetensors")
    save_checkpoint(make_tiny_model(), tmp_path / "v1.safetensors")
    (tmp_path / "v2.yaml").write_text(yaml.safe_dump(tiny_model_yaml(**TINY_V2)))
    with pytest.raises(CheckpointError, match=r"an SD v2 checkpoint, .*sd_v2_base\.yaml for 512 px"):
        load_model(tiny_yaml, tmp_path / "v2.safetensors")
    with pytest.raises(CheckpointError, match=r"an SD v1 checkpoint, .*model_config\.yaml") as raised:
        load_model(tmp_path / "v2.yaml", tmp_path / "v1.safetensors")
    # Hundreds of names differ: what to do comes first, and is not lost among them.
    advice, counts = str(raised.value).split(". Tensors: ")
    assert advice.startswith(
        f"{tmp_path / 'v1.safetensors'} is not a checkpoint of this model. It is an SD v1"
    )
    assert len(counts) < 500
    assert counts.count(", ...)") == 3


# ---- parts of a model


def parts_of(model: LatentDiffusion) -> dict[str, dict[str, Any]]:
    """Files that hold a part of a model, as programs write them."""
    state = dict(model.state_dict())
    unet = to_diffusers(state, model.params)["unet"]
    attention = {name: tensor for name, tensor in unet.items() if "attn2" in name}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in attention.items():
        module, _, kind = name.rpartition(".")
        modules.setdefault(f"unet.{module}", {})[kind] = tensor
    bare = {key.removeprefix(UNET): tensor for key, tensor in state.items() if key.startswith(UNET)}
    return {
        "attn2.safetensors": attention,
        "attn2.pt": attention,
        "prefixed.safetensors": {f"unet.{name}": tensor for name, tensor in attention.items()},
        "modules.pt": modules,  # module -> its state dict, as ESD's first code writes it
        "noxattn.safetensors": {name: tensor for name, tensor in unet.items() if "attn2" not in name},
        "unet.safetensors": unet,
        "bare.safetensors": bare,
        "no_vae.safetensors": {k: t for k, t in state.items() if not k.startswith("first_stage_model.")},
        "no_text.ckpt": {k: t for k, t in state.items() if not k.startswith("cond_stage_model.")},
        "unet_only.ckpt": {k: t for k, t in state.items() if k.startswith(UNET)},
    }


def write_part(content: Mapping[str, Any], path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(dict(content), path)
    else:
        write_state_dict(content, path)
    return path


ALL_PARTS = (
    *("attn2.safetensors", "attn2.pt", "prefixed.safetensors", "modules.pt", "noxattn.safetensors"),
    *("unet.safetensors", "bare.safetensors", "no_vae.safetensors", "no_text.ckpt", "unet_only.ckpt"),
)


@pytest.mark.parametrize("name", ALL_PARTS)
def test_a_part_of_a_model_is_completed_from_the_base_and_refused_without(
    tmp_path: Path, tiny_yaml: Path, make_tiny_model: ModelMaker, name: str
) -> None:
    one, other = make_tiny_model(seed=1), make_tiny_model(seed=2)
    path = write_part(parts_of(one)[name], tmp_path / name)
    base = {
        **other.state_dict(),
        ema_name(f"{UNET}out.2.bias"): torch.ones(4),
    }  # its EMA copy would be another model's
    write_state_dict(base, tmp_path / "base.ckpt")
    with pytest.raises(CheckpointError, match=r"a part of a model\..*convert .* --base_ckpt_path") as raised:
        load_model(tiny_yaml, path)
    missing = {"no_vae": r"without its VAE \(autoencoder\)", "no_text": "without its text encoder"}
    raised.match(missing.get(path.stem, ""))
    with pytest.raises(CheckpointError, match="a part of a model"):
        convert_checkpoint(path, tmp_path / "x.ckpt", model_config_path=tiny_yaml, format="compvis")
    convert_checkpoint(
        path,
        tmp_path / "whole.safetensors",
        model_config_path=tiny_yaml,
        format="compvis",
        base=tmp_path / "base.ckpt",
    )

    def is_ones(key: str) -> bool:
        return {
            "no_vae": not key.startswith("first_stage_model."),
            "no_text": not key.startswith("cond_stage_model."),
            "unet_only": key.startswith(UNET),
            "unet": key.startswith(UNET),
            "bare": key.startswith(UNET),
            "noxattn": key.startswith(UNET) and "attn2" not in key,
        }.get(path.stem, key.startswith(UNET) and "attn2" in key)

    made, _ = read_state_dict(tmp_path / "whole.safetensors")
    assert made.keys() == other.state_dict().keys()
    for key, tensor in made.items():
        assert torch.equal(tensor, (one if is_ones(key) else other).state_dict()[key]), key


def test_a_part_of_another_model_is_refused(
    tmp_path: Path, tiny_yaml: Path, make_tiny_model: ModelMaker, tiny_model: LatentDiffusion
) -> None:
    save_checkpoint(tiny_model, tmp_path / "base.safetensors")
    wide = make_tiny_model(unet={"context_dim": 64}, text={"hidden_size": 64})
    path = write_part(parts_of(wide)["attn2.pt"], tmp_path / "attn2.pt")
    with pytest.raises(CheckpointError, match="of another shape"):
        convert_checkpoint(
            path,
            tmp_path / "x.ckpt",
            model_config_path=tiny_yaml,
            format="compvis",
            base=tmp_path / "base.safetensors",
        )


# ---- folders


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, r"is SDXL \(StableDiffusionXLPipeline\)"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "is Stable Diffusion 3"),
        ({"_class_name": "FluxPipeline"}, "is Flux"),
        (
            {"_class_name": "StableDiffusionInpaintPipeline"},
            "is a model for inpainting .*take the text-to-image",
        ),
        ({"_class_name": "StableDiffusionInstructPix2PixPipeline"}, "is a model that edits images"),
        ({"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "T"]}, "has no UNet"),
        (
            {"_class_name": "AltDiffusionPipeline", "unet": None, "text_encoder": ["alt", "RobertaSeries"]},
            "whose text_encoder is a RobertaSeries, .*needed is a CLIPTextModel",
        ),
    ],
)
def test_a_folder_of_another_pipeline_is_called_what_it_is(
    tmp_path: Path, tiny_yaml: Path, index: dict[str, Any], says: str
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=says) as raised:
        load_model(tiny_yaml, tmp_path)
    raised.match("read are Stable Diffusion v1 and v2|take the text-to-image")
    assert "Give the model YAML" not in str(raised.value)


def test_other_pipelines_of_the_same_networks_are_read(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    save_checkpoint(tiny_model, tmp_path / "m.safetensors")
    convert_checkpoint(
        tmp_path / "m.safetensors", tmp_path / "f", model_config_path=tiny_yaml, format="diffusers"
    )
    index = json.loads((tmp_path / "f" / "model_index.json").read_text())
    (tmp_path / "f" / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionImg2ImgPipeline"})
    )
    assert torch.equal(load_model(tiny_yaml, tmp_path / "f").unet.out[2].bias, tiny_model.unet.out[2].bias)


def test_a_folder_with_the_unet_of_another_model_is_called_what_it_is(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    save_checkpoint(tiny_model, tmp_path / "m.safetensors")
    convert_checkpoint(
        tmp_path / "m.safetensors", tmp_path / "f", model_config_path=tiny_yaml, format="diffusers"
    )
    path = tmp_path / "f" / "unet" / "diffusion_pytorch_model.safetensors"
    unet, _ = read_state_dict(path)
    write_state_dict(unet | {"conv_in.weight": torch.rand(32, 9, 3, 3)}, path)
    with pytest.raises(CheckpointError, match="f is an inpainting model"):
        load_model(tiny_yaml, tmp_path / "f")


def test_a_folder_that_is_a_part_is_called_so_before_torch(tmp_path: Path) -> None:
    def says(folder: Path) -> str:
        [problem] = check_paths(ConvertConfig(input_path=str(folder), output_path=str(tmp_path / "out")))
        return problem

    for name, network in (("unet", "UNet2DConditionModel"), ("control", "ControlNetModel")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": network}))
    assert "is a UNet2DConditionModel alone" in says(tmp_path / "unet")
    assert "--base_ckpt_path" in says(tmp_path / "unet")
    assert "is a ControlNetModel alone" in says(tmp_path / "control")
    (tmp_path / "model_index.json").write_text("{}")
    assert f"give the folder above it, {tmp_path}" in says(tmp_path / "unet")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert "is a LoRA" in says(tmp_path / "lora")


def test_real_checkpoints_are_nothing_else(tiny_model: LatentDiffusion) -> None:
    shapes = json.loads(
        (Path(__file__).parents[1] / "reference" / "sd_v1_state_dict_shapes.json").read_text()
    )
    sd_v1 = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for state in (sd_v1, dict(tiny_model.state_dict())):
        assert other_kind(state, {}) is None
        assert kind_of(state) == COMPVIS
    for name, part in parts_of(tiny_model).items():
        if name != "modules.pt":
            assert other_kind(part, {}) is None, name
