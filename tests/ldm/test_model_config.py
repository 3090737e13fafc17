"""A model YAML either gives a model that runs, or is refused by key and value: no torch error at the first step."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mu.algorithms.saliency_unlearning.scripts.sample import main as sample
from mu.ldm import LatentDiffusion, ModelConfigError, load_model, load_model_config
from mu.ldm.latent_diffusion import ImageSizeError
from mu.ldm.model_config import parse_model_config
from tests.conftest import TINY_V2, tiny_model_yaml

CASES = int(os.environ.get("YAML_CASES", "60"))
# Values that YAML files have, have wrongly, or have by a slip.
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 24, 31, 32, 33, 48, 64, 96, 10**9, 10**400),
    *(0.0, 0.5, 1.0, -0.1, 1e-4, float("nan"), float("inf"), "1e-4", "nan", "auto", "last", "hidden", "gelu"),
    *([], [1], [2, 1], [1, 2], [1, 2, 4], [3], [0], [-1], [1.5], [[32]], [32, 32], [32, 64], {}, {"a": 1}),
    *("v", "x0", "hybrid", "concat", "crossattn", "linear", "cosine", "vanilla", "none", "quick_gelu"),
]
SECTIONS: dict[str, tuple[str, ...]] = {
    "model": (),
    "unet": ("unet_config", "params"),
    "first_stage": ("first_stage_config", "params"),
    "ddconfig": ("first_stage_config", "params", "ddconfig"),
    "text": ("cond_stage_config", "params"),
}
MORE_KEYS = {
    "model": ["conditioning_key", "parameterization", "image_size", "beta_schedule", "unknown"],
    "unet": ["num_head_channels", "dims", "use_linear_in_transformer", "dropout", "num_classes", 7],
    "ddconfig": ["attn_type", "resamp_with_conv"],
    "text": ["layer", "layer_idx", "hidden_act", "max_length"],
}


def section(model: dict[str, Any], name: str) -> dict[str, Any]:
    found = model["params"]
    for key in SECTIONS[name]:
        found = found[key]
    assert isinstance(found, dict)
    return found


@torch.no_grad()
def run_once(params: Any) -> None:
    """Each network once, as the first step of a run does it."""
    model = LatentDiffusion(params)
    image = torch.zeros(1, 3, model.image_size, model.image_size)
    mean, _ = model.encode(image)
    assert tuple(mean.shape[1:]) == model.latent_shape()
    context = model.embed(["a cat"]) if model.cond_stage_model is not None else torch.zeros(1, 77, 32)
    noise = model.predict_noise(mean, torch.tensor([0]), context)
    assert noise.shape == mean.shape
    assert model.decode(mean - noise).shape == image.shape


def refused_or_runs(model: dict[str, Any]) -> bool:
    """Whether it runs. Anything but a ModelConfigError is raised."""
    try:
        params = parse_model_config(model)
    except ModelConfigError:
        return False
    side = (params.image_size or params.unet.image_size) * params.first_stage.factor
    if side > 64 or params.unet.model_channels > 256 or params.timesteps > 10**4:
        return True  # could be run, but not here
    run_once(params)
    return True


@pytest.mark.parametrize("sections", [{}, TINY_V2], ids=["as SD v1", "as SD v2"])
def test_promise_25_any_value_of_any_key_is_refused_or_runs(sections: dict[str, Any]) -> None:
    rng = random.Random(0)
    base = tiny_model_yaml(**sections)["model"]
    cases = [
        (name, key, value)
        for name in SECTIONS
        for key in [*section(base, name), *MORE_KEYS.get(name, [])]
        if not isinstance(section(base, name).get(key), dict)
        for value in VALUES
    ]
    ran = 0
    for name, key, value in rng.sample(cases, CASES):
        model = deepcopy(base)
        section(model, name)[key] = value
        try:
            ran += refused_or_runs(model)
        except Exception as error:
            raise AssertionError(f"{name}.{key} = {value!r}") from error
    assert 0.1 < ran / CASES < 0.9


def test_two_changed_keys_are_refused_or_run() -> None:
    rng = random.Random(1)
    base = tiny_model_yaml()["model"]
    for _ in range(CASES):
        model, told = deepcopy(base), []
        for _ in range(2):
            name = rng.choice(list(SECTIONS))
            key = rng.choice([*section(base, name), *MORE_KEYS.get(name, [])])
            if not isinstance(section(base, name).get(key), dict):
                section(model, name)[key] = value = rng.choice(VALUES)
                told.append(f"{name}.{key} = {value!r}")
        try:
            refused_or_runs(model)
        except Exception as error:
            raise AssertionError(", ".join(told)) from error


INPAINTING = (
    "in_channels = 9, .* 4 channels .* looks like an inpainting model, .* take the text-to-image model"
)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "inpainting": ({"unet": {"in_channels": 9}}, INPAINTING),
    "InstructPix2Pix": ({"unet": {"in_channels": 8}}, "in_channels = 8, .* InstructPix2Pix"),
    "depth": ({"unet": {"in_channels": 5}}, "in_channels = 5, .* a depth model"),
    "hybrid": (
        {"conditioning_key": "hybrid"},
        "conditioning_key = 'hybrid' .*supported: 'crossattn' or None",
    ),
    "concat": ({"conditioning_key": "concat"}, "conditioning_key = 'concat'"),
    "context": ({"unet": {"context_dim": 64}}, "encoder is 32 wide .*context_dim is 64; they must be equal"),
    "no context": ({"unet": {"context_dim": None}}, "context_dim is missing; they must be equal"),
    "latents": ({"autoencoder": {"z_channels": 0}}, r"z_channels = 0; allowed: 1 to 65,536"),
    "blocks": ({"unet": {"num_res_blocks": 0}}, r"unet_config\.num_res_blocks = 0; allowed: 1 to 1,000"),
    "levels": ({"unet": {"channel_mult": [1, 0]}}, r"channel_mult = \[1, 0\]; allowed: 1 to 1,024"),
    "text layers": (
        {"text": {"num_hidden_layers": 0}},
        r"cond_stage_config\.num_hidden_layers = 0; allowed: 1 to 1,000",
    ),
    "out": ({"unet": {"out_channels": 8}}, "embed_dim 4 channels, the UNet gives out_channels 8"),
    "heads": ({"unet": {"num_heads": 5}}, "num_heads = 5 does not divide the 32 channels"),
    "no heads": ({"unet": {"num_heads": 0}}, "one of num_heads and num_head_channels, .* they are 0 and -1"),
    "head width": (
        {"unet": {"num_heads": -1, "num_head_channels": 24}},
        "num_head_channels = 24 does not divide",
    ),
    "text heads": (
        {"text": {"num_attention_heads": 3}},
        "num_attention_heads = 3 does not divide hidden_size = 32",
    ),
    "norm": ({"unet": {"model_channels": 48}}, "model_channels = 48; it must be divisible by 32"),
    "norm below": ({"unet": {"model_channels": 16, "channel_mult": [2]}}, "model_channels = 16; it must be"),
    "VAE norm": ({"autoencoder": {"ch": 48}}, r"ch = 48.* must be divisible by 32"),
    "no level": ({"unet": {"channel_mult": []}}, "channel_mult has 0 levels"),
    "grey": (
        {"autoencoder": {"in_channels": 1}},
        "in_channels = 1; allowed: 3, the channels of an RGB image",
    ),
    "layer": (
        {"text": {"layer": "hidden", "layer_idx": 11}},
        "layer = 'hidden' is not built here; supported: 'last'",
    ),
    "v2 layer": ({**TINY_V2, "text": {"layer": "first"}}, "layer is 'first'; allowed: last, penultimate"),
    "v2 depth": (
        {**TINY_V2, "text": {"layer": "penultimate", "num_hidden_layers": 1}},
        "num_hidden_layers = 1 leaves no layer",
    ),
    "activation": ({"text": {"hidden_act": "swush"}}, "hidden_act is 'swush'; allowed: quick_gelu, gelu"),
    "size": ({"unet": {"image_size": 9}}, "image_size = 9 latent pixels; .* divisible by 2"),
    "x0": ({"parameterization": "x0"}, "parameterization is 'x0'; allowed: eps, v"),
    "betas": (
        {"linear_start": 0.02, "linear_end": 0.01},
        "linear_start = 0.02 and linear_end = 0.01; allowed: 0 <",
    ),
    "signal": (
        {"linear_start": 0.5, "linear_end": 0.5},
        r"leave exp\(-693\) of an image .* allowed: at least exp",
    ),
    "one pixel": (
        {"image_size": 2},
        "one pixel at the lowest level of unet_config, of 32",
    ),
    "no list": ({"unet": {"channel_mult": None}}, r"channel_mult = None is not of type tuple"),
    "nan": ({"scale_factor": float("nan")}, "scale_factor = nan; allowed: above 0"),
    "3 d": ({"unet": {"dims": 3}}, "dims = 3 is not built here; supported: 2"),
    "no attention": ({"autoencoder": {"attn_type": "none"}}, "attn_type = 'none' is not built here"),
}


@pytest.mark.parametrize("name", WRONG)
def test_promise_25_a_structure_that_cannot_be_run_is_refused_by_key_and_value(name: str) -> None:
    sections, says = WRONG[name]
    with pytest.raises(ModelConfigError, match=says):
        parse_model_config(tiny_model_yaml(**sections)["model"])


def test_heads_have_to_fit_only_where_there_is_attention(tmp_path: Path) -> None:
    """64 wide heads do not divide the 32 channels of the first level, which has none."""
    unet = {"num_heads": -1, "num_head_channels": 64, "attention_resolutions": [2]}
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(tiny_model_yaml(unet=unet)), encoding="utf-8")
    model = load_model(path)
    latents, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 32)
    assert model.unet(latents, torch.zeros(1), context).shape == latents.shape


def test_all_that_is_wrong_is_said_together() -> None:
    wrong = tiny_model_yaml(unet={"in_channels": 9, "num_heads": 5}, text={"num_attention_heads": 3})
    with pytest.raises(ModelConfigError, match=r"num_heads = 5.*num_attention_heads = 3.*in_channels = 9"):
        parse_model_config(wrong["model"])


@pytest.mark.parametrize(
    ("target", "is_"),
    [
        ("ldm.models.diffusion.ddpm.LatentInpaintDiffusion", "an inpainting model"),
        ("ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion", "a depth model"),
        ("sgm.models.diffusion.DiffusionEngine", "such as SDXL"),
        ("cldm.cldm.ControlLDM", "a ControlNet"),
    ],
)
def test_the_yaml_of_another_model_is_called_what_it_is(target: str, is_: str) -> None:
    model = tiny_model_yaml()["model"] | {"target": target}
    with pytest.raises(
        ModelConfigError, match=f"{is_}.*cannot be run here; read are Stable Diffusion v1 and v2"
    ):
        parse_model_config(model)


def test_a_file_that_cannot_be_read_or_has_odd_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    for content, says in (
        ("[" * 3000, "is not a YAML file"),
        ("model: 3", "a model YAML begins with `model:`"),
        ("\x00", "is not a YAML file"),
    ):
        path.write_text(content)
        with pytest.raises(ModelConfigError, match=says):
            load_model_config(path)
    odd = tiny_model_yaml(unet={7: 1, "x": 2})
    with pytest.raises(ModelConfigError, match="options that are not known here: 7, x"):
        parse_model_config(odd["model"])


def test_a_command_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(tiny_model_yaml(unet={"in_channels": 9})))
    (tmp_path / "m.ckpt").write_bytes(b"not read")
    argv = ["--ckpt_path", str(tmp_path / "m.ckpt"), "--model_config_path", str(path), "--prompts", "a cat"]
    assert sample([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert "in_channels = 9" in capsys.readouterr().err


def test_an_image_size_that_the_levels_cannot_halve_is_refused(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    model = make_tiny_model()
    assert model.latent_shape(24) == (4, 12, 12)
    with pytest.raises(
        ImageSizeError, match="image_size = 18 px: this model needs a multiple of 4 px, for example 16"
    ):
        model.latent_shape(18)
