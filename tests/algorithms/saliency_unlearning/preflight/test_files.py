"""Sizes of files, found without writing them, against files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mu.algorithms.saliency_unlearning.preflight.files import (
    DIGEST,
    checkpoint_bytes,
    run_state_bytes,
    safetensors_bytes,
)
from mu.ldm import LatentDiffusion, save_checkpoint
from mu.ldm.tensor_file import FINGERPRINT_KEY, write_state_dict


def test_a_safetensors_file_has_the_size_that_was_found(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(3, 5),
        "ä": torch.ones(7, dtype=torch.float16),
        "bits": torch.ones(2, 3, 1, dtype=torch.uint8),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "step": torch.tensor(3),
        "mask": torch.ones(9, dtype=torch.bool),
    }
    metadata = {"title": 'a "quoted" one', "b": "1"}
    write_state_dict(tensors, tmp_path / "x.safetensors", metadata)
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    found = safetensors_bytes(on_meta, {**metadata, FINGERPRINT_KEY: DIGEST})
    assert found == (tmp_path / "x.safetensors").stat().st_size


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_checkpoint_has_the_size_that_was_found(
    tiny_model: LatentDiffusion, tmp_path: Path, suffix: str
) -> None:
    save_checkpoint(tiny_model, tmp_path / f"x.{suffix}")
    tensors = {name: tensor.to("meta") for name, tensor in tiny_model.state_dict().items()}
    found = checkpoint_bytes(tensors, suffix, tiny_model.params, {})
    assert found == pytest.approx((tmp_path / f"x.{suffix}").stat().st_size, rel=0.01)


def test_a_checkpoint_of_a_run_has_values_and_two_moments() -> None:
    # SD v1 under a mask of half of its weights, as docs/long_runs.md has it.
    half = {str(number): 859_520_964 // 2 // 686 for number in range(686)}
    assert run_state_bytes(half) == pytest.approx(5.16e9, rel=0.01)
