"""A training run that stops early goes on as if nothing had happened; and whatever happens, it can."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
from mu.config import ConfigError
from mu.errors import Terminated
from mu.ldm.tensor_file import (
    FINGERPRINT_KEY,
    CheckpointError,
    fingerprint,
    read_state_dict,
    write_state_dict,
)
from mu.run_folder import RunFolder, RunFolderError
from mu.unlearning.checkpoints import (
    Checkpoints,
    find_run_state,
)
from mu.unlearning.loggers import LossLog
from mu.unlearning.run_state import ResumeError, RunState, read_head, read_run_state, write_run_state
from tests.forked_commands import SCRIPTS, Commands, flags

TRAIN = f"{SCRIPTS}.train"
SETTINGS = {
    "masking": "random",
    "lr_schedule": "linear",
    "target": "frozen",
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 3,
}
"""Of 4 steps, with all that has a state: optimizer, schedule, originals."""
RECIPE: dict[str, Any] = {"epochs": 2, "batch_size": 3, "lr": 1e-3, "sample_prompts": ()}
"""That of `tiny_runs.train_config`."""


@pytest.fixture(scope="module")
def whole(tiny_runs: Any) -> dict[str, Any]:
    """The files of a run that nothing interrupts."""
    config = tiny_runs.train_config(**SETTINGS, output_dir=str(tiny_runs.folder / "whole"))
    run = SaliencyUnlearningAlgorithm(config).run()["run"]
    assert not (run / "checkpoints").exists()
    return results(run)


@contextmanager
def stopping_after(step: int, signum: int) -> Iterator[None]:
    """This process sends itself a signal in that step, after its losses are written."""

    def append(self: LossLog, number: int, terms: Any) -> Any:
        unwritten = written(self, number, terms)
        if number == step:
            os.kill(os.getpid(), signum)
        return unwritten

    written = LossLog.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossLog, "append", append)
        yield


def results(run: Path) -> dict[str, Any]:
    """The checkpoint to the bit (its metadata has a date), the other files to the byte."""
    names = ("model.patch.safetensors", "metrics.csv")
    tensors, metadata = read_state_dict(run / "model.safetensors")
    assert metadata[FINGERPRINT_KEY] == fingerprint(tensors)
    return {"model": metadata[FINGERPRINT_KEY], **{name: (run / name).read_bytes() for name in names}}


def only_run(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def checkpoints_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def stopped_once(tiny_runs: Any) -> Path:
    """A run that SIGTERM stopped after 3 of its 4 steps."""
    config = tiny_runs.train_config(**SETTINGS, output_dir=str(tiny_runs.folder / "stopped"))
    with stopping_after(3, signal.SIGTERM), pytest.raises(Terminated):
        SaliencyUnlearningAlgorithm(config).run()
    return only_run(tiny_runs.folder / "stopped")


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """The same below `tmp_path / "runs"`, for one test to use up."""
    return Path(shutil.copytree(stopped_once, tmp_path / "runs" / stopped_once.name))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


# ---- stopping and going on


@pytest.mark.parametrize(
    ("step", "signum", "error"),
    [(1, signal.SIGINT, KeyboardInterrupt), (4, signal.SIGTERM, Terminated)],
)
def test_promise_19_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(
    tiny_runs: Any,
    tmp_path: Path,
    whole: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    step: int,
    signum: int,
    error: type[BaseException],
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    changes = {**SETTINGS, "checkpoint_every_steps": None, "output_dir": str(tmp_path / "runs")}
    with stopping_after(step, signum), pytest.raises(error), caplog.at_level(logging.INFO):
        SaliencyUnlearningAlgorithm(tiny_runs.train_config(**changes)).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    run = only_run(tmp_path / "runs")
    assert checkpoints_in(run) == [f"step-0000000{step}.safetensors"]
    assert f"--config_path {run / 'config.yaml'} --resume {run}" in caplog.text

    result = SaliencyUnlearningAlgorithm(tiny_runs.train_config(**changes, resume="newest")).run()
    assert result["run"] == run
    assert only_run(tmp_path / "runs") == run
    assert results(run) == whole
    assert not (run / "checkpoints").exists()
    noted = json.loads((run / "metrics.json").read_text())
    with open(run / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert noted["loss"] == pytest.approx(sum(losses[2:]) / 2)  # of the whole last epoch


def test_a_run_goes_on_in_another_output_dir_with_its_table(
    tiny_runs: Any, stopped: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_runs.train_config(
        **{**SETTINGS, "checkpoint_every_steps": 100, "output_dir": str(tmp_path / "other")},
        resume=str(stopped / "checkpoints" / "step-00000001.safetensors"),
    )
    run = SaliencyUnlearningAlgorithm(config).run()["run"]
    assert run == only_run(tmp_path / "other")
    assert results(run) == whole
    assert not (stopped / "metrics.json").exists()
    assert (run / "config.yaml").exists()


def test_a_finished_run_has_nothing_to_go_on_with(tiny_runs: Any, stopped: Path) -> None:
    (stopped / "metrics.json").write_text("{}")
    config = tiny_runs.train_config(**SETTINGS, output_dir=str(stopped.parent), resume=str(stopped))
    with pytest.raises(ResumeError, match="is finished"):
        find_run_state(config)
    with pytest.raises(ResumeError, match=f"no checkpoint of an unfinished run below {stopped.parent}"):
        find_run_state(tiny_runs.train_config(**SETTINGS, output_dir=str(stopped.parent), resume="newest"))


def test_a_run_that_still_runs_is_not_gone_on_with(tiny_runs: Any, stopped: Path) -> None:
    keys = {**SETTINGS, "output_dir": str(stopped.parent)}
    with RunFolder.go_on(stopped.parent, stopped.name):
        with pytest.raises(ResumeError, match="no checkpoint of an unfinished run"):
            find_run_state(tiny_runs.train_config(**keys, resume="newest"))
        with pytest.raises(RunFolderError, match="another process is at work"):
            SaliencyUnlearningAlgorithm(tiny_runs.train_config(**keys, resume=str(stopped))).run()
    assert find_run_state(tiny_runs.train_config(**keys, resume="newest")).step == 3


# ---- which checkpoint


def test_promise_20_resume_without_a_checkpoint_is_an_error_before_anything_is_made(
    tiny_runs: Any, tmp_path: Path
) -> None:
    for resume, said in [
        ("newest", f"below {tmp_path / 'runs'}"),
        (str(tmp_path), f"at {tmp_path}"),
        (str(tmp_path / "gone"), "there is no file or folder"),
    ]:
        config = tiny_runs.train_config(**SETTINGS, output_dir=str(tmp_path / "runs"), resume=resume)
        with pytest.raises(ResumeError, match=said):
            SaliencyUnlearningAlgorithm(config).run()
    assert list(tmp_path.iterdir()) == []


def test_promise_20_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tiny_runs: Any, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = stopped / "checkpoints" / "step-00000003.safetensors"
    damage(newest)
    for resume in ("newest", str(stopped)):
        caplog.clear()
        config = tiny_runs.train_config(**SETTINGS, output_dir=str(stopped.parent), resume=resume)
        with caplog.at_level(logging.INFO):
            assert find_run_state(config).step == 2
        assert f"passed over: {newest}" in caplog.text
        assert "going on after step 2" in caplog.text
    with pytest.raises(ResumeError, match=r"whole checkpoint .* damaged: .*step-00000003"):
        find_run_state(tiny_runs.train_config(**SETTINGS, output_dir=str(stopped.parent), resume=str(newest)))


@pytest.mark.parametrize("cut", [0, 5, 500, -1])
def test_a_truncated_checkpoint_is_never_taken(tiny_runs: Any, stopped: Path, cut: int) -> None:
    newest = stopped / "checkpoints" / "step-00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:cut])
    config = tiny_runs.train_config(**SETTINGS, output_dir=str(stopped.parent), resume="newest")
    assert find_run_state(config).step == 2


def test_promise_19_other_settings_are_refused_and_named(tiny_runs: Any, stopped: Path) -> None:
    for resume in (str(stopped), "newest"):
        changed = {**SETTINGS, "lr": 2e-3, "seed": 7, "output_dir": str(stopped.parent), "resume": resume}
        with pytest.raises(ConfigError) as caught:
            SaliencyUnlearningAlgorithm(tiny_runs.train_config(**changed)).run()
        assert sorted(mistake.split(":")[0] for mistake in caught.value.mistakes) == ["lr", "seed"]
        assert "lr: the run was begun with 0.001, now it is 0.002" in str(caught.value)


@pytest.mark.parametrize(("optimizer", "refused"), [("adam", False), ("adam8bit", True)])
def test_a_run_of_a_key_that_is_gone_goes_on_if_it_had_its_default(
    tiny_runs: Any, stopped: Path, optimizer: str, refused: bool
) -> None:
    newest = stopped / "checkpoints" / "step-00000003.safetensors"
    state = read_run_state(newest)
    write_run_state(replace(state, settings={**state.settings, "optimizer": optimizer}))
    config = tiny_runs.train_config(**SETTINGS, output_dir=str(stopped.parent), resume=str(newest))
    if refused:
        with pytest.raises(ConfigError, match="begun with adam8bit, now it is no key any more"):
            find_run_state(config)
    else:
        assert find_run_state(config).step == 3


def test_another_model_or_mask_at_the_same_settings_is_refused(tiny_runs: Any, stopped: Path) -> None:
    changed = {**SETTINGS, "ckpt_path": str(tiny_runs.checkpoint("other")), "resume": str(stopped)}
    with pytest.raises(ConfigError) as caught:
        SaliencyUnlearningAlgorithm(tiny_runs.train_config(**changed, output_dir=str(stopped.parent))).run()
    assert [mistake.split(":")[0] for mistake in caught.value.mistakes] == ["ckpt_path"]


def test_what_does_not_change_the_result_may_change(tiny_runs: Any, stopped: Path, tmp_path: Path) -> None:
    changed = {
        **SETTINGS,
        "checkpoint_every_steps": None,
        "keep_checkpoints": 1,
        "sample_seeds": (5,),
        "wandb_project": "other",
        "output_dir": str(tmp_path),
    }
    assert find_run_state(tiny_runs.train_config(**changed, resume=str(stopped))).step == 3


def test_a_run_goes_on_with_its_weights_in_another_order_in_memory(
    tiny_runs: Any, stopped: Path, whole: dict[str, Any]
) -> None:
    """channels_last is of the memory; values and moments in the checkpoint are row-major."""
    keys = {**SETTINGS, "output_dir": str(stopped.parent), "resume": str(stopped), "channels_last": True}
    run = SaliencyUnlearningAlgorithm(tiny_runs.train_config(**keys)).run()["run"]
    with open(run / "metrics.csv", newline="") as file:
        last = [float(row["loss"]) for row in csv.DictReader(file)][-1]
    expected = float(whole["metrics.csv"].decode().split()[-1].split(",")[1])
    assert last == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_another_version_is_an_error_that_says_so(stopped: Path) -> None:
    newest = stopped / "checkpoints" / "step-00000003.safetensors"
    head = json.dumps({"format": "1", "step": 3, "settings": {}, "identity": {}, "content": {}})
    digest = hashlib.sha256(head.encode()).hexdigest()
    write_state_dict({}, newest, {"run_state": head, "run_state_sha256": digest})
    with pytest.raises(
        CheckpointError, match="has format 1, this version reads 2: the run was begun with ano"
    ):
        read_run_state(newest)


# ---- keeping


def test_older_checkpoints_go_only_when_the_new_one_has_been_read_back(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mu.unlearning import checkpoints as module

    checkpoints = Checkpoints(tmp_path, tiny_runs.train_config(keep_checkpoints=2))
    for step in (1, 2, 3):
        checkpoints.save(step, {}, {})
    assert checkpoints_in(tmp_path) == ["step-00000002.safetensors", "step-00000003.safetensors"]

    def written_badly(state: RunState) -> None:
        written(state)
        damage(state.path)

    written = module.write_run_state
    monkeypatch.setattr(module, "write_run_state", written_badly)
    with pytest.raises(CheckpointError, match="step-00000004"):
        checkpoints.save(4, {"weights/a": torch.ones(500)}, {})
    assert checkpoints_in(tmp_path) == ["step-00000002.safetensors", "step-00000003.safetensors"]


def test_checkpoints_are_due_by_steps_or_by_minutes(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mu.unlearning import checkpoints as module

    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)

    def due(steps: int | None, minutes: float | None) -> list[int]:
        nonlocal now
        now = 1000.0
        keys = {"checkpoint_every_steps": steps, "checkpoint_every_minutes": minutes}
        checkpoints = Checkpoints(tmp_path, tiny_runs.train_config(**keys))
        found = []
        for step in range(1, 9):
            now += 30.0
            if checkpoints.is_due(step):
                found.append(step)
                checkpoints.save(step, {}, {})
        return found

    assert due(3, None) == [3, 6]
    assert due(None, 1.0) == [2, 4, 6, 8]
    assert due(3, 2.0) == [3, 6]
    assert due(None, None) == []


# ---- real processes


@pytest.fixture
def train(tiny_runs: Any, tmp_path: Path, commands: Commands) -> Any:
    """train(**keys): begins a training command below `tmp_path / "runs"`."""

    def start(*, max_file_bytes: int | None = None, **changes: Any) -> Any:
        keys = {**RECIPE, **SETTINGS, "output_dir": str(tmp_path / "runs"), **changes}
        argv = flags(tiny_runs.keys(**keys))
        return commands.start(TRAIN, tmp_path / "log", *argv, max_file_bytes=max_file_bytes)

    return start


def test_promise_15_a_kill_during_a_save_and_a_full_disk_leave_the_last_checkpoint(
    train: Any, tmp_path: Path, whole: dict[str, Any]
) -> None:
    """15 and 16 of what users may rely on: SIGKILL while a file is written; a write that the system refuses."""
    runs = tmp_path / "runs"
    second = "*/checkpoints/.step-00000002*.tmp"
    assert train().kill_when(signal.SIGKILL, lambda: any(runs.glob(second))) == -signal.SIGKILL
    run = only_run(runs)
    kept = [path for path in sorted((run / "checkpoints").glob("step-*")) if read_run_state(path)]
    assert kept

    size = kept[-1].stat().st_size
    before = {path: path.read_bytes() for path in kept}
    command = train(resume=str(run), max_file_bytes=size // 2)
    assert command.wait() == 1
    said = command.output()
    following = f"step-{read_head(kept[-1]).step + 1:08d}.safetensors"
    assert f"{following} could not be written (" in said
    assert "bytes are needed" in said
    assert "Traceback" not in said
    assert f"--resume {run}" in said
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before

    assert train(resume="newest").wait() == 0
    assert results(run) == whole


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_promise_18_a_command_that_is_told_to_stop_says_how_to_go_on(
    train: Any, tmp_path: Path, whole: dict[str, Any], signum: int, code: int
) -> None:
    runs = tmp_path / "runs"
    command = train(epochs=2)
    assert command.kill_when(signum, lambda: any(runs.glob("*/checkpoints/step-00000001*"))) == code
    run = only_run(runs)
    said = command.output()
    assert f"python -m {TRAIN} --config_path {run / 'config.yaml'} --resume {run}" in said
    assert "Traceback" not in said
    assert train(resume=str(run)).wait() == 0
    assert results(run) == whole
