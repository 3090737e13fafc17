"""A written diffusers folder runs in StableDiffusionPipeline and gives our images; any folder of the kind is read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mu.ldm import CheckpointError, LatentDiffusion, load_model, save_checkpoint
from mu.ldm.checkpoint import tensors_of
from mu.ldm.convert import convert_checkpoint
from mu.ldm.diffusers_folder import (
    is_diffusers_folder,
    read_diffusers_folder,
    write_diffusers_folder,
)
from mu.ldm.diffusers_tensors import to_diffusers
from mu.ldm.sampler import sample_ddim
from tests.conftest import TINY_V2, tiny_model_yaml

diffusers = pytest.importorskip("diffusers")
ModelMaker = Callable[..., LatentDiffusion]
PROMPT = "A Cats image in Fluent Flat style."


def write(model: LatentDiffusion, folder: Path) -> Path:
    write_diffusers_folder(tensors_of(model, folder), folder, model.params)
    return folder


@pytest.fixture
def folder(tmp_path: Path, tiny_model: LatentDiffusion) -> Path:
    return write(tiny_model, tmp_path / "folder")


def weights(model: LatentDiffusion) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_weights(one: LatentDiffusion, other: LatentDiffusion) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize(
    "sections",
    [{}, {**TINY_V2, "parameterization": "v", "linear_start": 0.001}],
    ids=["as SD v1", "as SD v2, velocity"],
)
@torch.no_grad()
def test_the_pipeline_gives_our_images(
    tmp_path: Path, make_tiny_model: ModelMaker, sections: dict[str, Any]
) -> None:
    model = make_tiny_model(seed=3, **sections)
    folder = write(model, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.safety_checker is None
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    theirs = {}
    for kind in ("latent", "np"):
        theirs[kind] = pipeline(
            [PROMPT, ""],
            height=16,
            width=16,
            num_inference_steps=5,
            guidance_scale=3.0,
            latents=noise.clone(),
            output_type=kind,
        ).images
    latents = sample_ddim(
        model,
        model.embed([PROMPT, ""]),
        shape=model.latent_shape(),
        steps=5,
        guidance_scale=3.0,
        uncond_context=model.embed([""]),
        initial_noise=noise,
    )
    assert theirs["latent"].std() > 0.1
    assert (latents - theirs["latent"]).abs().max() <= 1e-4 * latents.abs().max()
    images = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()  # (2, 16, 16, 3)
    assert theirs["np"].std() > 0.05
    assert np.abs(images - theirs["np"]).max() <= 1e-3
    # the prompt matters, or the text encoder could be any
    assert np.abs(images[0] - images[1]).max() > 0.05


@torch.no_grad()
def test_a_folder_of_half_precision_weights_runs_too(tmp_path: Path, make_tiny_model: ModelMaker) -> None:
    """transformers takes the type of the file where nothing says otherwise, diffusers fp32."""
    folder = write(make_tiny_model(dtype=torch.float16), tmp_path / "folder")
    tensors = read_diffusers_folder(folder)
    assert {t.dtype for name, t in tensors.items() if name.startswith("text_encoder.")} == {torch.float16}
    for asked, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        options = {} if asked is None else {"torch_dtype": asked}
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
        assert {pipeline.text_encoder.dtype, pipeline.unet.dtype, pipeline.vae.dtype} == {expected}
        if asked is None:
            pipeline.set_progress_bar_config(disable=True)
            latents = pipeline(
                PROMPT, height=16, width=16, num_inference_steps=1, output_type="latent"
            ).images
            assert latents.isfinite().all()


@pytest.mark.parametrize("sections", [{}, TINY_V2], ids=["as SD v1", "as SD v2"])
def test_there_and_back_is_the_same_to_the_bit(
    tmp_path: Path, make_tiny_model: ModelMaker, sections: dict[str, Any]
) -> None:
    model = make_tiny_model(dtype=torch.float16, **sections)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_model_yaml(**sections)), encoding="utf-8")
    back = load_model(tmp_path / "tiny.yaml", write(model, tmp_path / "folder"), dtype=torch.float16)
    assert_same_weights(model, back)
    assert set(back.file_dtypes.values()) == {torch.float16}
    half = load_model(tmp_path / "tiny.yaml", tmp_path / "folder")  # in fp32, and again written in half
    again = write(half, tmp_path / "again")
    one, other = read_diffusers_folder(tmp_path / "folder"), read_diffusers_folder(again)
    assert one.keys() == other.keys()
    assert {name.partition(".")[0] for name in one} == {"unet", "vae", "text_encoder"}
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.float16 for name in one)


def test_pickled_sharded_and_half_precision_weights_are_read(
    folder: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    names = sorted(tensors)
    parts = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, unet.with_name(file), metadata={"format": "pt"})
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    index = unet.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    unet.unlink()
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    text = folder / "text_encoder" / "model.safetensors"
    text.rename(text.with_name("model.fp16.safetensors"))
    assert_same_weights(load_model(tiny_yaml, folder), tiny_model)

    for broken, says in (
        ({"weight_map": {"a": "../vae/x.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"1 parts are missing: gone\.safetensors"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=says):
            load_model(tiny_yaml, folder)


def test_promise_01_pickled_weights_that_would_run_code_are_refused(folder: Path, tiny_yaml: Path) -> None:
    class RunsCode:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("exit 1",)

    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({**load_file(vae), "x": RunsCode()}, vae.with_suffix(".bin"))
    vae.unlink()
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        load_model(tiny_yaml, folder)


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("unet", "attention_head_dim", 8, r"unet: attention_head_dim is 8, .*\[4, 4\] \(num_heads"),
        ("vae", "scaling_factor", 0.18215, r"vae: scaling_factor is 0\.18215, .*0\.5 \(scale_factor\)"),
        ("text_encoder", "hidden_act", "gelu", "text_encoder: hidden_act is 'gelu'"),
        (
            "scheduler",
            "prediction_type",
            "v_prediction",
            r"prediction_type is 'v_prediction'.*parameterization",
        ),
        ("scheduler", "beta_schedule", "linear", "beta_schedule is 'linear', .*nothing else is built here"),
    ],
)
def test_a_folder_that_is_configured_otherwise_is_refused(
    folder: Path, tiny_yaml: Path, part: str, key: str, value: Any, says: str
) -> None:
    """Its names and shapes fit; its images would be wrong."""
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=says):
        load_model(tiny_yaml, folder)


def test_one_number_of_heads_may_stand_for_all_levels(
    folder: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "attention_head_dim": 4}), encoding="utf-8")
    assert_same_weights(load_model(tiny_yaml, folder), tiny_model)


def test_what_is_not_whole_is_named(folder: Path, tiny_yaml: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae has no weights: expected diffusion_pytorch_model"):
        load_model(tiny_yaml, folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="is a folder"):
        load_model(tiny_yaml, folder)


def test_what_is_there_is_not_overwritten_unasked(
    tmp_path: Path, folder: Path, tiny_model: LatentDiffusion
) -> None:
    (folder / "mine.txt").write_text("kept")
    tensors = tensors_of(tiny_model, folder)
    with pytest.raises(CheckpointError, match="is there already"):
        write_diffusers_folder(tensors, folder, tiny_model.params)
    assert (folder / "mine.txt").exists()
    write_diffusers_folder(tensors, folder, tiny_model.params, overwrite=True)
    assert not (folder / "mine.txt").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "1.jpg").write_text("kept")
    with pytest.raises(CheckpointError, match="is no diffusers folder"):
        write_diffusers_folder(tensors, other, tiny_model.params, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".yaml") == ["folder", "photos"]


def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mu.ldm import text_encoder

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_encoder, "clip_vocabulary", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(tiny_model, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".yaml"] == []


def test_a_folder_may_have_a_long_name(tmp_path: Path, tiny_model: LatentDiffusion) -> None:
    write(tiny_model, tmp_path / ("n" * 255))
    assert is_diffusers_folder(tmp_path / ("n" * 255))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".yaml"] == ["n" * 255]


def test_a_model_that_no_pipeline_runs_is_refused(tmp_path: Path, make_tiny_model: ModelMaker) -> None:
    model = make_tiny_model(unconditional=True)
    with pytest.raises(CheckpointError, match="without text encoder"):
        write(model, tmp_path / "folder")
    assert not is_diffusers_folder(tmp_path / "folder")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@torch.no_grad()
def test_a_variant_is_what_from_pretrained_looks_for(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion, variant: str
) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    save_checkpoint(tiny_model, tmp_path / "m.safetensors")
    convert_checkpoint(
        tmp_path / "m.safetensors",
        tmp_path / "f",
        model_config_path=tiny_yaml,
        format="diffusers",
        dtype=variant,
        variant=variant,
    )
    assert sorted(path.name for path in (tmp_path / "f").rglob("*.safetensors")) == [
        f"diffusion_pytorch_model.{variant}.safetensors",
        f"diffusion_pytorch_model.{variant}.safetensors",
        f"model.{variant}.safetensors",
    ]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "f", variant=variant, torch_dtype=dtype, local_files_only=True
    )
    expected = to_diffusers(tiny_model.state_dict(), tiny_model.params)
    for part, network in (
        ("unet", pipeline.unet),
        ("vae", pipeline.vae),
        ("text_encoder", pipeline.text_encoder),
    ):
        found = {name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}
        for name, tensor in expected[part].items():
            assert torch.equal(found[name.removeprefix("text_model.")], tensor.to(dtype)), (part, name)
    with pytest.raises(OSError):  # noqa: PT011  # diffusers' own error: without the variant there is no file
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "f", local_files_only=True)
    half = load_model(tiny_yaml, tmp_path / "f")  # variants are read where they are all there is
    for name, tensor in weights(tiny_model).items():
        assert torch.equal(weights(half)[name], tensor.to(dtype).float()), name


def test_of_several_variants_the_plain_one_is_read_and_that_is_said(
    folder: Path, tiny_yaml: Path, tiny_model: LatentDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO, logger="mu"):
        assert_same_weights(load_model(tiny_yaml, folder), tiny_model)
    assert "read diffusion_pytorch_model.safetensors; the fp16 weights beside it are left" in caplog.text
    plain.rename(plain.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(
        CheckpointError, match="several variants, fp16, non_ema, and none without one: keep one"
    ):
        load_model(tiny_yaml, folder)


def test_parts_of_a_variant_are_read(folder: Path, tiny_yaml: Path, tiny_model: LatentDiffusion) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    unet.unlink()
    files = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(tensors)
    for i, file in enumerate(files):
        save_file(
            {name: tensors[name] for name in names[i::2]}, unet.with_name(file), metadata={"format": "pt"}
        )
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    index = unet.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_weights(load_model(tiny_yaml, folder), tiny_model)
