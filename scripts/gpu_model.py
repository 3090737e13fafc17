"""What the parts of scripts/gpu_check.py work on: the device, a model with random weights, images, configs of runs.

At full size it is SD v1's structure at 512 px, as in the benchmark's scale sd1; at toy size the benchmark's tiny scale.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_parts import Record, Spec

from benchmarks.stopwatch import parser, spec_of
from benchmarks.stopwatch_parts import measure_device
from benchmarks.stopwatch_setup import PROMPTS, SUBSTITUTE, model_yaml, prepare, random_model, timed
from benchmarks.stopwatch_spec import Spec as BenchmarkSpec
from mu.ldm import save_checkpoint
from mu.run_folder import environment


def device(spec: Spec, record: Record) -> None:
    """What computes, and how fast it multiplies matrices."""
    name = environment()["platform"]
    if spec.on_cuda:
        properties = torch.cuda.get_device_properties(spec.device)
        name = properties.name
        free, total = torch.cuda.mem_get_info(spec.device)
        record.add(
            f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free; compute capability {properties.major}.{properties.minor}",
            memory_bytes=total,
            capability=[properties.major, properties.minor],
        )
    record.add(device=name, environment=environment())
    measured = measure_device(benchmark_spec(spec))
    rates = measured["matmul"]
    record.add(
        f"matmul: {rates['fp32_tflops']:.1f} TFLOP/s in fp32, {rates['bf16_tflops']:.1f} in bf16",
        measured=measured,
    )


def model(spec: Spec, record: Record) -> None:
    """Make the model on the device and write it; write the images."""
    seconds, _ = timed(lambda: make_model(spec), spec.device)
    size = checkpoint_path(spec).stat().st_size
    record.add(f"model made and written in {seconds:.1f} s, {size / 1e9:.2f} GB", model_s=seconds, bytes=size)
    one = benchmark_spec(spec)
    seconds, prepared = timed(lambda: prepare(one), spec.device)
    record.add(f"{2 * one.images} images of {one.image_size} px", images_s=seconds, prepared=prepared)


def make_model(spec: Spec) -> None:
    """Random weights, made on the device and written."""
    one = benchmark_spec(spec)
    save_checkpoint(random_model(one, spec.device), checkpoint_path(spec))


def benchmark_spec(spec: Spec, **fields: Any) -> BenchmarkSpec:
    """What the stopwatch measures at this size, of the checkpoint that `model` writes; `fields` replace its own."""
    scale, kind = ("tiny" if spec.toy else "sd1"), ("cuda" if spec.on_cuda else "cpu")
    one = spec_of(parser().parse_args(["--scale", scale, "--device", kind]), Path(spec.folder))
    return replace(one, **{"checkpoint": str(checkpoint_path(spec)), "device": spec.device, **fields})


def model_path(spec: Spec) -> Path:
    """The model's YAML."""
    return model_yaml(benchmark_spec(spec))


def checkpoint_path(spec: Spec) -> Path:
    return Path(spec.folder) / "model.safetensors"


def image_size(spec: Spec) -> int:
    """Pixels."""
    return benchmark_spec(spec).image_size


def few_images(spec: Spec, kind: str, count: int) -> Path:
    """A folder of the first images of a kind, "forget" or "retain"."""
    folder = Path(spec.folder) / f"{kind}-{count}"
    folder.mkdir(exist_ok=True)
    for file in sorted((Path(spec.folder) / kind).glob("*.png"))[:count]:
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def run_keys(spec: Spec, work: Path, *, images: int) -> dict[str, Any]:
    """Keys of a mask or a training on a few images, with everything that is written below `work`."""
    return {
        **model_keys(spec),
        "dataset_type": "folder",
        "template_name": "check",
        "raw_dataset_dir": str(few_images(spec, "forget", images)),
        "retain_dataset_dir": str(few_images(spec, "retain", images)),
        "forget_prompts": [PROMPTS["forget"]],
        "retain_prompts": [PROMPTS["retain"]],
        "substitute": SUBSTITUTE,
        "image_size": image_size(spec),
        "processed_dataset_dir": str(work / "processed"),
        "output_dir": str(work / "runs"),
    }


def model_keys(spec: Spec) -> dict[str, Any]:
    """Keys that say which model, and where."""
    return {
        "ckpt_path": str(checkpoint_path(spec)),
        "model_config_path": str(model_path(spec)),
        "devices": spec.device if spec.on_cuda else "cpu",
    }
