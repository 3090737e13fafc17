"""A byte that changed where nothing may change is found in the written file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mu.ldm.tensor_file import read_state_dict, write_state_dict
from mu.unlearning.moving import TrainingError
from mu.unlearning.output import verify_tensors

UNET = "model.diffusion_model."


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    """A checkpoint in miniature."""
    return {
        f"{UNET}weight": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16),
        f"{UNET}bias": torch.tensor([0.0, 1.0]),
        "first_stage_model.weight": torch.tensor([5.0, 6.0]),
        "cond_stage_model.transformer.text_model.weight": torch.tensor([7.0]),
        "betas": torch.tensor([0.1, 0.2]),
        **changes,
    }


SELECTED = {"weight": torch.tensor([True, True, False, False])}


def compared(folder: Path, before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    write_state_dict(before, folder / "before.ckpt")
    write_state_dict(after, folder / "after.safetensors")
    paths = {"before": folder / "before.ckpt", "after": folder / "after.safetensors"}
    old, new = (read_state_dict(path)[0] for path in paths.values())
    return verify_tensors(old, new, SELECTED, **paths)


def test_entries_that_changed_in_the_mask_are_counted(tmp_path: Path) -> None:
    assert compared(tmp_path, tensors(), tensors()) == 0
    moved = torch.tensor([1.5, 2.5, 3.0, 4.0], dtype=torch.float16)
    assert compared(tmp_path, tensors(), tensors(**{f"{UNET}weight": moved})) == 2
    moved[1] = 2.0
    assert compared(tmp_path, tensors(), tensors(**{f"{UNET}weight": moved})) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (f"{UNET}weight", torch.tensor([1.5, 2.0, 3.0, 4.5], dtype=torch.float16)),  # one in, one out
        (f"{UNET}bias", torch.tensor([-0.0, 1.0])),  # equal as a number, not as bits
        ("first_stage_model.weight", torch.tensor([5.0, 6.0000005])),
        ("cond_stage_model.transformer.text_model.weight", torch.tensor([7.5])),
        ("betas", torch.tensor([0.1, 0.3])),
    ],
)
def test_an_entry_that_changed_outside_the_mask_is_named(tmp_path: Path, name: str, values: Tensor) -> None:
    with pytest.raises(TrainingError, match=f"{name} differs from .* outside what may move"):
        compared(tmp_path, tensors(), tensors(**{name: values}))


def test_a_changed_dtype_or_shape_is_named(tmp_path: Path) -> None:
    name = f"{UNET}weight"
    with pytest.raises(TrainingError, match=r"weight is torch.float32, in .* it is torch.float16"):
        compared(tmp_path, tensors(), tensors(**{name: tensors()[name].float()}))
    with pytest.raises(TrainingError, match="bias"):
        compared(tmp_path, tensors(), tensors(**{f"{UNET}bias": torch.zeros(3)}))


def test_tensors_that_came_or_went_are_named(tmp_path: Path) -> None:
    less = tensors()
    del less[f"{UNET}bias"]
    with pytest.raises(TrainingError, match=r"1 tensors of .* are missing: model\.diffusion_model\.bias"):
        compared(tmp_path, tensors(), less)
    for name in (f"{UNET}extra", "first_stage_model.extra"):
        with pytest.raises(TrainingError, match=f"{name} was not in"):
            compared(tmp_path, tensors(), tensors(**{name: torch.zeros(1)}))


def test_what_loading_ignores_or_renames_is_no_difference(tmp_path: Path) -> None:
    """EMA copies go; the schedule may come, and be exact where it was half; the text encoder has two spellings."""
    before = tensors(**{"model_ema.weight": torch.ones(2), "logit_scale": torch.ones(())})
    assert compared(tmp_path, before, tensors()) == 0
    without_schedule = tensors()
    del without_schedule["betas"]
    assert compared(tmp_path, without_schedule, tensors()) == 0
    rounded = tensors(betas=torch.tensor([0.1001, 0.2], dtype=torch.float16))
    assert compared(tmp_path, rounded, tensors(betas=torch.tensor([0.1, 0.2], dtype=torch.float16))) == 0

    name = "cond_stage_model.transformer.text_model.weight"
    newer = tensors()
    newer[name.replace("text_model.", "")] = newer.pop(name)
    assert compared(tmp_path, newer, tensors()) == 0
    with pytest.raises(TrainingError, match=f"{name} differs"):
        compared(tmp_path, newer, tensors(**{name: torch.tensor([8.0])}))
