"""What the stopwatch has measured, as Markdown: a table for each JSON that it wrote."""

from __future__ import annotations

from typing import Any

from benchmarks.stopwatch import ARMS, SUMS

Report = dict[str, Any]

_SECONDS = {
    "mask_s": "gradients for the mask",
    "threshold_s": "threshold",
    "mask_and_threshold_s": "**gradients and threshold**",
    "step_s": "**training step**",
    "job_mask_s": "whole job: mask",
    "job_train_s": "whole job: training",
    "job_s": "**whole job**",
}
_BYTES = {
    "mask_peak_bytes": "peak memory: gradients",
    "threshold_peak_bytes": "peak memory: threshold",
    "mask_and_threshold_peak_bytes": "**peak memory: both**",
    "step_peak_bytes": "peak memory: training step",
    "job_peak_bytes": "**peak memory: whole job**",
    "job_host_bytes": "the same with libraries and mapped files",
    "mask_bytes": "mask file",
    "checkpoint_bytes": "checkpoint",
    "patch_bytes": "patch",
}


def table(report: Report) -> str:
    """One measurement: what was measured on what, and a row for each quantity that any arm has."""
    arms = [arm for arm in ARMS if arm in report["arms"]]
    others = [arm for arm in arms if arm != "ours"] if "ours" in arms else []
    lines = [
        heading(report),
        "",
        "| | " + " | ".join([*arms, *(f"{arm} / ours" for arm in others)]) + " |",
        "|---" + "|---:" * (len(arms) + len(others)) + "|",
    ]
    for names, show in ((_SECONDS, _seconds), (_BYTES, _gigabytes)):
        for key, name in names.items():
            if any(key in report["summary"][arm] for arm in arms):
                cells = [
                    show(report["summary"][arm][key])
                    if key in report["summary"][arm]
                    else _why(report, arm, key)
                    for arm in arms
                ]
                cells += [_ratio(report["ratios"].get(f"{arm}/ours", {}).get(key)) for arm in others]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    for part, name in (("mask", "arithmetic of the gradients"), ("step", "arithmetic of the training step")):
        if any(part in report["achieved"][arm] for arm in arms):
            cells = [_rate(report["achieved"][arm].get(part)) for arm in arms] + [""] * len(others)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(report: Report) -> str:
    """One paragraph: model, images, machine."""
    settings, device = report["settings"], report["device"]
    rates = device["matmul"]
    return (
        f"**`--scale {report['scale']}` on {'the CPU' if settings['device'] == 'cpu' else 'a GPU'}.** "
        f"A UNet of {report['model']['weights']['unet']:,} weights, train method {settings['train_method']}, "
        f"{settings['image_size']} px; {settings['images']} images to forget and as many to retain, "
        f"batches of {settings['mask_batch_size']} for the mask and of {settings['batch_size']} + "
        f"{settings['retain_batch_size']} in training, {settings['epochs']} epochs; careful and ours "
        f"in {'bf16 autocast' if settings['autocast'] else 'fp32'}. {computes(report)}; "
        f"torch {device['environment']['torch']['version']}; matrices of {rates['side']} x {rates['side']} multiply at "
        f"{rates['fp32_tflops']:.3g} TFLOP/s in fp32 and {rates['bf16_tflops']:.3g} in bf16. {report['date'][:10]}."
    )


def computes(report: Report) -> str:
    """The processor or the GPU."""
    torch = report["device"]["environment"]["torch"]
    on_cpu = report["settings"]["device"] == "cpu"
    return f"{report['cpu']}, {torch['threads']} threads" if on_cpu else str(torch["devices"][0])


def _why(report: Report, arm: str, key: str) -> str:
    """Why an arm has no number: what stopped it, or a dash where it has no such thing."""
    stage = key.removesuffix("_s").removesuffix("_peak_bytes").removesuffix("_host_bytes")
    for name in SUMS.get(stage, (stage,)):
        status = report["arms"][arm].get(name, {}).get("status", "measured")
        if status != "measured":
            return str(status)
    return "-"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _rate(achieved: Report | None) -> str:
    return "-" if achieved is None else f"{achieved['tflops']:.3g} TFLOP/s, {achieved['of_bf16']:.0%} of bf16"
