"""Tiny valid files of every kind that the readers of checkpoints, masks and patches take."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.mask_file import save_mask
from mu.ldm.patch import make_patch, save_patch
from mu.ldm.tensor_file import write_bare_state_dict, write_state_dict

UNET = "model.diffusion_model."


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{UNET}a.weight": torch.randn((4, 5), generator=generator),
        f"{UNET}a.bias": torch.randn((5,), generator=generator).half(),
        f"{UNET}b.weight": torch.randn((50, 41), generator=generator).bfloat16(),
        "first_stage_model.w": torch.ones(3, dtype=torch.float64),
        "steps": torch.tensor(7),
    }


def write_corpus(folder: Path) -> list[Path]:
    """Write the files into `folder`, the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    base = tensors()
    for suffix in (".safetensors", ".ckpt"):
        write_state_dict(base, folder / f"written{suffix}", {"concept": "Cats"})
        write_bare_state_dict(base, folder / f"bare{suffix.replace('ckpt', 'pt')}")
    lightning = {
        "epoch": 3,
        "state_dict": OrderedDict(base),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "callbacks": defaultdict(dict, {"Checkpoint": {"best": (1, 2.5, None, True, b"x")}}),
    }
    torch.save(lightning, folder / "lightning.ckpt")
    torch.save(lightning, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"p": torch.nn.Parameter(torch.ones(3))}, folder / "parameter.pth")

    mask = {name: torch.arange(t.numel()).view(t.shape) % 3 == 0 for name, t in base.items()}
    save_mask(mask, folder / "mask.safetensors", {"concept": "Cats", "threshold": 0.5, "list": [1, None]})
    torch.save({name: marked.long() for name, marked in mask.items()}, folder / "mask.pt")

    changed = {name: tensor.clone() for name, tensor in base.items()}
    changed[f"{UNET}a.weight"] += 1  # all entries, some of them, a few: the three forms of marks
    changed[f"{UNET}a.bias"][1:3] += 1
    changed[f"{UNET}b.weight"].view(-1)[[3, 700]] += 1
    save_patch(make_patch(base, changed, metadata={"concept": "Cats"}), folder / "model.patch.safetensors")
    return sorted(folder.iterdir())
