"""What the parts of the stopwatch share: the clock, the memory, the model, the images, the step of an arm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.stopwatch import kilobytes
from benchmarks.stopwatch_arms import Arm, Example, Examples
from benchmarks.stopwatch_ours import ARMS
from benchmarks.stopwatch_spec import Spec
from mu.config import resolve_path
from mu.datasets.images import load_image, save_png
from mu.datasets.streams import draw, generator
from mu.devices import peak_memory_bytes
from mu.ldm import LatentDiffusion, load_model, load_model_config, save_checkpoint
from mu.unlearning.moving import names_of

PROMPTS = {"forget": "A picture in the style to forget.", "retain": "A picture of something else."}
SUBSTITUTE = "A picture in another style."
Result = dict[str, Any]


# ---- time and memory


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds until the work of a call is done, and what it returned."""
    synchronise(device)
    started = time.perf_counter()
    value = function()
    synchronise(device)
    return time.perf_counter() - started, value


def repeated(function: Callable[[], Any], spec: Spec) -> Result:
    """Median, fastest and slowest of some calls, after one that does not count.

    Where the first call alone takes the whole budget, it is what counts, and `warm_up` is false.
    """
    first, _ = timed(function, spec.device)
    warm_up = first <= spec.budget_s
    runs = [] if warm_up else [first]
    while warm_up and len(runs) < spec.repeats and (not runs or sum(runs) < spec.budget_s):
        runs.append(timed(function, spec.device)[0])
    return {
        "seconds": statistics.median(runs),
        "fastest": min(runs),
        "slowest": max(runs),
        "repeats": len(runs),
        "warm_up": warm_up,
    }


def peak_memory(device: str) -> Result:
    """`host_bytes`: the largest resident size of this process so far, with libraries and mapped files;
    `device_bytes`: the most that torch had allocated on CUDA.
    """
    # What the library asks begins at the size of the process that started this one; the kernel's own mark does not.
    host = kilobytes("/proc/self/status").get("VmHWM") or peak_memory_bytes()["process"]
    if device == "cpu":
        return {"host_bytes": host}
    return {"host_bytes": host, "device_bytes": torch.cuda.max_memory_allocated(device)}


# ---- model and images


def model_yaml(spec: Spec) -> Path:
    """The model's YAML with the overrides, in the folder."""
    path = Path(spec.folder) / "model.yaml"
    if not path.exists():
        content = yaml.safe_load(resolve_path(spec.model_config).read_text(encoding="utf-8"))
        content["model"]["params"]["unet_config"]["params"].update(spec.overrides)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def checkpoint_path(spec: Spec) -> Path:
    return resolve_path(spec.checkpoint) if spec.checkpoint else Path(spec.folder) / "model.safetensors"


def build_model(spec: Spec) -> LatentDiffusion:
    """The model with its checkpoint's weights, or random ones."""
    if spec.checkpoint:
        return load_model(model_yaml(spec), checkpoint_path(spec), device=spec.device)
    return random_model(spec, "cpu").to(spec.device)


@torch.no_grad()
def random_model(spec: Spec, device: str) -> LatentDiffusion:
    """Random weights, drawn on a device; layers that start at zero do not stay so.

    Else no gradient would pass them, and most saliencies were equal.
    """
    torch.manual_seed(0)
    model = LatentDiffusion(load_model_config(model_yaml(spec)), device=device)
    for parameter in model.unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def prepare(spec: Spec) -> Result:
    """Write what the whole job reads: the YAML, the images (noise), and the checkpoint where weights are random."""
    folder, side = Path(spec.folder), spec.image_size
    for kind in PROMPTS:
        (folder / kind).mkdir(exist_ok=True)
        for number in range(spec.images):
            noise = torch.rand((3, side, side), generator=generator(0, kind, number, ""))
            save_png(2 * noise - 1, folder / kind / f"{number:04d}.png")
    if not spec.checkpoint:
        save_checkpoint(build_model(spec), checkpoint_path(spec))
    unet = LatentDiffusion(load_model_config(model_yaml(spec)), device="meta").unet
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    weights = {"unet": sum(sizes.values())}
    for method in ("full", "xattn", spec.train_method):
        weights[method] = sum(sizes[name] for name in names_of(unet, method))
    return {"weights": weights, "checkpoint_bytes": checkpoint_path(spec).stat().st_size}


def read_examples(spec: Spec, kind: str, model: LatentDiffusion) -> Examples:
    shape, steps = model.latent_shape(spec.image_size), model.num_timesteps
    rows = [
        Example(
            f"{kind}/{file.name}",
            load_image(file, spec.image_size),
            draw(0, kind, 0, file.name, shape=shape, num_timesteps=steps),
        )
        for file in sorted((Path(spec.folder) / kind).glob("*.png"))[: spec.images]
    ]
    return Examples(PROMPTS[kind], tuple(rows))


def make_arm(spec: Spec, model: LatentDiffusion) -> Arm:
    assert spec.arm is not None
    return ARMS[spec.arm](model, substitute=SUBSTITUTE, autocast=spec.autocast)


def begin_training(spec: Spec, arm: Arm) -> Callable[[], None]:
    """Make an arm ready to train, under a random mask; what is returned makes its next step."""
    stream = torch.Generator(spec.device).manual_seed(0)
    mask = {
        name: torch.rand(p.shape, generator=stream, device=spec.device) < spec.threshold
        for name, p in arm.model.unet.named_parameters()
    }
    if spec.arm == "plain":
        mask = {name: marked.long() for name, marked in mask.items()}
    forget, retain = (read_examples(spec, kind, arm.model) for kind in PROMPTS)
    arm.encode(forget)
    arm.encode(retain)
    arm.start_training(mask, spec.train_method)
    steps = count()

    def step() -> None:
        number = next(steps)
        arm.step(
            forget.cut(number * spec.batch_size, spec.batch_size),
            retain.cut(number * spec.retain_batch_size, spec.retain_batch_size),
        )

    return step
