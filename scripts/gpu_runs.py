"""Whole runs, as parts of scripts/gpu_check.py: twice the same bits; memory that runs out in the middle of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_model import run_keys
from gpu_parts import Record, Spec
from torch import Tensor, nn

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.ldm.tensor_file import read_state_dict

_LR = 1e-5
_UNET = "model.diffusion_model."


def same_bits(spec: Spec, record: Record) -> None:
    """Mask and training twice from one seed, each in a process of its own: whether the files hold the same bits."""
    for deterministic in (True, False):
        word = f"deterministic {deterministic}"
        found = [_files_of(spec, f"{deterministic}-{time}", deterministic=deterministic) for time in "ab"]
        for stage in ("mask", "train"):
            one, other = (_tensors(files[stage]) for files in found)
            differ = sum(int((one[name] != values).count_nonzero()) for name, values in other.items())
            entries = sum(values.numel() for values in other.values())
            seconds = [files["seconds"][stage] for files in found]
            record.add(
                f"{word}: {stage}: {differ} of {entries} entries differ; {seconds[0]:.1f} and {seconds[1]:.1f} s",
                **{
                    f"{stage}_{word.replace(' ', '_')}": {
                        "differ": differ,
                        "entries": entries,
                        "seconds": seconds,
                    }
                },
            )
            if deterministic or not spec.on_cuda:
                record.check(f"{word}: {stage} twice the same bits", differ == 0)
        for files in found:
            for path in (files["mask"], files["train"]):
                Path(path).unlink()


def _files_of(spec: Spec, name: str, *, deterministic: bool) -> dict[str, Any]:
    """Paths of a mask and a checkpoint, made in a process of its own, as `python gpu_runs.py spec.json`."""
    folder = Path(spec.folder) / f"same-{name}"
    folder.mkdir(exist_ok=True)
    path = folder / "spec.json"
    path.write_text(json.dumps({**vars(spec), "deterministic": deterministic, "work": str(folder)}))
    subprocess.run([sys.executable, __file__, str(path)], check=True, env=dict(os.environ))
    found: dict[str, Any] = json.loads((folder / "files.json").read_text())
    return found


def _make_files(given: dict[str, Any]) -> None:
    work, deterministic = Path(given.pop("work")), given.pop("deterministic")
    spec = Spec(**given)
    keys = run_keys(spec, work, images=4)
    keys["deterministic"] = deterministic
    mask = MaskingAlgorithm(keys, batch_size=2).run()
    (path,) = mask["masks"].values()
    trained = SaliencyUnlearningAlgorithm(
        keys,
        mask_path=str(path),
        batch_size=2,
        epochs=1,
        lr=_LR,
        sample_prompts=[],
        patch=False,
        report=False,
    ).run()
    seconds = {"mask": mask["seconds"], "train": trained["seconds"]}
    files = {"mask": str(path), "train": str(trained["checkpoint"]), "seconds": seconds}
    (work / "files.json").write_text(json.dumps(files))


def out_of_memory(spec: Spec, record: Record) -> None:
    """One step undisturbed, and one whose backward pass meets an allocation that fails, in its middle."""
    work = Path(spec.folder) / "out-of-memory"
    start = _unet(work.parent / "model.safetensors")
    undisturbed = _update(spec, work / "undisturbed", start, record)
    with _failing_in_backward(spec) as failed:
        disturbed = _update(spec, work / "disturbed", start, record)
    record.check("memory ran out in the middle of the backward pass", failed == [True])
    record.check("half of the weights moved", int(undisturbed.count_nonzero()) > 0.4 * len(undisturbed))
    # Adam's first step is lr times the gradient's sign: only where a gradient is near zero may rounding turn it.
    differ = ((undisturbed - disturbed).abs() > 0.5 * _LR).count_nonzero()
    share = int(differ) / max(1, int(undisturbed.count_nonzero()))
    record.add(f"{share:.3%} of the updates differ by more than half of lr", share_that_differs=share)
    record.check("the step is the undisturbed one to rounding", share < 0.01)


def _update(spec: Spec, work: Path, start: dict[str, Tensor], record: Record) -> Tensor:
    """(n,) what one step of a run in fp32 adds to each weight of the UNet."""
    # One step: as many images as the batch has.
    keys = run_keys(spec, work, images=4)
    found = SaliencyUnlearningAlgorithm(
        keys, masking="random", batch_size=4, epochs=1, lr=_LR, precision="fp32", gradient_checkpointing=False,
        sample_prompts=[], patch=False, report=False,
    ).run()  # fmt: skip
    after = _unet(found["checkpoint"])
    found["checkpoint"].unlink()
    record.add(f"{work.name}: {found['steps']} step, {found['seconds']:.1f} s, loss {found['loss']:.6f}")
    return torch.cat([(after[name] - values).reshape(-1) for name, values in start.items()])


@contextmanager
def _failing_in_backward(spec: Spec) -> Iterator[list[bool]]:
    """An allocation that cannot be, once, when the backward pass is half way; the list is filled when it is made."""
    made: list[bool] = []
    waiting = [0, 0]  # group norms whose backward pass is still to come: now, and at the most

    def forward(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.GroupNorm) and torch.is_grad_enabled():
            waiting[0] += 1
            waiting[1] = max(waiting)

    def backward(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.GroupNorm) and not made:
            waiting[0] -= 1
            if waiting[0] <= waiting[1] // 2:
                made.append(True)
                torch.empty(2**60, dtype=torch.uint8, device=spec.device)

    hooks = [
        nn.modules.module.register_module_forward_hook(forward),
        nn.modules.module.register_module_full_backward_hook(backward),
    ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def _unet(checkpoint: Path) -> dict[str, Tensor]:
    tensors, _ = read_state_dict(checkpoint)
    return {name: values for name, values in tensors.items() if name.startswith(_UNET)}


def _tensors(path: str) -> dict[str, Tensor]:
    tensors, _ = read_state_dict(Path(path))
    return tensors


if __name__ == "__main__":
    _make_files(json.loads(Path(sys.argv[1]).read_text()))
