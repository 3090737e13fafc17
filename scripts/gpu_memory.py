"""Whole runs on a small card, as parts of scripts/gpu_check.py.

Of the card's memory all is taken but so much: what is left is what a card of 8, 12 or 16 GB has, for the CUDA context
and the libraries too, and a run finds it as it would there: `torch.cuda.mem_get_info` says so, and allocations fail.
"""

from __future__ import annotations

import gc
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_model import image_size, model_keys, run_keys
from gpu_parts import Record, Spec
from torch import Tensor

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.commands.sampling import run as sample
from mu.errors import MuError
from mu.evaluation.config import (
    EvaluateConfig,
    SampleConfig,
)
from mu.evaluation.evaluation import run as evaluate

_NEEDED = {"mask": 12, "train_full": 16}
"""GB that weights of SD v1, gradients and, in training, moments take; a smaller card may refuse them."""


def memory(spec: Spec, record: Record) -> None:
    """Each run, one after the other; promise 22: done, or refused with the keys that would help."""
    gigabytes = int(spec.part.rpartition("_")[2])
    record.add(gigabytes=gigabytes, runs={})
    taken = _take_all_but(gigabytes * 2**30, spec) if spec.on_cuda else []
    taken_bytes = sum(map(len, taken))
    outcomes: dict[str, dict[str, Any]] = {}
    work = Path(spec.folder) / spec.part
    for name, run in _runs(spec, work).items():
        _empty(spec)
        started = time.monotonic()
        outcome: dict[str, Any] = {"outcome": "done"}
        try:
            run()
        except MuError as error:
            # Only memory is a reason here; whatever else is refused is a mistake of the check.
            kind = "refused" if "out of memory" in str(error) else type(error).__name__
            outcome = {"outcome": kind, "message": str(error)}
        except Exception as error:  # noqa: BLE001 - a raw traceback is just what is looked for
            traceback.print_exc()
            outcome = {"outcome": f"traceback of {type(error).__name__}", "message": str(error)[:500]}
        outcome["seconds"] = time.monotonic() - started
        if spec.on_cuda:
            outcome["peak_bytes"] = torch.cuda.max_memory_allocated(spec.device) - taken_bytes
        outcomes[name] = outcome
        peak = f", {outcome['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in outcome else ""
        said = f": {outcome['message'].splitlines()[0][:160]}" if outcome.get("message") else ""
        record.add(f"{name:12} {outcome['outcome']}, {outcome['seconds']:.1f} s{peak}{said}", runs=outcomes)
        small = gigabytes < _NEEDED.get(name, 0) and not spec.toy
        allowed = ("done", "refused") if small else ("done",)
        record.check(f"{name}: {' or '.join(allowed)}", outcome["outcome"] in allowed)
        shutil.rmtree(work / "runs", ignore_errors=True)  # gigabytes each
    taken.clear()


def _runs(spec: Spec, work: Path) -> dict[str, Callable[[], object]]:
    """As a user starts them, with few steps of sampling; batches are those that are chosen by themselves."""
    images, steps = (2, 2) if spec.toy else (8, 3)
    keys = {**run_keys(spec, work, images=images), "sample_steps": steps}
    train = {**keys, "masking": "random", "epochs": 1, "report": False, "patch": False}
    generated = {
        "dataset_type": "generated",
        "raw_dataset_dir": None,
        "retain_dataset_dir": None,
        "images_per_prompt": 2 * images,
        "retain_images_per_prompt": images,
        "processed_dataset_dir": str(work / "generated"),
    }
    sampled = SampleConfig(
        **model_keys(spec),
        prompts=("a photo of a cat", "a photo of a dog"),
        seeds=tuple(range(images)),
        sample_steps=steps,
        image_size=image_size(spec),
        output_dir=str(work / "samples"),
    )
    evaluated = EvaluateConfig(
        **model_keys(spec),
        styles=("Noto", "Blob"),
        objects=("Cats", "Dogs"),
        seeds=tuple(range(images)),
        sample_steps=steps,
        report=False,
        output_dir=str(work / "evaluations"),
    )
    return {
        "train_xattn": lambda: SaliencyUnlearningAlgorithm(train, train_method="xattn").run(),
        "train_full": lambda: SaliencyUnlearningAlgorithm(train).run(),
        "mask": lambda: MaskingAlgorithm(keys).run(),
        "generated": lambda: SaliencyUnlearningAlgorithm(
            {**train, **generated, "sample_prompts": []}, train_method="xattn"
        ).run(),
        "sample": lambda: sample(sampled),
        "evaluate": lambda: evaluate(evaluated),
    }


def _take_all_but(left: int, spec: Spec) -> list[Tensor]:
    """Tensors that fill the device, but for what a card of `left` bytes has beside its CUDA context."""
    torch.zeros(1, device=spec.device)  # the context is there
    _, total = torch.cuda.mem_get_info(spec.device)
    taken = [torch.empty(max(0, total - left), dtype=torch.uint8, device=spec.device)]
    torch.cuda.empty_cache()
    return taken


def _empty(spec: Spec) -> None:
    gc.collect()
    if spec.on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(spec.device)
