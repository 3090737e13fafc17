"""The mask of a concept is found, and the model recognised."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import parse_cli
from torch import Tensor

from mu.algorithms.saliency_unlearning.configs import MaskConfig
from mu.algorithms.saliency_unlearning.mask_file import MaskError, save_mask
from mu.algorithms.saliency_unlearning.utils import (
    find_mask,
    kept_by_layer,
    layer_groups,
    unet_fingerprint,
)
from mu.ldm import LatentDiffusion, load_model
from mu.unlearning.config import IN_METHOD

# ---- which model


def test_the_fingerprint_is_that_of_the_file(tiny_runs: Any) -> None:
    """Whatever dtype the weights are held in; and of the UNet alone."""
    half, whole = tiny_runs.checkpoint("half"), tiny_runs.checkpoint()
    found = {
        dtype: unet_fingerprint(load_model(tiny_runs.model_config, half, dtype=dtype))
        for dtype in (torch.float32, torch.float16, torch.float64)
    }
    assert len(set(found.values())) == 1
    assert found[torch.float32].startswith("sha256:")

    model = load_model(tiny_runs.model_config, whole)
    fingerprint = unet_fingerprint(model)
    assert fingerprint not in found.values()
    with torch.no_grad():
        model.get_parameter("first_stage_model.quant_conv.weight").add_(1)
        assert unet_fingerprint(model) == fingerprint
        model.unet.get_parameter("out.2.bias")[0] += 1e-3
    assert unet_fingerprint(model) != fingerprint


def test_the_kept_fraction_of_each_block() -> None:
    def marked(kept: int, size: int) -> Tensor:
        return torch.arange(size) < kept

    mask = {
        "time_embed.0.weight": marked(1, 4),
        "time_embed.2.weight": marked(2, 4),
        "input_blocks.1.0.in_layers.2.weight": marked(0, 10),
        "input_blocks.1.1.proj_in.weight": marked(5, 10),
        "input_blocks.10.0.weight": marked(1, 1),
        "middle_block.0.weight": marked(0, 3),
        "out.2.weight": marked(3, 4),
    }
    assert layer_groups(mask) == {
        "time_embed": 3 / 8,
        "input_blocks.1": 0.25,
        "input_blocks.10": 1.0,
        "middle_block.0": 0.0,
        "out": 0.75,
    }


def test_what_is_kept_of_each_kind_of_layer(tiny_model: LatentDiffusion) -> None:
    """On a real UNet: each weight is counted once, under the kind that its train method says it is."""
    mask = {
        name: torch.arange(p.numel()).view(p.shape) % 3 == 0 for name, p in tiny_model.unet.named_parameters()
    }
    kept = kept_by_layer(mask)
    fractions = {
        block: sum(k for k, _ in kinds.values()) / sum(n for _, n in kinds.values())
        for block, kinds in kept.items()
    }
    assert fractions == layer_groups(mask)
    attention = kept["middle_block.1"]
    prefix = "middle_block.1.transformer_blocks.0."
    for part, kind in (("attn1.to_q", "self-attention queries"), ("attn2.to_v", "cross-attention values")):
        marked = mask[f"{prefix}{part}.weight"]
        assert attention[kind] == (int(marked.sum()), marked.numel())
    out = [mask[f"{prefix}attn2.to_out.0.{end}"] for end in ("weight", "bias")]
    assert attention["cross-attention output"] == (
        sum(int(m.sum()) for m in out),
        sum(m.numel() for m in out),
    )
    for kind, method in (("cross-attention", "xattn"), ("self-attention", "selfattn")):
        total = sum(n for kinds in kept.values() for name, (_, n) in kinds.items() if name.startswith(kind))
        assert total == sum(p.numel() for name, p in mask.items() if IN_METHOD[method](name))
    assert set(kept["time_embed"]) == {"time embedding"}
    assert set(kept["out"]) == {"convolutions"}
    assert set(kept["middle_block.0"]) == {"convolutions", "time embedding"}
    assert set(attention) == {
        *(f"{a}-attention {p}" for a in ("self", "cross") for p in ("queries", "keys", "values", "output")),
        "feed-forward",
        "norms and projections",
    }


# ---- which mask


def put_mask(path: Path, *, age_s: int, **metadata: Any) -> Path:
    """A mask file that was written `age_s` seconds before the newest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"template": "style", "template_name": "Noto", "threshold": 0.5, **metadata}
    save_mask({"weight": torch.tensor([True, False])}, path, described)
    os.utime(path, (2_000_000_000 - age_s,) * 2)
    return path


def test_a_folder_gives_the_newest_mask_of_the_concept(tiny_runs: Any, tmp_path: Path) -> None:
    put_mask(tmp_path / "z" / "mask_0.5.safetensors", age_s=300)
    wanted = put_mask(tmp_path / "deep" / "er" / "mask_0.5.safetensors", age_s=200)
    sparse = put_mask(tmp_path / "b" / "mask_0.2.safetensors", age_s=100, threshold=0.2)
    put_mask(tmp_path / "c" / "mask_0.5.safetensors", age_s=50, template_name="Blob")
    put_mask(tmp_path / "d" / "mask_0.5.safetensors", age_s=0, template="object")
    (tmp_path / "d" / "model.safetensors").write_bytes(b"not a mask")
    several = put_mask(tmp_path / "e" / "mask_0.5.safetensors", age_s=0, template_name=["Noto", "Blob"])
    config = tiny_runs.train_config(mask_path=str(tmp_path))
    assert find_mask(config) == sparse  # of whatever threshold
    assert find_mask(tiny_runs.train_config(mask_path=str(tmp_path), threshold=0.5)) == wanted
    together = {"template_name": ("Blob", "Noto"), "styles": ("Noto", "Blob", "Fluent")}
    assert find_mask(tiny_runs.train_config(**together, mask_path=str(tmp_path))) == several
    assert find_mask(tiny_runs.train_config(mask_path=str(tmp_path), threshold=0.2)) == sparse
    named = tiny_runs.train_config(mask_path=str(sparse))  # a file is taken as it is
    assert find_mask(named) == sparse


def test_without_a_fitting_mask_the_command_that_makes_it_is_named(tiny_runs: Any, tmp_path: Path) -> None:
    put_mask(tmp_path / "mask_0.5.safetensors", age_s=0, template_name="Blob")
    config = tiny_runs.train_config(mask_path=str(tmp_path), threshold=0.25)
    with pytest.raises(MaskError, match=r"style Noto with threshold 0\.25") as raised:
        find_mask(config)
    words = shlex.split(str(raised.value).partition("make it: ")[2])
    assert words[:3] == ["python", "-m", "mu.algorithms.saliency_unlearning.scripts.generate_mask"]
    named = parse_cli(MaskConfig, words[3:])
    assert named == tiny_runs.mask_config(threshold=0.25, output_dir=str(tmp_path))
