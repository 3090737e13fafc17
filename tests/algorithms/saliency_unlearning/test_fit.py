"""The training loop: losses on disk, loggers, Ctrl-C."""

from __future__ import annotations

import csv
import errno
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning.loggers
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger

from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.atomic import WriteError
from mu.config import ConfigError, check_paths
from mu.errors import Terminated
from mu.ldm import LatentDiffusion
from mu.run_folder import RunFolder
from mu.unlearning import loggers
from mu.unlearning.batches import Batch, RetainBatch
from mu.unlearning.checkpoints import Checkpoints
from mu.unlearning.loggers import LossLog, RunLogger, wandb_logger, wandb_mode
from mu.unlearning.run_state import read_run_state
from mu.unlearning.trainer import Trainer

TERMS = [(3.0, 1.0, 4.0), (5.0, 2.0, 6.0), (7.0, 3.0, 8.0), (10.0, 4.0, 12.0)]
"""loss, forget, retain of four steps."""


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    with RunFolder.create(tmp_path, "run") as run:
        yield run


@pytest.fixture
def train(
    make_tiny_model: Callable[..., LatentDiffusion], folder: RunFolder
) -> Callable[..., dict[str, float]]:
    """train(config, look): fits four steps, two an epoch, whose losses are `TERMS`; each calls `look(model)` first."""

    def run(config: Any, look: Callable[[Any], object] = lambda _: None) -> dict[str, float]:
        model = SaliencyUnlearnModel(make_tiny_model(), "xattn")
        trainer = Trainer(model, Planned(model, look), lr=1e-3)
        return trainer.fit(
            FourSteps(),
            log=LossLog(folder, RunLogger(config, folder.path)),
            progress=SimpleNamespace(look=lambda *_: None),  # type: ignore[arg-type]
            checkpoints=Checkpoints(folder.path, config),
        )

    return run


class FourSteps:
    steps_per_epoch, total_steps = 2, 4

    def __getitem__(self, step: int) -> Batch:
        part = RetainBatch(*[torch.zeros(1)] * 4)
        return Batch(part, part)

    def validation(self) -> list[Batch]:
        return []


class Planned:
    """An objective whose terms are those of `TERMS`, whatever the weights."""

    weights: Mapping[str, float] = {"forget": 1.0, "retain": 0.5}

    def __init__(self, model: SaliencyUnlearnModel, look: Callable[[Any], object]) -> None:
        self.model, self.look, self.steps = model, look, iter(TERMS)

    def terms(self, *_: Any) -> dict[str, torch.Tensor]:
        self.look(self.model)
        reached = torch.stack([p.sum() for _, p in self.model.parameters_to_train()]).sum()
        _, forget, retain = next(self.steps)
        return {"forget": forget + 0.0 * reached, "retain": retain + 0.0 * reached}


def test_the_losses_are_means_of_the_last_epoch_and_every_step_is_on_disk(
    train: Callable[..., dict[str, float]], tiny_runs: Any, folder: RunFolder
) -> None:
    assert train(tiny_runs.train_config()) == {"loss": 8.5, "forget_loss": 3.5, "retain_loss": 10.0}
    with open(folder.path / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "loss", "forget", "retain"]
    assert [[float(cell) for cell in row] for row in rows[1:]] == [
        [step, *terms] for step, terms in enumerate(TERMS, start=1)
    ]


def test_ctrl_c_ends_the_run_as_ctrl_c_and_stays_switched_on(
    train: Callable[..., dict[str, float]], tiny_runs: Any
) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def press(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_runs.train_config(), press)
    assert signal.getsignal(signal.SIGINT) is handler


def test_promise_27_losses_that_cannot_be_written_stop_the_run_with_a_checkpoint_that_has_them(
    train: Callable[..., dict[str, float]], tiny_runs: Any, folder: RunFolder
) -> None:
    """The disk is full from the third row on: /dev/full says so for real."""
    path, steps = folder.path / "metrics.csv", 0

    def fill_up(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            path.unlink()
            path.symlink_to("/dev/full")

    with pytest.raises(
        WriteError, match=r"metrics\.csv: the row of a step could not be written \(No space left"
    ):
        train(tiny_runs.train_config(), fill_up)
    (left,) = (folder.path / "checkpoints").iterdir()
    assert left.name == "step-00000003.safetensors"
    table = read_run_state(left).part("tables")["metrics.csv"].numpy().tobytes()
    path.unlink()
    for step, (loss, forget, retain) in enumerate(TERMS[:3], start=1):
        folder.metrics_csv.append(step, loss=loss, forget=forget, retain=retain)
    assert table.partition(b"\n")[2] == path.read_bytes()  # the columns were written already
    assert table.partition(b"\n")[0] == b"step,loss,forget,retain\r"


def test_promise_27_where_no_checkpoint_can_be_written_either_the_last_one_stays(
    train: Callable[..., dict[str, float]], tiny_runs: Any, folder: RunFolder
) -> None:
    path, checkpoints, steps = folder.path / "metrics.csv", folder.path / "checkpoints", 0

    def fill_up(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            path.unlink()
            path.symlink_to("/dev/full")
            (checkpoints / "step-00000003.safetensors" / "full").mkdir(parents=True)

    with pytest.raises(WriteError, match=r"metrics\.csv: .*\. Nor could a checkpoint: .*step-00000003"):
        train(tiny_runs.train_config(checkpoint_every_steps=2), fill_up)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    assert read_run_state(checkpoints / "step-00000002.safetensors").step == 2


def test_promise_18_ctrl_c_while_the_logger_ends_is_not_swallowed(
    train: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch, tiny_runs: Any, tmp_path: Path
) -> None:
    """It may send what it has for minutes: the run does not go on to its files as if nothing had come."""

    class Slow(CSVLogger):
        def finalize(self, status: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().finalize(status)

    monkeypatch.setattr(loggers, "wandb_logger", lambda *_: Slow(tmp_path / "logged"))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_runs.train_config())


def test_promise_18_a_signal_during_the_last_save_stops_the_run_with_its_checkpoint(
    train: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: Any,
    folder: RunFolder,
) -> None:
    save, saved = Checkpoints.save, []

    def told(self: Checkpoints, step: int, *rest: Any) -> Path:
        if step == FourSteps.total_steps and step not in saved:
            os.kill(os.getpid(), signal.SIGTERM)
        saved.append(step)
        return save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", told)
    config = tiny_runs.train_config(checkpoint_every_steps=1)
    with pytest.raises(Terminated):
        train(config)
    assert Checkpoints(folder.path, config).paths[0].name == "step-00000004.safetensors"


@pytest.mark.parametrize("at_step", [0, 3])
def test_promise_27_a_logger_that_cannot_write_does_not_end_the_run(
    train: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    at_step: int,
) -> None:
    """A file lies where it would make its folder, from the beginning or from a step on; it is told once."""
    place, steps = tmp_path / "logged", 0

    def block() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.write_text("")

    def look(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == at_step:
            block()

    if at_step == 0:
        block()
    logger = CSVLogger(place, flush_logs_every_n_steps=1)  # stands in for that of Weights & Biases
    monkeypatch.setattr(loggers, "wandb_logger", lambda *_: logger)
    assert train(tiny_runs.train_config(), look)["loss"] == 8.5
    assert sum("CSVLogger failed" in message for message in caplog.messages) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_promise_27_a_full_disk_under_tensorboard_does_not_end_the_run(
    train: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: Any,
    folder: RunFolder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its thread meets the error; the next number to be logged is refused with a ValueError that was raised from it."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    made: list[Any] = []
    make = loggers.make_logger
    monkeypatch.setattr(loggers, "make_logger", lambda *given: made.append(make(*given)) or made[0])
    steps = 0

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def look(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            monkeypatch.setattr(RecordWriter, "write", full)
            writer = made[0].experiment
            writer.add_scalar("loss", 1.0, 3)
            with pytest.raises(OSError, match="No space left"):
                writer.flush()

    assert train(tiny_runs.train_config(logger="tensorboard"), look)["loss"] == 8.5
    told = [message for message in caplog.messages if "TensorBoardLogger failed" in message]
    assert len(told) == 1
    assert "TensorBoardLogger failed (you tried to log " in told[0]
    assert len(folder.metrics_csv.read()) == 4


# ---- Weights & Biases


def test_promise_26_a_service_of_a_parent_that_is_gone_loses_no_run(
    train: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """wandb raises an exception there that is none of `wandb.errors`."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/nowhere/of-a-process-that-ended")
    assert train(tiny_runs.train_config(wandb="offline"))["loss"] == 8.5
    assert sum("WandbLogger failed" in message for message in caplog.messages) == 1
    assert (
        "WANDB_MODE" not in os.environ
    )  # WandbLogger's; it would send the next run of this process offline too


def test_an_error_that_is_no_loggers_is_raised(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "make_logger", lambda *_: CSVLogger(tmp_path))
    logger = RunLogger(tiny_runs.train_config(), tmp_path)
    with logger.open(), pytest.raises(AttributeError):
        logger._send(lambda it: it.log_metrics(metrics=None))  # a defect of the caller


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What `WandbLogger` is made with, on a machine without a key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    calls: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, **settings: Any) -> None:
            calls.append(settings)
            self.experiment = None

    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", Recorder)
    return calls


@pytest.mark.parametrize(("wandb", "mode"), [("off", None), ("online", "disabled"), ("offline", "disabled")])
def test_wandb_can_be_off(
    made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tiny_runs: Any, wandb: str, mode: str | None
) -> None:
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_logger(tiny_runs.train_config(wandb=wandb), Path("run")) is None
    assert made == []


def test_promise_26_wandb_without_a_key_is_offline_and_says_so_once(
    made: list[dict[str, Any]], tiny_runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_runs.train_config(wandb="online", wandb_project="forgetting")
    with caplog.at_level(logging.INFO):
        assert wandb_logger(config, tmp_path / "style-Noto-1") is not None
    (settings,) = made
    assert settings["offline"] is True
    assert settings["project"] == "forgetting"
    assert settings["name"] == "style-Noto-1"
    assert settings["save_dir"] == str(tmp_path / "style-Noto-1")
    assert settings["config"]["template_name"] == "Noto"
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "no API key" in warning.getMessage()


def test_wandb_with_a_key_is_online_unless_the_environment_says_offline(
    made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tiny_runs: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb_logger(tiny_runs.train_config(wandb="online"), tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb_logger(tiny_runs.train_config(wandb="online"), tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    wandb_logger(tiny_runs.train_config(wandb="offline"), tmp_path)
    assert [settings.get("offline", False) for settings in made] == [False, True, True]


def test_promise_26_a_connection_that_cannot_be_made_leaves_the_run_offline(
    made: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from wandb.errors import CommError

    class Unreachable(pytorch_lightning.loggers.WandbLogger):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            if not settings.get("offline"):
                raise CommError("timed out\nand more lines")

    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", Unreachable)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb_logger(tiny_runs.train_config(wandb="online"), tmp_path)
    assert [settings.get("offline", False) for settings in made] == [False, True]
    assert caplog.messages == [f"wandb: timed out; this run is kept offline in {tmp_path / 'wandb'}"]


NOT_SET: None = None


@pytest.mark.parametrize(
    ("logger", "wandb", "variable", "mode"),
    [
        (None, None, NOT_SET, "off"),
        (None, None, "offline", "offline"),
        (None, None, "dryrun", "offline"),
        (None, None, "online", "online"),
        (None, None, "disabled", "off"),
        (None, None, "whatever", "off"),
        (None, "off", "offline", "off"),
        (None, "offline", "online", "offline"),
        (None, "online", NOT_SET, "online"),
        (None, "online", "offline", "offline"),
        ("wandb", None, NOT_SET, "online"),
        ("wandb", None, "offline", "offline"),
        ("wandb", "offline", NOT_SET, "offline"),
        ("wandb", None, "disabled", "off"),
        ("none", None, "online", "off"),
        ("tensorboard", None, "online", "off"),
        ("none", "off", NOT_SET, "off"),
    ],
)
def test_the_key_decides_over_wandb_and_without_it_the_variable(
    monkeypatch: pytest.MonkeyPatch, logger: str | None, wandb: str | None, variable: str | None, mode: str
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(TrainConfig(logger=logger, wandb=wandb)) == mode


@pytest.mark.parametrize(
    ("logger", "wandb"), [("wandb", "off"), ("none", "online"), ("tensorboard", "offline")]
)
def test_keys_of_loggers_that_contradict_each_other_are_a_mistake(logger: str, wandb: str) -> None:
    with pytest.raises(ConfigError, match=r"logger: .* leave"):
        TrainConfig(logger=logger, wandb=wandb)


class Noted(Logger):
    """Stands where a logger stands, and notes what it is sent."""

    name, version = "noted", "0"

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.sent: list[tuple[int | None, dict[str, float]]] = []
        self.finished = False
        self.experiment = SimpleNamespace(finish=lambda: setattr(self, "finished", True))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.sent.append((step, dict(metrics)))


def test_a_step_has_the_same_number_in_the_loggers_as_on_disk(
    train: Callable[..., dict[str, float]],
    tiny_runs: Any,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loggers: list[Noted] = []

    class Kept(Noted):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            loggers.append(self)

    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", Kept)
    train(tiny_runs.train_config(wandb="offline"))
    (logger,) = loggers
    rows = folder.metrics_csv.read()
    assert logger.sent == [
        (int(row["step"]), {name: float(row[name]) for name in ("loss", "forget", "retain")}) for row in rows
    ]
    assert [step for step, _ in logger.sent] == [1, 2, 3, 4]
    assert logger.finished


def test_tensorboard_that_is_not_installed_is_found_before_a_run(
    tiny_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.train_config(logger="tensorboard", masking="none")
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    assert check_paths(config) == [
        "logger: tensorboard needs the package of that name: pip install tensorboard"
    ]


def test_tensorboard_holds_losses_and_pictures_of_the_run(
    train: Callable[..., dict[str, float]], tiny_runs: Any, folder: RunFolder
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_runs.train_config(logger="tensorboard", masking="none")
    assert check_paths(config) == []
    train(config)
    path = folder.path / "pictures" / "step_000002.png"
    path.parent.mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(path)
    logger = RunLogger(config, folder.path)
    with logger.open():
        logger.picture(path, 2)
    found = events.EventAccumulator(str(folder.path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("forget")] == [
        (step, forget) for step, (_, forget, _) in enumerate(TERMS, start=1)
    ]
    (picture,) = found.Images("pictures")
    assert (picture.step, picture.width, picture.height) == (2, 6, 4)


@pytest.mark.slow
def test_promise_26_no_secret_and_no_network_lose_no_run(
    train: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: Any,
    folder: RunFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The real thing: there is a key, nobody listens at the other end, and there is no terminal."""
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_" + "aB3" * 11}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    config = tiny_runs.train_config(wandb="online")
    folder.save_config(config)
    folder.save_environment()
    assert train(config)["loss"] == 8.5
    assert list((folder.path / "wandb").glob("offline-run-*/*.wandb"))
    assert sum("this run is kept offline" in message for message in caplog.messages) == 1
    for path in folder.path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [name for name, value in secrets.items() if value.encode() in content] == [], path


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "variable"), [({"wandb": "online"}, None), ({}, "offline")])
def test_an_offline_run_is_kept_in_the_run_folder(
    train: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: Any,
    folder: RunFolder,
    tmp_path: Path,
    keys: dict[str, str],
    variable: str | None,
) -> None:
    """The real thing, which starts a process of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if variable is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", variable)
    losses = train(tiny_runs.train_config(**keys))
    assert losses["loss"] == 8.5
    (kept,) = (folder.path / "wandb").glob("offline-run-*")
    assert list(kept.glob("*.wandb"))
    import wandb

    assert wandb.run is None  # the next run of this process begins its own
