"""Checkpoints from one form into another: no bit changes on the way; raw or EMA weights; other types of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from mu.ldm import CheckpointError, LatentDiffusion, load_model, save_checkpoint
from mu.ldm.convert import convert_checkpoint
from mu.ldm.diffusers_tensors import to_diffusers
from mu.ldm.ema import ema_name, updated_ema
from mu.ldm.schedule import SCHEDULE_KEYS
from mu.ldm.tensor_file import read_state_dict, write_state_dict
from tests.conftest import TINY_V2, tiny_model_yaml

ModelMaker = Callable[..., LatentDiffusion]
UNET = "model.diffusion_model."


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """The same names, types and bits."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def with_ema(model: LatentDiffusion, *, shift: float = 1.0) -> dict[str, Tensor]:
    """A model's tensors with an EMA copy whose weights are larger by `shift`."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ema = {ema_name(key): tensor + shift for key, tensor in state.items() if key.startswith(UNET)}
    return {
        **state,
        **ema,
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }


def converted(source: Path, target: Path, yaml: Path, **options: Any) -> Path:
    convert_checkpoint(source, target, model_config_path=yaml, **options)
    return target


def test_the_unet_alone_is_written_as_attack_suites_load_it(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    save_checkpoint(tiny_model, tmp_path / "m.safetensors")
    converted(tmp_path / "m.safetensors", tmp_path / "unet.pt", tiny_yaml, format="unet")
    alone = torch.load(tmp_path / "unet.pt", weights_only=True)
    assert same(alone, to_diffusers(tiny_model.state_dict(), tiny_model.params)["unet"])


# ---- round trips


@pytest.mark.parametrize("sections", [{}, TINY_V2], ids=["as SD v1", "as SD v2"])
def test_round_trips_are_the_same_to_the_bit(
    tmp_path: Path, make_tiny_model: ModelMaker, sections: dict[str, Any]
) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny_model_yaml(**sections)), encoding="utf-8")
    state = dict(make_tiny_model(**sections).state_dict())
    # a type of its own for each network
    dtypes = {"model": torch.float16, "first_stage_model": torch.float32, "cond_stage_model": torch.bfloat16}
    given = {key: t if key in SCHEDULE_KEYS else t.to(dtypes[key.split(".")[0]]) for key, t in state.items()}
    write_state_dict(given, tmp_path / "a.ckpt")
    way = [
        ("a.ckpt", "b", "diffusers"),
        ("b", "c.safetensors", "compvis"),
        ("c.safetensors", "d", "diffusers"),
        ("d", "e.ckpt", "compvis"),
    ]
    for source, target, format in way:
        convert_checkpoint(
            tmp_path / source, tmp_path / target, model_config_path=tmp_path / "model.yaml", format=format
        )
    for name in ("c.safetensors", "e.ckpt"):
        assert same(read_state_dict(tmp_path / name)[0], given), name


def test_ema_copies_and_what_is_not_run_stay_in_a_compvis_checkpoint(
    tmp_path: Path, make_tiny_model: ModelMaker
) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny_model_yaml(**TINY_V2)), encoding="utf-8")
    given = with_ema(make_tiny_model(**TINY_V2))
    given["cond_stage_model.model.text_projection"] = torch.rand(32, 32)
    write_state_dict(given, tmp_path / "a.ckpt")
    convert_checkpoint(
        tmp_path / "a.ckpt",
        tmp_path / "b.safetensors",
        model_config_path=tmp_path / "model.yaml",
        format="compvis",
    )
    assert same(read_state_dict(tmp_path / "b.safetensors")[0], given)


def test_a_safetensors_file_says_what_it_is(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    save_checkpoint(tiny_model, tmp_path / "a.ckpt")
    convert_checkpoint(
        tmp_path / "a.ckpt", tmp_path / "My model.safetensors", model_config_path=tiny_yaml, format="compvis"
    )
    with safe_open(tmp_path / "My model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.title"] == "My model"
    assert metadata["modelspec.architecture"] == "latent-diffusion"
    assert metadata["modelspec.resolution"] == "16x16"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert {"modelspec.implementation", "modelspec.date"} <= metadata.keys()


def test_modelspec_names_stable_diffusion() -> None:
    from mu.algorithms.saliency_unlearning.configs import PACKAGED
    from mu.ldm import load_model_config
    from mu.ldm.convert import model_spec

    names = {"model_config": "v1", "sd_v2_base": "v2-512", "sd_v2_v": "v2-768-v"}
    for file, name in names.items():
        spec = model_spec(load_model_config(PACKAGED / f"{file}.yaml"), title="t")
        assert spec["modelspec.architecture"] == f"stable-diffusion-{name}"


def test_a_wrong_model_is_found_and_nothing_written(
    tmp_path: Path, tiny_yaml: Path, make_tiny_model: ModelMaker
) -> None:
    save_checkpoint(make_tiny_model(unet={"num_res_blocks": 2}), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this model"):
        convert_checkpoint(
            tmp_path / "a.safetensors", tmp_path / "b", model_config_path=tiny_yaml, format="diffusers"
        )
    assert not (tmp_path / "b").exists()


# ---- EMA


def test_raw_or_ema_weights_are_taken(tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion) -> None:
    given = with_ema(tiny_model, shift=2.0)
    write_state_dict(given, tmp_path / "m.ckpt")
    raw = load_model(tiny_yaml, tmp_path / "m.ckpt")
    ema = load_model(tiny_yaml, tmp_path / "m.ckpt", use_ema=True)
    for key, tensor in raw.state_dict().items():
        assert torch.equal(tensor, given[key])
        moved = 2.0 if key.startswith(UNET) else 0.0
        assert torch.equal(ema.state_dict()[key], given[key] + moved if moved else given[key]), key
    assert "model_ema.diffusion_modelinput_blocks00weight" in given


def test_ema_weights_that_are_not_there_are_an_error(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    save_checkpoint(tiny_model, tmp_path / "raw.safetensors")
    with pytest.raises(CheckpointError, match=r"raw\.safetensors has no EMA weights"):
        load_model(tiny_yaml, tmp_path / "raw.safetensors", use_ema=True)
    partly = with_ema(tiny_model)
    del partly["model_ema.diffusion_modelout2bias"]
    write_state_dict(partly, tmp_path / "partly.ckpt")
    with pytest.raises(
        CheckpointError, match=r"1 EMA weights are missing \(model_ema\.diffusion_modelout2bias\)"
    ):
        load_model(tiny_yaml, tmp_path / "partly.ckpt", use_ema=True)
    counters = {k: v for k, v in partly.items() if not k.startswith("model_ema.diffusion")}
    write_state_dict(counters, tmp_path / "counters.ckpt")
    with pytest.raises(CheckpointError, match="has no EMA weights"):
        load_model(tiny_yaml, tmp_path / "counters.ckpt", use_ema=True)


def test_an_exported_ema_copy_leaves_no_other(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    given = with_ema(tiny_model, shift=2.0)
    write_state_dict(given, tmp_path / "m.ckpt")
    convert_checkpoint(
        tmp_path / "m.ckpt",
        tmp_path / "ema.safetensors",
        model_config_path=tiny_yaml,
        format="compvis",
        use_ema=True,
    )
    written, _ = read_state_dict(tmp_path / "ema.safetensors")
    assert written.keys() == tiny_model.state_dict().keys()
    assert torch.equal(written[f"{UNET}out.2.bias"], given["model_ema.diffusion_modelout2bias"])


@pytest.mark.parametrize("use_ema", [False, True])
def test_only_entries_of_changed_weights_change_in_the_ema_copy(use_ema: bool) -> None:
    key = f"{UNET}out.2.bias"
    raw, ema = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5, 3.5], dtype=torch.float64)
    before = {key: raw, ema_name(key): ema, "model_ema.decay": torch.tensor(0.9)}
    start = ema if use_ema else raw
    new = start.clone()
    new[1] = 7.0
    updated = updated_ema({key: new}, before, use_ema=use_ema, source="m.ckpt")
    assert updated.keys() == {ema_name(key), "model_ema.decay"}
    assert updated[ema_name(key)].dtype == torch.float64
    assert updated[ema_name(key)].tolist() == [1.5, 7.0, 3.5]
    assert before[ema_name(key)].tolist() == [1.5, 2.5, 3.5]


def test_an_ema_copy_of_nothing_known_is_refused() -> None:
    key = f"{UNET}out.2.bias"
    before = {key: torch.ones(3), "model_ema.diffusion_modelother": torch.ones(3)}
    with pytest.raises(
        CheckpointError, match=r"m\.ckpt: model_ema\.diffusion_modelother is not the EMA copy"
    ):
        updated_ema({key: torch.ones(3)}, before, use_ema=False, source="m.ckpt")


# ---- types


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_weights_are_written_in_the_type_that_is_asked_for(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion, name: str
) -> None:
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    given = with_ema(tiny_model)
    write_state_dict(given, tmp_path / "a.ckpt")
    compvis = converted(
        tmp_path / "a.ckpt", tmp_path / "b.safetensors", tiny_yaml, format="compvis", dtype=name
    )
    rounded = {
        key: t if key in SCHEDULE_KEYS or key.endswith(("decay", "num_updates")) else t.to(dtype)
        for key, t in given.items()
    }
    assert same(read_state_dict(compvis)[0], rounded)
    unet = torch.load(
        converted(tmp_path / "a.ckpt", tmp_path / "u.pt", tiny_yaml, format="unet", dtype=name),
        weights_only=True,
    )
    weights = {key: t for key, t in rounded.items() if key in tiny_model.state_dict()}
    assert same(unet, to_diffusers(weights, tiny_model.params)["unet"])
    # in one type, there and back: the same to the bit
    folder = converted(compvis, tmp_path / "f", tiny_yaml, format="diffusers", variant=name)
    back = converted(folder, tmp_path / "c.ckpt", tiny_yaml, format="compvis")
    assert same(read_state_dict(back)[0], weights)


@pytest.mark.parametrize("value", [65520.0, 7e4, -1e30])
def test_a_weight_too_large_for_a_type_is_named_and_nothing_written(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion, value: float
) -> None:
    state = dict(tiny_model.state_dict())
    state[f"{UNET}out.2.bias"] = torch.tensor([0.0, 65519.0, value, 0.0])
    write_state_dict(state, tmp_path / "a.ckpt")
    for target, format in (("b.safetensors", "compvis"), ("f", "diffusers"), ("u.pt", "unet")):
        with pytest.raises(
            CheckpointError, match=rf"{UNET}out\.2\.bias reaches .*float16 is 6\.55e\+04; .*bf16"
        ):
            converted(tmp_path / "a.ckpt", tmp_path / target, tiny_yaml, format=format, dtype="fp16")
        assert not (tmp_path / target).exists()
    assert converted(
        tmp_path / "a.ckpt", tmp_path / "b.ckpt", tiny_yaml, format="compvis", dtype="bf16"
    ).is_file()


def test_a_type_or_variant_that_cannot_be_is_refused(tmp_path: Path, tiny_yaml: Path) -> None:
    for options, says in (
        ({"dtype": "int8", "format": "compvis"}, "dtype is 'int8'; known: source, fp32, fp16, bf16"),
        ({"variant": "fp16", "format": "unet"}, "variant fp16 is for format diffusers"),
    ):
        with pytest.raises(CheckpointError, match=says):
            converted(tmp_path / "a.ckpt", tmp_path / "b.ckpt", tiny_yaml, **options)
