"""What a training run writes, in which dtype and in which order: the file is what is reported, and it comes first."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.masking import random_mask
from mu.algorithms.saliency_unlearning.scripts.train import main
from mu.config import dump
from mu.evaluation.report import report_training
from mu.ldm import CheckpointError, load_model, save_checkpoint
from mu.ldm.checkpoint import read_checkpoint
from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import ema_name, is_ema_copy
from mu.ldm.patch import PatchError, bits_of, patch_checkpoint
from mu.ldm.tensor_file import read_state_dict, write_state_dict
from mu.ldm.text_to_image import sample_images
from mu.unlearning import output, progress
from mu.unlearning.output import (
    check_save_dtype,
    rounding_warning,
)
from mu.unlearning.progress import ProgressPictures
from mu.unlearning.runs import decorating

Tensors = dict[str, Tensor]
ROOT = Path(__file__).parents[3]
PROMPT = "A Cats image in Noto style."
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def unlearned(tiny_runs: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    wanted = {"masking": "random", "epochs": 1, "output_dir": str(folder / "runs"), **changes}
    return SaliencyUnlearningAlgorithm(tiny_runs.train_config(**wanted)).run()


def same(one: Tensors, other: Tensors) -> list[str]:
    """Names of tensors that are not the same in both, to the bit."""
    keys = one.keys() & other.keys()
    differing = {
        key
        for key in keys
        if one[key].dtype != other[key].dtype or not torch.equal(bits_of(one[key]), bits_of(other[key]))
    }
    return sorted(differing | (one.keys() ^ other.keys()))


def follows(name: str) -> bool:
    return name.startswith(UNET_PREFIX) or is_ema_copy(name)


@pytest.fixture
def fp8(tiny_runs: Any, tmp_path: Path) -> Path:
    path = tmp_path / "fp8.safetensors"
    model = load_model(tiny_runs.model_config, tiny_runs.checkpoint())
    save_checkpoint(model, path, unet_dtype=torch.float8_e4m3fn)
    return path


# ---- what is reported is what the file holds


@pytest.mark.parametrize(
    ("source", "changes"),
    [("fp8", {}), ("half", {"save_dtype": "bf16"}), ("tiny", {"save_dtype": "fp16"})],
)
def test_promise_28_pictures_after_and_counts_are_of_the_written_file(
    tiny_runs: Any,
    fp8: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    changes: dict[str, Any],
) -> None:
    taken: dict[str, list[Tensor]] = {}
    save = ProgressPictures.save
    monkeypatch.setattr(
        ProgressPictures, "save", lambda self, path: taken.update(self._taken) or save(self, path)
    )
    before = fp8 if source == "fp8" else tiny_runs.checkpoint(source)
    result = unlearned(
        tiny_runs,
        tmp_path,
        ckpt_path=str(before),
        sample_prompts=(PROMPT,),
        sample_seeds=(3,),
        random_fraction=0.25,
        lr=1e-4,
        **changes,
    )
    for moment, path in (("before", before), ("after", result["checkpoint"])):
        model = load_model(tiny_runs.model_config, path)
        (drawn,) = sample_images(model, [(PROMPT, 3)], steps=2, guidance_scale=3.0)
        assert torch.equal(taken[moment][0], drawn), moment
    old, new = read_state_dict(before)[0], read_state_dict(result["checkpoint"])[0]
    changed = sum(
        int((bits_of(new[name]) != bits_of(old[name].to(new[name].dtype))).sum())
        for name in old
        if name.startswith(UNET_PREFIX)
    )
    assert result["weights_changed"] == changed
    assert result["weights_moved"] > 0.9 * result["weights_selected"]
    assert result["weights_rounded_back"] == result["weights_moved"] - changed
    noted = json.loads((result["run"] / "metrics.json").read_text())
    for key in ("weights_changed", "weights_moved", "weights_rounded_back"):
        assert noted[key] == result[key]


def test_promise_28_a_run_that_is_mostly_rounded_away_says_so(
    tiny_runs: Any, fp8: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """8 bits cannot hold steps of 1e-5; written in fp32, the same training is all there."""
    keys = {"ckpt_path": str(fp8), "lr": 1e-5, "train_method": "xattn"}
    with caplog.at_level(logging.WARNING):
        lost = unlearned(tiny_runs, tmp_path, **keys)
    assert lost["weights_rounded_back"] > 0.9 * lost["weights_moved"] > 0
    (said,) = [message for message in caplog.messages if "rounded back" in message]
    assert f"{lost['weights_rounded_back']:,} of {lost['weights_moved']:,} weights" in said
    assert "Set save_dtype fp32, or a higher lr" in said
    html = report_training(lost["run"], show_unsafe=False)
    assert html is not None
    told = "moved by less than the file's number format can hold"
    assert f"{lost['weights_rounded_back']:,} {told}" in html.read_text()
    assert "Most of the training is not in the file" in html.read_text()

    caplog.clear()
    kept = unlearned(tiny_runs, tmp_path, save_dtype="fp32", **keys)
    assert kept["weights_moved"] == kept["weights_changed"] == lost["weights_moved"]
    assert kept["weights_rounded_back"] == 0
    assert not [message for message in caplog.messages if "rounded back" in message]
    html = report_training(kept["run"], show_unsafe=False)
    assert html is not None
    assert told not in html.read_text()


@pytest.mark.parametrize(("changed", "warns"), [(0, True), (49, True), (50, False), (100, False)])
def test_the_warning_begins_at_more_than_half(changed: int, warns: bool) -> None:
    assert (rounding_warning(moved=100, changed=changed, lr=1e-5) is not None) == warns


# ---- the dtype of the written UNet


@pytest.mark.parametrize(
    ("source", "save_dtype", "output_format", "ema"),
    [
        ("half", "fp32", "safetensors", True),
        ("half", "fp32", "diffusers", False),
        ("tiny", "bf16", "ckpt", False),
        ("tiny", "fp16", "safetensors", True),
        ("half", "source", "safetensors", True),
    ],
)
def test_promise_23_whatever_the_dtype_only_the_mask_moves_and_the_patch_fits(
    tiny_runs: Any, tmp_path: Path, source: str, save_dtype: str, output_format: str, ema: bool
) -> None:
    base = tmp_path / f"base.{output_format if output_format != 'diffusers' else 'safetensors'}"
    before = read_state_dict(tiny_runs.checkpoint(source))[0]
    if ema:
        copies = {ema_name(key): t * 1.01 for key, t in before.items() if key.startswith(UNET_PREFIX)}
        before |= {**copies, "model_ema.decay": torch.tensor(0.9999)}
    write_state_dict(before, base)
    result = unlearned(
        tiny_runs,
        tmp_path,
        ckpt_path=str(base),
        save_dtype=save_dtype,
        output_format=output_format,
        random_fraction=0.25,
    )
    model = load_model(tiny_runs.model_config)
    after = dict(read_checkpoint(result["checkpoint"], model.params).tensors)
    mask = random_mask(dict(model.unet.named_parameters()), 0.25, seed=0)
    allowed = {UNET_PREFIX + name: marked for name, marked in mask.items()}
    allowed |= {ema_name(name): marked for name, marked in allowed.items()}
    changed = 0
    for name, tensor in after.items():
        original = (
            before[name].to(DTYPES[save_dtype]) if follows(name) and save_dtype != "source" else before[name]
        )
        assert tensor.dtype == original.dtype, name
        differs = bits_of(tensor) != bits_of(original)
        assert not (differs & ~allowed.get(name, torch.zeros((), dtype=torch.bool))).any(), name
        if name.startswith(UNET_PREFIX):
            changed += int(differs.sum())
            if ema:
                assert torch.equal(after[ema_name(name)][differs], tensor[differs])
    assert changed == result["weights_changed"] > 0.5 * result["weights_selected"]
    assert any(map(is_ema_copy, after)) == ema

    there, back = (tmp_path / f"{name}{base.suffix}" for name in ("there", "back"))
    patch_checkpoint(base, there, [result["patch"]])
    patched = read_state_dict(there)[0]
    assert (
        same(
            {name: patched[name] for name in after if follows(name)},
            {n: t for n, t in after.items() if follows(n)},
        )
        == []
    )
    if source == "half":
        patch_checkpoint(there, back, [result["patch"]], remove=True)
        assert same(read_state_dict(back)[0], before) == []
    else:
        with pytest.raises(PatchError, match=r"which rounded the base's torch\.float32"):
            patch_checkpoint(there, back, [result["patch"]], remove=True)
        assert not back.exists()


@pytest.mark.parametrize("name", [f"{UNET_PREFIX}out.2.bias", ema_name(f"{UNET_PREFIX}out.2.bias")])
def test_weights_that_the_dtype_cannot_hold_are_found_before_training(name: str) -> None:
    tensors = {name: torch.tensor([1.0, -70_000.0]), "first_stage_model.weight": torch.tensor([1e6])}
    with pytest.raises(CheckpointError, match=r"fp16, which ends at 65504: \S+ has 70000; take bf16 or fp32"):
        check_save_dtype(tensors, "fp16")
    for dtype in ("source", "bf16", "fp32"):
        check_save_dtype(tensors, dtype)


# ---- what was trained is on disk before anything that only decorates


def trained_by_command(tiny_runs: Any, folder: Path, **changes: Any) -> tuple[int, Path]:
    """Exit code and run folder of the command `train`."""
    wanted = {
        "masking": "random",
        "epochs": 1,
        "train_method": "xattn",
        "sample_prompts": (PROMPT,),
        "sample_seeds": (3,),
        "output_dir": str(folder / "runs"),
        **changes,
    }
    (folder / "config.yaml").write_text(dump(tiny_runs.train_config(**wanted)))
    code = main(["--config_path", str(folder / "config.yaml")])
    (run,) = (folder / "runs").iterdir()
    return code, run


def holds_an_unlearned_model(run: Path, tiny_runs: Any) -> None:
    old, new = (read_state_dict(path)[0] for path in (tiny_runs.checkpoint(), run / "model.safetensors"))
    load_model(tiny_runs.model_config, run / "model.safetensors")
    differing = same(old, new)
    assert differing
    assert all("attn2" in name for name in differing)


@pytest.mark.parametrize(
    "blocked", [("model.patch.safetensors", "pictures", "report.html"), ("metrics.json",)]
)
def test_promise_27_files_that_cannot_be_written_lose_no_model(
    tiny_runs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    blocked: tuple[str, ...],
) -> None:
    """Where each of them should go, something else lies; where a folder should be made, a file."""
    write = output.write_unlearned

    def write_and_block(*args: Any, **options: Any) -> Path:
        path = write(*args, **options)
        for name in blocked:
            if name == "pictures":
                (path.parent / name).write_text("")
            else:
                (path.parent / name / "full").mkdir(parents=True)
        return path

    monkeypatch.setattr(output, "write_unlearned", write_and_block)
    code, run = trained_by_command(tiny_runs, tmp_path)
    assert code == 0
    holds_an_unlearned_model(run, tiny_runs)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name in blocked:
        what = "before_after.png" if name == "pictures" else name
        assert [message for message in warned if message.startswith(f"{what} could not be made (")]
    if "metrics.json" not in blocked:
        noted = json.loads((run / "metrics.json").read_text())
        assert (noted["patch"], noted["pictures"]) == (None, None)
        assert noted["weights_changed"] > 0


@pytest.mark.parametrize("from_number", [1, 2])
def test_promise_27_no_memory_for_pictures_loses_no_model(
    tiny_runs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    from_number: int,
) -> None:
    """From the first on, before training; or from the second on: while training, and afterwards."""
    asked = 0

    def sample(*args: Any, **options: Any) -> Iterator[Tensor]:
        nonlocal asked
        asked += 1
        if asked >= from_number:
            torch.empty(2**60, dtype=torch.uint8)
        return sample_images(*args, **options)

    monkeypatch.setattr(progress, "sample_images", sample)
    code, run = trained_by_command(tiny_runs, tmp_path, sample_every_steps=1)
    assert code == 0
    assert asked == 4  # before, after both steps, after
    holds_an_unlearned_model(run, tiny_runs)
    said = capsys.readouterr().err
    moments = ["pictures before", "pictures/step_000001.png", "pictures/step_000002.png", "pictures after"]
    for what in moments[from_number - 1 :]:
        assert f"WARNING {what} could not be made (out of memory: " in said
    assert (run / "pictures" / "before_after.png").exists() == (from_number > 1)
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_promise_27_a_logger_that_dies_does_not_end_the_run(tiny_runs: Any, tmp_path: Path) -> None:
    """The process of Weights & Biases is killed while the command trains."""
    config = tiny_runs.train_config(
        masking="random",
        train_method="xattn",
        epochs=60,
        wandb="offline",
        report=False,
        output_dir=str(tmp_path / "runs"),
    )
    (tmp_path / "config.yaml").write_text(dump(config))
    words = ["-m", "mu.algorithms.saliency_unlearning.scripts.train", "--config_path", "config.yaml"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = subprocess.Popen(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**environment, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    try:
        waited = time.monotonic()
        while not list((tmp_path / "runs").glob("*/metrics.csv")):
            assert command.poll() is None
            assert time.monotonic() - waited < 120
            time.sleep(0.05)
        found = subprocess.run(
            ["pgrep", "-P", str(command.pid), "-f", "wandb-core"], capture_output=True, text=True, check=True
        )
        os.kill(int(found.stdout), signal.SIGKILL)
        assert command.wait(timeout=120) == 0
    finally:
        command.kill()
    (run,) = (tmp_path / "runs").iterdir()
    holds_an_unlearned_model(run, tiny_runs)
    assert (run / "log.txt").read_text().count("WandbLogger failed") == 1


def test_a_defect_is_no_decoration() -> None:
    """Only what can really happen is passed over."""
    with pytest.raises(RuntimeError, match="shapes"), decorating("picture"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(KeyError), decorating("picture"):
        raise KeyError("x")
