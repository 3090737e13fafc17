"""Whether the numbers are right, as parts of scripts/gpu_check.py: the threshold, and saliency in each precision."""

from __future__ import annotations

import torch
from gpu_model import checkpoint_path, image_size, model_path
from gpu_parts import Record, Spec
from torch import Tensor

from benchmarks.stopwatch_setup import timed
from mu.algorithms.saliency_unlearning.masking import accumulate_saliency, threshold_mask
from mu.config import resolve_path
from mu.ldm import LatentDiffusion, load_model, load_model_config
from mu.memory import is_out_of_memory
from mu.unlearning.compute import (
    Compute,
    computing,
)

_THRESHOLD = 0.5
_EMOJI = "package:assets/emoji_canvas/model"
_PRECISIONS = ("fp32", "tf32", "bf16-mixed")
Values = dict[str, Tensor]


def threshold(spec: Spec, record: Record) -> None:
    """The mask of all weights from saliencies that lie on the device: its time, its memory, and whether it is exact."""
    params = load_model_config(model_path(spec))
    shapes = {name: p.shape for name, p in LatentDiffusion(params, device="meta").unet.named_parameters()}
    stream = torch.Generator(spec.device).manual_seed(0)
    saliency = {
        name: torch.empty(shape, device=spec.device).exponential_(generator=stream)
        for name, shape in shapes.items()
    }
    size = sum(values.numel() for values in saliency.values())
    threshold_mask(saliency, _THRESHOLD)  # the first call of a kernel loads it
    before = _start_of_peak(spec)
    seconds, mask = timed(lambda: threshold_mask(saliency, _THRESHOLD), spec.device)
    record.add(
        f"{size / 1e6:.0f} million weights in {seconds:.3f} s", weights=size, seconds_threshold=seconds
    )
    if spec.on_cuda:
        beside = torch.cuda.max_memory_allocated(spec.device) - before - size
        record.add(f"{beside / 1e6:.0f} MB beside saliencies and mask", beside_bytes=beside)
    marked = torch.cat([values.reshape(-1) for values in mask.values()])  # (n,)
    record.check("it marks exactly half", int(marked.count_nonzero()) == int(_THRESHOLD * size))
    try:
        every = torch.cat([values.reshape(-1) for values in saliency.values()])  # (n,)
        saliency.clear()
        sort_s, order = timed(lambda: every.sort(descending=True, stable=True).indices, spec.device)  # (n,)
        expected = torch.zeros_like(marked)
        expected[order[: int(_THRESHOLD * size)]] = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        record.add("the sort that it is compared with does not fit into memory")
        return
    record.add(f"a stable sort takes {sort_s:.3f} s", sort_s=sort_s)
    record.check("it is the mask of a stable sort, to the bit", torch.equal(marked, expected))


def saliency(spec: Spec, record: Record) -> None:
    """Each precision against fp32 on the CPU, of trained weights (EmojiCanvas, 64 px) and of the model of the check."""
    models = {
        "emoji": (resolve_path(f"{_EMOJI}_config.yaml"), resolve_path(f"{_EMOJI}.safetensors"), 64, 8),
        # A smaller image: what the CPU has to do is what takes time here.
        "check": (model_path(spec), checkpoint_path(spec), image_size(spec) // (1 if spec.toy else 2), 4),
    }
    for name, (yaml, checkpoint, pixels, images) in models.items():
        here = load_model(yaml, checkpoint)
        batch = _batch(here, pixels, images)
        for guidance in (7.5, 0.0):
            seconds, reference = timed(
                lambda m=here, b=batch, g=guidance: _saliency(m, b, g, Compute()), "cpu"
            )
            half = threshold_mask(reference, _THRESHOLD)
            record.add(f"{name}, guidance {guidance:g}: on the CPU {seconds:.1f} s")
            there = load_model(yaml, checkpoint, device=spec.device)
            for precision in _precisions(spec):
                compute = Compute(precision=precision, channels_last=spec.on_cuda)
                found = _saliency(there, batch, guidance, compute)
                error, common = _distance(found, reference), _common(threshold_mask(found, _THRESHOLD), half)
                record.add(
                    f"    {precision:10} relative error {error:.2e}, {common:.2%} of the half in common",
                    **{f"{name}_{guidance:g}_{precision}": {"error": error, "common": common}},
                )
                if precision == "fp32":
                    record.check(
                        f"{name}, guidance {guidance:g}: fp32 within 1e-3 of the CPU's", error < 1e-3
                    )
            del there


def _precisions(spec: Spec) -> list[str]:
    """Those that differ on this device."""
    return [name for name in _PRECISIONS if name != "tf32" or spec.on_cuda]


def _batch(ldm: LatentDiffusion, pixels: int, images: int) -> tuple[Tensor, ...]:
    """Latents, timesteps, noise, context and empty context on the CPU; of noise, with real prompts."""
    stream = torch.Generator().manual_seed(0)
    shape = (images, *ldm.latent_shape(pixels))
    latents, noise = (torch.randn(shape, generator=stream) for _ in range(2))
    timesteps = torch.linspace(20, ldm.num_timesteps - 20, images).long()
    with torch.no_grad():
        context, empty = (ldm.embed([prompt] * images) for prompt in ("A Cats image in Noto style.", ""))
    return latents, timesteps, noise, context, empty


def _saliency(ldm: LatentDiffusion, batch: tuple[Tensor, ...], guidance: float, compute: Compute) -> Values:
    """On the CPU."""
    moved: tuple = tuple(part.to(ldm.device) for part in batch)
    with computing(ldm, compute):
        found = accumulate_saliency(ldm, [moved], c_guidance=guidance, compute=compute)
    return {name: values.cpu() for name, values in found.items()}


def _distance(found: Values, reference: Values) -> float:
    """Norm of the difference over all weights, relative."""
    squares = [((found[name] - values).double().square().sum(), values.double().square().sum())
               for name, values in reference.items()]  # fmt: skip
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5)


def _common(one: Values, other: Values) -> float:
    """Share of the weights that one mask marks which the other marks too."""
    both = sum(int((one[name] & marked).count_nonzero()) for name, marked in other.items())
    return both / sum(int(marked.count_nonzero()) for marked in other.values())


def _start_of_peak(spec: Spec) -> int:
    """Bytes that are allocated now; the peak counts from here."""
    if not spec.on_cuda:
        return 0
    torch.cuda.reset_peak_memory_stats(spec.device)
    return int(torch.cuda.memory_allocated(spec.device))
