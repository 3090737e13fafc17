"""What the parts of the stopwatch share: what is measured, the clock, the memory, the model, the images."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.stopwatch_arms import Arm, Examples
from benchmarks.stopwatch_ours import ARMS
from mu.config import resolve_path
from mu.datasets.images import load_image, save_png
from mu.datasets.streams import draw, generator
from mu.ldm import LatentDiffusion, load_model, load_model_config, save_checkpoint
from mu.unlearning.moving import names_of

PROMPTS = {"forget": "A picture in the style to forget.", "retain": "A picture of something else."}
SUBSTITUTE = "A picture in another style."
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one process measures."""

    part: str
    arm: str | None
    device: str
    folder: str
    """Of the model (model.yaml, model.safetensors) and the images (forget/, retain/); see `prepare`."""
    model_config: str
    """YAML of the model, as the key `model_config_path` takes it."""
    checkpoint: str | None
    """None: random weights."""
    overrides: dict[str, Any]
    """Of the UNet's options in the YAML."""
    image_size: int
    images: int
    """To forget, and as many to retain."""
    mask_batch_size: int
    batch_size: int
    retain_batch_size: int
    epochs: int
    train_method: str
    threshold: float
    autocast: bool
    """bf16 autocast of careful's and our two stages."""
    matmul_side: int
    """Of the square matrices whose product gives the device's rate."""
    repeats: int
    budget_s: float
    """No further repeat begins after so many seconds of one measurement."""
    threads: int | None


# ---------------------------------------------------------------------------------------------- time and memory


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
    if first > spec.budget_s:
        return {"seconds": first, "fastest": first, "slowest": first, "repeats": 1, "warm_up": False}
    runs: list[float] = []
    while len(runs) < spec.repeats and (not runs or sum(runs) < spec.budget_s):
        runs.append(timed(function, spec.device)[0])
    return {
        "seconds": statistics.median(runs),
        "fastest": min(runs),
        "slowest": max(runs),
        "repeats": len(runs),
        "warm_up": True,
    }


def peak_memory(device: str) -> Result:
    """`host_bytes`: the largest resident size of this process so far, with libraries and mapped files;
    `device_bytes`: the most that torch had allocated on CUDA.
    """
    peak: Result = {"host_bytes": _host_peak()}
    if device != "cpu":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def _host_peak() -> int:
    # ru_maxrss begins at the size of the process that started this one; the kernel's own mark does not.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch says so of the CPU's in a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error)
        for sign in (
            "can't allocate memory",
            "not enough memory",
            "bad_alloc",
            "out of memory",
            "ALLOC_FAILED",
        )
    )


# --------------------------------------------------------------------------------------------- model and examples


def model_yaml(spec: Spec) -> Path:
    """The model's YAML with the overrides, in the folder."""
    path = Path(spec.folder) / "model.yaml"
    if not path.exists():
        content = yaml.safe_load(resolve_path(spec.model_config).read_text(encoding="utf-8"))
        params = content["model"]["params"]["unet_config"]["params"]
        params.update(spec.overrides)
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
    folder = Path(spec.folder)
    model_yaml(spec)
    for kind in PROMPTS:
        (folder / kind).mkdir(exist_ok=True)
        for number in range(spec.images):
            noise = torch.rand(
                (3, spec.image_size, spec.image_size), generator=generator(0, kind, number, "")
            )
            save_png(2 * noise - 1, folder / kind / f"{number:04d}.png")
    if not spec.checkpoint:
        save_checkpoint(build_model(spec), checkpoint_path(spec))
    params = load_model_config(model_yaml(spec))
    unet = LatentDiffusion(params, device="meta").unet
    weights = {"unet": sum(p.numel() for p in unet.parameters())}
    for method in ("full", "xattn", spec.train_method):
        names = set(names_of(unet, method))
        weights[method] = sum(p.numel() for name, p in unet.named_parameters() if name in names)
    return {"weights": weights, "checkpoint_bytes": checkpoint_path(spec).stat().st_size}


def read_examples(spec: Spec, kind: str, model: LatentDiffusion) -> Examples:
    files = sorted((Path(spec.folder) / kind).glob("*.png"))[: spec.images]
    shape = model.latent_shape(spec.image_size)
    draws = [draw(0, kind, 0, f.name, shape=shape, num_timesteps=model.num_timesteps) for f in files]
    return Examples(
        names=tuple(f"{kind}/{file.name}" for file in files),
        images=tuple(load_image(file, spec.image_size) for file in files),
        prompt=PROMPTS[kind],
        timesteps=torch.tensor([one.timestep for one in draws]),
        noise=torch.stack([one.noise for one in draws]),
        posterior_noise=torch.stack([one.posterior_noise for one in draws]),
    )


def make_arm(spec: Spec, model: LatentDiffusion) -> Arm:
    assert spec.arm is not None
    return ARMS[spec.arm](model, substitute=SUBSTITUTE, autocast=spec.autocast)
