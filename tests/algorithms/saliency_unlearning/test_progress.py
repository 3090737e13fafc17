"""Looking at a run while it trains: what is written, what it says, and that training does not notice."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import WandbLogger

from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.algorithms.saliency_unlearning.trainer import SaliencyUnlearnTrainer
from mu.config import ConfigError
from mu.ldm import load_model
from mu.ldm.tensor_file import read_state_dict
from mu.run_folder import RunFolder
from mu.unlearning import loggers
from mu.unlearning.batches import Batch, EncodedBatches
from mu.unlearning.loggers import RunLogger
from mu.unlearning.progress import Progress, validation_losses


def rows_of(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def trainer(tiny_runs: Any) -> SaliencyUnlearnTrainer:
    ldm = load_model(tiny_runs.model_config, tiny_runs.checkpoint())
    return SaliencyUnlearnTrainer(SaliencyUnlearnModel(ldm, "xattn"), alpha=0.7, lr=1e-3, target="frozen")


@pytest.fixture
def data(tiny_runs: Any, trainer: SaliencyUnlearnTrainer) -> SaliencyUnlearnDataHandler:
    return SaliencyUnlearnDataHandler(tiny_runs.train_config(), trainer.model.ldm)


def test_what_is_trained_is_the_same_to_the_bit(tiny_runs: Any, tmp_path: Path) -> None:
    config = tiny_runs.train_config(
        masking="random",
        target="frozen",
        precision="bf16-mixed",
        lr_schedule="linear",
        sample_prompts=("A Cats image in Noto style.",),
        sample_seeds=(3,),
        output_dir=str(tmp_path),
    )
    plain = SaliencyUnlearningAlgorithm(config).run()
    watched = SaliencyUnlearningAlgorithm(config, sample_every_steps=1, validate_every_steps=1).run()
    for name in ("metrics.csv", "pictures/before_after.png"):
        assert (plain["run"] / name).read_bytes() == (watched["run"] / name).read_bytes(), name
    # The files differ in the date that they carry.
    weights, same = (read_state_dict(run["checkpoint"])[0] for run in (plain, watched))
    assert weights.keys() == same.keys()
    for name, tensor in weights.items():
        assert tensor.numpy().tobytes() == same[name].numpy().tobytes(), name
    assert not (plain["run"] / "validation.csv").exists()
    assert len(rows_of(watched["run"] / "validation.csv")) == 5
    assert len(list((watched["run"] / "pictures").glob("step_*.png"))) == 4


def test_chosen_steps_are_on_disk_and_the_losses_show_training(tiny_runs: Any, tmp_path: Path) -> None:
    config = tiny_runs.train_config(
        masking="none",
        lr=0.01,
        alpha=0.5,
        epochs=3,
        sample_prompts=("A Cats image in Noto style.", "A Cats image in Blob style."),
        sample_every_steps=4,
        validate_every_steps=2,
        output_dir=str(tmp_path),
    )
    run = SaliencyUnlearningAlgorithm(config).run()["run"]
    assert {path.name for path in (run / "pictures").iterdir()} == {"before_after.png", "step_000004.png"}
    rows = rows_of(run / "validation.csv")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row in rows:
        assert row["loss"] == pytest.approx(row["forget"] + 0.5 * row["retain"])
    assert rows[-1]["loss"] < rows[0]["loss"]


def validation(batches: EncodedBatches, draws: int, batch_size: int) -> list[Batch]:
    cut = copy.copy(batches)
    cut.batch_size = batch_size
    return cut.validation(draws)


def test_a_validation_is_the_mean_over_fixed_draws_however_they_are_batched(
    trainer: SaliencyUnlearnTrainer, data: SaliencyUnlearnDataHandler
) -> None:
    """Each element's square by hand, one draw at a time; 7 draws of 4 and 2 images, so that draws repeat images."""
    steps = data.train_batches
    ldm = trainer.model.ldm
    forget, retain, seen = [], [], []
    for (z, t, noise, prompt, substitute), (zr, tr, noise_r, prompt_r), _ in validation(steps, 7, 1):
        seen.append(int(t))
        noisy, noisy_r = ldm.q_sample(z, t, noise), ldm.q_sample(zr, tr, noise_r)
        with torch.no_grad():
            difference = ldm.predict_noise(noisy, t, prompt) - ldm.predict_noise(noisy, t, substitute)
            forget.append(difference.square().mean())
            retain.append((ldm.predict_noise(noisy_r, tr, prompt_r) - noise_r).square().mean())
        assert not any(torch.equal(noise, other) for other in (z, noise_r))
    assert sorted(seen) == [71, 214, 357, 500, 642, 785, 928]  # the middles of sevenths of 1000
    means = [float(torch.stack(term).mean()) for term in (forget, retain)]
    for batch_size in (1, 3, 100):
        losses = validation_losses(trainer.losses, validation(steps, 7, batch_size))
        assert [losses["forget"], losses["retain"]] == pytest.approx(means, rel=1e-5)
        assert losses["loss"] == pytest.approx(means[0] + 0.7 * means[1], rel=1e-5)


def test_draws_of_a_validation_differ_from_those_of_training(data: SaliencyUnlearnDataHandler) -> None:
    steps = data.train_batches
    ((forget, _, _),) = validation(steps, 4, 4)
    trained = torch.cat([steps[number].forget.noise for number in range(len(steps))])
    assert not any(torch.equal(one, other) for one in forget.noise for other in trained)


I2P = {
    "template": "i2p",
    "dataset_type": "i2p",
    "template_name": "violence",
    "styles": None,
    "objects": None,
    "raw_dataset_dir": "data/i2p",
}


class Recorder(WandbLogger):
    """What would go to Weights & Biases."""

    experiment = SimpleNamespace()  # type: ignore[assignment]

    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}

    def finalize(self, status: str) -> None:
        assert status == "success"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.sent.update({name: (step, value) for name, value in metrics.items()})

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.sent[key] = (step, images)


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({}, True),
        (I2P, False),
    ],
)
def test_pictures_of_i2p_do_not_go_to_wandb(
    tiny_runs: Any,
    trainer: SaliencyUnlearnTrainer,
    data: SaliencyUnlearnDataHandler,
    tmp_path: Path,
    changes: dict[str, Any],
    sent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_runs.train_config(
        sample_prompts=("a teapot",), sample_every_steps=3, validate_every_steps=3, **changes
    )
    taken: list[Path] = []
    pictures: Any = SimpleNamespace(
        model=trainer.model.ldm, snapshot=lambda _, path: taken.append(path) or path
    )
    recorder = Recorder()
    monkeypatch.setattr(loggers, "make_logger", lambda *_: recorder)
    with RunFolder.create(tmp_path, "run") as folder:
        logger = RunLogger(config, folder.path)
        progress = Progress(config, data.train_batches, pictures, folder=folder, logger=logger)
        with logger.open():
            for step in (2, 3):
                progress.look(step, trainer.losses)
    (path,) = taken
    assert path == folder.path / "pictures" / "step_000003.png"
    assert recorder.sent.get("pictures") == ((3, [str(path)]) if sent else None)
    (row,) = rows_of(folder.path / "validation.csv")
    for name in ("loss", "forget", "retain"):
        assert recorder.sent[f"validation/{name}"] == (3, row[name])


def test_pictures_of_no_prompts_are_a_mistake(tiny_runs: Any) -> None:
    with pytest.raises(ConfigError, match="sample_every_steps: there are no prompts to sample"):
        tiny_runs.train_config(sample_prompts=(), sample_every_steps=2)
