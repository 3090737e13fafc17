"""The benchmark's arms against each other, its counts, its summary, its processes, and the tables made from it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import speed_text, stopwatch
from benchmarks import stopwatch_parts as parts


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny scale in fp32, its model and images prepared."""
    given = stopwatch.parser().parse_args(["--scale", "tiny", "--precision", "fp32"])
    spec = stopwatch.spec_of(given, tmp_path_factory.mktemp("benchmark"))
    parts.prepare(spec)
    return spec


def arm_of(spec: Any, name: str) -> tuple[Any, Any, Any]:
    one = replace(spec, arm=name)
    model = parts.build_model(one)
    arm = parts.make_arm(one, model)
    forget, retain = (parts.read_examples(one, kind, model) for kind in ("forget", "retain"))
    arm.encode(forget)
    arm.encode(retain)
    return arm, forget, retain


def test_arms_compute_the_same_saliency_mask_and_first_update(spec: Any) -> None:
    masks, updates, marked = {}, {}, {}
    for name in ("plain", "careful", "ours"):
        arm, forget, retain = arm_of(spec, name)
        saliency = arm.saliency(forget.batches(spec.mask_batch_size))
        mask = arm.mask(saliency, spec.threshold)
        masks[name] = torch.cat([values.flatten().bool() for values in mask.values()])
        shared = marked.setdefault("mask", {key: values.bool() for key, values in mask.items()})
        before = {key: p.detach().clone() for key, p in arm.model.unet.named_parameters()}
        as_its_own = {key: values.to(next(iter(mask.values())).dtype) for key, values in shared.items()}
        arm.start_training(as_its_own, "full")
        arm.step(forget.cut(0, 2), retain.cut(0, 2))
        after = dict(arm.model.unet.named_parameters())
        updates[name] = torch.cat([(after[key].detach() - old).flatten() for key, old in before.items()])
        outside = torch.cat([~values.flatten() for values in shared.values()])
        assert not updates[name][outside].any()
    size = len(masks["plain"])
    for name in ("careful", "ours"):
        assert abs(int(masks[name].sum()) - size // 2) <= 2  # careful keeps all that are equal to the edge
        assert (masks[name] == masks["plain"]).float().mean() > 0.999
        # Adam's first step is lr times the gradient's sign: only gradients near zero may differ.
        differ = (updates[name] - updates["plain"]).abs() > 1e-6
        assert updates["plain"].abs().max() > 5e-6
        assert differ.float().mean() < 1e-3


def test_masks_of_one_saliency_are_those_of_a_sort() -> None:
    stream = torch.Generator().manual_seed(0)
    saliency = {"a": torch.rand((3, 5), generator=stream), "b": torch.rand((7,), generator=stream)}
    every = torch.cat([values.flatten() for values in saliency.values()])
    edge = every.sort(descending=True).values[10]
    for arm in parts.ARMS.values():
        mask = arm.mask(saliency, 0.5)  # int(0.5 * 22) = 11
        for name, values in saliency.items():
            assert torch.equal(mask[name].bool(), values >= edge)


def test_counts_floating_point_operations(spec: Any) -> None:
    counts = parts.count_flops(spec)
    forward = counts["unet_forward"]
    # A backward pass takes twice a forward one, less the gradient of the first layer's input.
    assert counts["image_gradient"] == pytest.approx(2 * 3 * forward, rel=0.12)
    assert counts["image_gradient"] <= 2 * 3 * forward
    step = spec.batch_size * forward + (spec.batch_size + spec.retain_batch_size) * 3 * forward
    assert counts["training_step"] == pytest.approx(step, rel=0.12)
    # The input convolution, 4 to 32 channels of 3 x 3 over 4 x 4 places, counts by hand.
    with parts.attention_written_out():
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            torch.nn.functional.conv2d(torch.ones(1, 4, 4, 4), torch.ones(32, 4, 3, 3), padding=1)
    assert counter.get_total_flops() == 2 * 4 * 32 * 9 * 16


def results(seconds: float, gigabytes: float, **more: Any) -> dict[str, Any]:
    peak = {"host_bytes": gigabytes * 1e9 + 1e9, "anonymous_bytes": gigabytes * 1e9}
    return {"status": "measured", "seconds": seconds, "peak": peak, **more}


@pytest.fixture
def made() -> tuple[dict[str, Any], list[tuple[str, str | None]], list[Any]]:
    """A report from made-up measurements, what was asked for, and what was saved."""
    asked, saved = [], []
    rates = {"side": 64, "fp32_tflops": 1.0, "bf16_tflops": 2.0}
    torch_of = {"version": "2.9", "threads": 2, "devices": []}
    device = {
        "matmul": rates,
        "flops": {"image_gradient": 1e11, "training_step": 4e11},
        "environment": {"torch": torch_of},
    }
    by_arm = {
        "plain": {
            "mask": results(2.0, 4.0, encode_s=0.0, images=10),
            "threshold": results(28.0, 8.0),
            "step": {"status": "out of memory", "message": "more than 2 GB", "peak": {"host_bytes": 1}},
            "job_mask": {"status": "out of memory", "message": "more than 2 GB"},
        },
        "ours": {
            "mask": results(1.5, 2.0, encode_s=0.5, images=10),
            "threshold": results(1.0, 1.0),
            "step": results(0.5, 3.0),
            "job_mask": results(4.0, 2.0, mask_bytes=1e6),
            "job_train": results(6.0, 3.5, checkpoint_bytes=2e9, patch_bytes=5e8),
        },
    }

    def run(part: str, arm: str | None) -> dict[str, Any]:
        asked.append((part, arm))
        if arm is None:
            return {"status": "measured", "peak": {"host_bytes": 1}, "weights": {"unet": 1000}, **device}
        return by_arm[arm][part]

    report = stopwatch.benchmark(
        run,
        arms=("plain", "ours"),
        parts=stopwatch.PARTS,
        save=lambda report: saved.append(json.loads(json.dumps(report))),
    )
    return report, asked, saved


def test_summary_adds_up_and_compares(made: Any) -> None:
    report, asked, saved = made
    assert ("job_train", "plain") not in asked  # there was no mask
    assert ("job_train", "ours") in asked
    assert len(saved) == 8
    assert saved[-1]["summary"] == report["summary"]
    ours = report["summary"]["ours"]
    assert ours["mask_s"] == 2.0  # encoding counts: plain encodes within the loop
    assert (ours["mask_and_threshold_s"], ours["job_s"]) == (3.0, 10.0)
    assert (ours["mask_and_threshold_peak_bytes"], ours["job_peak_bytes"]) == (2e9, 3.5e9)
    assert ours["job_host_bytes"] == 4.5e9
    ratios = report["ratios"]["plain/ours"]
    assert (ratios["mask_and_threshold_s"], ratios["mask_and_threshold_peak_bytes"]) == (10.0, 4.0)
    assert "step_s" not in ratios
    assert report["achieved"]["ours"]["step"] == {"tflops": 0.8, "of_bf16": 0.4, "of_fp32": 0.8}
    assert report["achieved"]["plain"]["mask"]["tflops"] == 0.5


def test_tables_show_what_was_measured_and_why_the_rest_was_not(made: Any) -> None:
    given = stopwatch.parser().parse_args(["--scale", "tiny"])
    settings = stopwatch.settings(stopwatch.spec_of(given, Path("folder")))
    page = speed_text.table({"scale": "tiny", "settings": settings, **stopwatch.machine(), **made[0]})
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert rows[""] == "| | plain | ours | plain / ours |"
    assert rows["**gradients and threshold**"] == "| **gradients and threshold** | 30 s | 3 s | 10 |"
    assert rows["**peak memory: both**"] == "| **peak memory: both** | 8.00 GB | 2.00 GB | 4 |"
    assert rows["**training step**"] == "| **training step** | out of memory | 0.5 s |  |"
    assert rows["**whole job**"] == "| **whole job** | out of memory | 10 s |  |"
    assert rows["patch"] == "| patch | - | 0.50 GB |  |"
    assert rows["mask file"] == "| mask file | - | 1 MB |  |"
    arithmetic = "arithmetic of the training step"
    assert rows[arithmetic] == f"| {arithmetic} | - | 0.8 TFLOP/s, 40% of bf16 |  |"
    assert len({line.count("|") for line in rows.values()}) == 1
    assert "1,000 weights" in page


def test_a_part_runs_in_a_process_of_its_own(spec: Any) -> None:
    fields = {**vars(spec), "part": "threshold", "arm": "ours"}
    result = stopwatch.run_part(fields, timeout_s=300, memory_limit=None)
    assert result["status"] == "measured"
    assert result["weights"] == 1066308
    assert result["repeats"] == spec.repeats
    if sys.platform == "linux":
        assert 0 < result["peak"]["anonymous_bytes"] < result["peak"]["host_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory another process has")
def test_a_part_that_takes_too_much_memory_is_stopped_and_recorded(spec: Any) -> None:
    fields = {**vars(spec), "part": "threshold", "arm": "ours"}
    result = stopwatch.run_part(fields, timeout_s=300, memory_limit=10_000_000)
    assert result == {"status": "out of memory", "message": "more than 0.0 GB"}


def test_a_part_that_takes_too_long_or_fails_is_recorded(
    spec: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**vars(spec), "part": "threshold", "arm": "ours"}
    slow = stopwatch.run_part(fields, timeout_s=0.1, memory_limit=None)
    assert slow == {"status": "timed out", "message": "stopped after 0.1 s"}
    wrong = stopwatch.run_part({**fields, "unknown": 1}, timeout_s=300, memory_limit=None)
    assert wrong["status"] == "failed"
    assert "unknown" in wrong["message"]
    assert "TypeError" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_flag_replaces_what_a_scale_says(device: str) -> None:
    for scale in stopwatch.SCALES:
        command = ["--scale", scale, "--device", device, "--width", "64", "--images", "7"]
        made = stopwatch.spec_of(stopwatch.parser().parse_args(command), Path("folder"))
        assert (made.overrides["model_channels"], made.images) == (64, 7)
        assert made.device == {"cpu": "cpu", "cuda": "cuda:0"}[device]
        assert stopwatch.SCALES[scale][device].get("overrides", {}).get("model_channels") != 64


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stopwatch.parser().parse_args(["--scale", "tiny", "--arms", "ours,best"])
    assert "'best' is not one of plain, careful, ours" in capsys.readouterr().err
