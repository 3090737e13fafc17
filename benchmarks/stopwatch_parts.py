"""One measurement of the stopwatch, in a process of its own so that its peak memory is its own.

python benchmarks/stopwatch_parts.py spec.json result.json     # what stopwatch.py runs; see `Spec`
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mu.ldm.text_encoder  # noqa: F401 (transformers, which each arm needs, is no part of its time)
from benchmarks.stopwatch_arms import ALPHA, C_GUIDANCE, LR, attention_written_out
from benchmarks.stopwatch_ours import ARMS
from benchmarks.stopwatch_setup import (
    PROMPTS,
    SUBSTITUTE,
    Result,
    begin_training,
    build_model,
    checkpoint_path,
    make_arm,
    model_yaml,
    peak_memory,
    prepare,
    read_examples,
    repeated,
    synchronise,
    timed,
)
from benchmarks.stopwatch_spec import Spec
from mu import memory
from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.errors import first_line
from mu.ldm import LatentDiffusion, load_model_config
from mu.run_folder import environment
from mu.unlearning.moving import names_of


def measure_device(spec: Spec) -> Result:
    """What is computed with: the machine, its matmul rates, and the UNet's FLOPs."""
    side, calls = spec.matmul_side, 10
    rates: Result = {"side": side}
    torch.set_float32_matmul_precision("highest")  # no TF32
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn((side, side), device=spec.device).to(dtype)
        best = repeated(lambda a=a: [torch.mm(a, a) for _ in range(calls)], spec)["fastest"]  # type: ignore[misc]
        rates[f"{name}_tflops"] = 2 * side**3 * calls / best / 1e12
    return {"environment": environment(), "matmul": rates, "flops": count_flops(spec)}


def count_flops(spec: Spec) -> Result:
    """FLOPs of the UNet's matrix products and convolutions, forward and backward, counted without computing them.

    Attention counts as its two products, whichever kernel runs; normalisation, activations, the optimizer, the
    autoencoder and the text encoder do not count, nor does anything that is computed twice.
    """
    from torch.utils.flop_counter import FlopCounterMode

    params = load_model_config(model_yaml(spec))
    model = LatentDiffusion(params, device="meta")
    names = set(names_of(model.unet, spec.train_method))

    def count(images: int, *, backward: bool, train_method: bool) -> int:
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_(backward and (name in names or not train_method))
        latents = torch.randn((images, *model.latent_shape(spec.image_size)), device="meta")
        timesteps = torch.zeros(images, dtype=torch.long, device="meta")
        context = torch.randn((images, 77, params.unet.context_dim or 1), device="meta")
        with FlopCounterMode(display=False) as counter, attention_written_out():
            prediction = model.unet(latents, timesteps, context)
            if backward:
                prediction.sum().backward()
        return int(counter.get_total_flops())

    forget, retain = spec.batch_size, spec.retain_batch_size
    return {
        "unet_forward": count(1, backward=False, train_method=False),
        "image_gradient": count(2, backward=True, train_method=False),
        "training_step": count(forget, backward=False, train_method=True)
        + count(forget + retain, backward=True, train_method=True),
    }


def measure_mask(spec: Spec) -> Result:
    """Gradients of the forget loss, encoding apart where the arm encodes once."""
    model = build_model(spec)
    arm = make_arm(spec, model)
    forget = read_examples(spec, "forget", model)
    encode_s, _ = timed(lambda: arm.encode(forget), spec.device)
    result = repeated(lambda: arm.saliency(forget.batches(spec.mask_batch_size)), spec)
    per_image = result["seconds"] / len(forget)
    return {**result, "encode_s": encode_s, "images": len(forget), "seconds_per_image": per_image}


def measure_threshold(spec: Spec) -> Result:
    """From saliencies of all UNet weights, exponentially distributed, to the mask; no model is in memory."""
    params = load_model_config(model_yaml(spec))
    unet = LatentDiffusion(params, device="meta").unet
    device = "cpu" if spec.arm == "plain" else spec.device  # plain has them on the CPU
    stream = torch.Generator(device).manual_seed(0)
    saliency = {
        name: torch.empty(p.shape, device=device).exponential_(generator=stream)
        for name, p in unet.named_parameters()
    }
    before = peak_memory(spec.device)
    assert spec.arm is not None
    make_mask = ARMS[spec.arm].mask
    result = repeated(lambda: make_mask(saliency, spec.threshold), spec)
    return {**result, "weights": sum(v.numel() for v in saliency.values()), "saliency_memory": before}


def measure_step(spec: Spec) -> Result:
    """One update on a batch to forget and one to retain, under a random mask."""
    result = repeated(begin_training(spec, make_arm(spec, build_model(spec))), spec)
    images = spec.batch_size + spec.retain_batch_size
    return {**result, "images": images, "images_per_second": images / result["seconds"]}


def job_mask(spec: Spec) -> Result:
    """The first command of the whole job: load the model, encode, gradients, threshold, write the mask."""
    if spec.arm == "ours":
        seconds, made = timed(lambda: MaskingAlgorithm(_config(MaskConfig, spec)).run(), spec.device)
        (path,) = made["masks"].values()
        shutil.copy(path, _job_folder(spec) / path.name)
        return {"seconds": seconds, "mask_bytes": path.stat().st_size}
    clock = _Laps(spec)
    model = build_model(replace(spec, checkpoint=str(checkpoint_path(spec))))
    clock.lap("load")
    arm, forget = make_arm(spec, model), read_examples(spec, "forget", model)
    arm.encode(forget)
    clock.lap("encode")
    saliency = arm.saliency(forget.batches(spec.mask_batch_size))
    clock.lap("gradients")
    mask = arm.mask(saliency, spec.threshold)
    clock.lap("threshold")
    path = arm.save_mask(mask, _job_folder(spec))
    clock.lap("write")
    return {**clock.result(), "mask_bytes": path.stat().st_size}


def job_train(spec: Spec) -> Result:
    """The second command: load the model and the mask, encode, train, write the checkpoint."""
    (mask_path,) = _job_folder(spec).glob("mask*")
    if spec.arm == "ours":
        config = _config(TrainConfig, spec, mask_path=str(mask_path))
        seconds, made = timed(lambda: SaliencyUnlearningAlgorithm(config).run(), spec.device)
        sizes = {f"{name}_bytes": made[name].stat().st_size for name in ("checkpoint", "patch")}
        return {"seconds": seconds, "steps": made["steps"], **sizes}
    clock = _Laps(spec)
    model = build_model(replace(spec, checkpoint=str(checkpoint_path(spec))))
    mask = torch.load(mask_path)
    clock.lap("load")
    arm = make_arm(spec, model)
    forget, retain = read_examples(spec, "forget", model), read_examples(spec, "retain", model)
    arm.encode(forget)
    arm.encode(retain)
    clock.lap("encode")
    arm.start_training(mask, spec.train_method)
    batches = forget.batches(spec.batch_size) * spec.epochs
    for step, batch in enumerate(batches):
        arm.step(batch, retain.cut(step * spec.retain_batch_size, spec.retain_batch_size))
    clock.lap("train")
    path = arm.save_model(_job_folder(spec))
    clock.lap("write")
    return {**clock.result(), "steps": len(batches), "checkpoint_bytes": path.stat().st_size}


class _Laps:
    """Seconds of each part of a stage."""

    def __init__(self, spec: Spec) -> None:
        self.device = spec.device
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def result(self) -> Result:
        return {"seconds": sum(self.laps.values()), "of_which": self.laps}


def _job_folder(spec: Spec) -> Path:
    folder = Path(spec.folder) / f"job-{spec.arm}"
    folder.mkdir(exist_ok=True)
    return folder


def _config(kind: type[MaskConfig | TrainConfig], spec: Spec, **more: Any) -> dict[str, Any]:
    """What a user would write to run this job."""
    folder, job = Path(spec.folder), _job_folder(spec)
    shared = {
        "ckpt_path": str(checkpoint_path(spec)),
        "model_config_path": str(model_yaml(spec)),
        "devices": spec.device,
        "dataset_type": "folder",
        "template_name": "benchmark",
        "raw_dataset_dir": str(folder / "forget"),
        "retain_dataset_dir": str(folder / "retain"),
        "forget_prompts": [PROMPTS["forget"]],
        "retain_prompts": [PROMPTS["retain"]],
        "substitute": SUBSTITUTE,
        "processed_dataset_dir": str(job / "processed"),
        "image_size": spec.image_size,
        "threshold": spec.threshold,
        "precision": "bf16-mixed" if spec.autocast else "fp32",
        "output_dir": str(job / "runs"),
    }
    if kind is MaskConfig:
        return {**shared, "batch_size": spec.mask_batch_size, "c_guidance": C_GUIDANCE}
    return {
        **shared,
        **more,
        "batch_size": spec.batch_size,
        "retain_batch_size": spec.retain_batch_size,
        "epochs": spec.epochs,
        "train_method": spec.train_method,
        "alpha": ALPHA,
        "lr": LR,
        "sample_prompts": [],
    }


PARTS: Mapping[str, Callable[[Spec], Result]] = {
    "prepare": prepare,
    "device": measure_device,
    "mask": measure_mask,
    "threshold": measure_threshold,
    "step": measure_step,
    "job_mask": job_mask,
    "job_train": job_train,
}


def run(spec: Spec) -> Result:
    """One part; memory that ran out is a result: `status` is "measured" or "out of memory"."""
    if spec.device != "cpu":
        torch.cuda.init()  # the next line does not do it, and fails without
        torch.cuda.reset_peak_memory_stats(spec.device)
    try:
        result = {"status": "measured", **PARTS[spec.part](spec)}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, memory.OutOfMemoryError) and not memory.is_out_of_memory(error):
            raise
        result = {"status": "out of memory", "message": first_line(error)}
    return {**result, "peak": peak_memory(spec.device)}


def main() -> int:
    spec_path, result_path = (Path(argument) for argument in sys.argv[1:])
    spec = Spec(**json.loads(spec_path.read_text(encoding="utf-8")))
    if spec.threads:
        torch.set_num_threads(spec.threads)
    result = run(spec)
    result_path.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
