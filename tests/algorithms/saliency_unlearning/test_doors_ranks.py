"""Sampling and evaluation by several processes, whoever starts them: the files and numbers of one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch

from mu.algorithms.saliency_unlearning.scripts import sample
from mu.evaluation.config import (
    EvaluateConfig,
    SampleConfig,
)
from mu.evaluation.emoji_classifier import EmojiClassifier, save_classifier
from mu.launch import on_ranks
from tests.forked_commands import SCRIPTS, flags

pytestmark = pytest.mark.usefixtures("one_thread", "forked_ranks")

PROMPTS = ("A Cats image in Noto style.", "A Dogs image in Blob style.")
NOTES = {"config.yaml", "environment.json", "log.txt", "log-1.txt", "metrics.json", "report.html"}
"""Files that tell of devices, places and times."""


def sample_keys(tiny_runs: Any, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A folder `run` of 6 images."""
    keys = {
        "ckpt_path": str(tiny_runs.checkpoint()),
        "model_config_path": str(tiny_runs.model_config),
        "devices": "cpu",
        "prompts": PROMPTS,
        "seeds": (3, 4, 5),
        "sample_steps": 2,
        "batch_size": 2,
        "output_dir": str(output_dir),
        "run_name": "run",
    }
    return {**keys, **changes}


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    return {name: content for name, content in found.items() if Path(name).name not in NOTES}


def test_two_processes_go_on_with_a_folder_as_one_does(tiny_runs: Any, tmp_path: Path) -> None:
    for name, devices in (("one", "cpu"), ("two", "cpu,cpu")):
        keys = sample_keys(tiny_runs, tmp_path / name, devices=devices)
        assert sample.main(flags({**keys, "devices": "cpu", "seeds": (4,)})) == 0
        assert sample.main(flags(keys)) == 0
    assert len(list((tmp_path / "two" / "run" / "images").iterdir())) == 6
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_two_processes_share_images_and_come_to_the_numbers_of_one(tiny_runs: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = EmojiClassifier("conv", ("Noto", "Blob"), ("Cats", "Dogs"), width=8, input_size=16).eval()
    path = tmp_path / "classifier.safetensors"
    save_classifier(classifier, path, style_accuracy=1.0, object_accuracy=1.0, seed=3)

    def configs(name: str) -> tuple[SampleConfig, EvaluateConfig]:
        model = {"model_config_path": str(tiny_runs.model_config), "devices": "cpu"}
        evaluation = EvaluateConfig(
            ckpt_path=str(tiny_runs.checkpoint("other")),
            base_ckpt_path=str(tiny_runs.checkpoint()),
            template="style",
            template_name="Noto",
            styles=("Noto", "Blob"),
            objects=("Cats", "Dogs"),
            seeds=(188,),
            sample_steps=2,
            batch_size=1,
            fid_reference="base_other_seeds",
            fid_reference_seeds=(5,),
            fid_features="classifier",
            classifier_path=str(path),
            output_dir=str(tmp_path / name / "evaluations"),
            **model,
        )
        return SampleConfig(**sample_keys(tiny_runs, tmp_path / name)), evaluation

    alone = rank_work.sample_and_evaluate(configs("one"))
    together = on_ranks(rank_work.sample_and_evaluate, configs("two"), "cpu,cpu")
    assert alone["images"] == [(6, 12)]
    assert together["images"] == [(4, 6), (2, 6)]
    assert together["classifiers"] == [1, 0]
    assert together["same"], "the processes were given different results"
    assert files(tmp_path / "two" / "run") == files(tmp_path / "one" / "run")

    runs = [next(tmp_path.glob(f"{name}/evaluations/Noto-*")) for name in ("one", "two")]
    for result, run in zip((alone, together), runs, strict=True):
        assert result["evaluated"]["report"] == str(run / "report.html")
    numbers = [
        {key: value for key, value in result["evaluated"].items() if isinstance(value, dict | int)}
        for result in (alone, together)
    ]
    for found in numbers:
        del found["peak_memory_bytes"]
    assert numbers[0] == numbers[1]
    assert "FID" in str(numbers[0])
    written, expected = (files(run) for run in reversed(runs))
    for name in ("metrics.csv", "predictions_before.csv", "predictions_after.csv"):
        assert written[name] == expected[name]
    grids = [files(tmp_path / name / "evaluations" / "grids") for name in ("one", "two")]
    assert len(grids[0]) == 12 + 2
    assert grids[0] == grids[1]


def started_by_torchrun(argv: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    return [([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *argv], {})]


def started_by_slurm(argv: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """As `srun --ntasks 2` on one node would."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    step = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NAME": "unlearn",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NODELIST": "elsewhere,127.0.0.1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),  # else of the job's number, which may be taken here
    }
    return [
        (
            [sys.executable, "-m", *argv],
            {**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"},
        )
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("start", [started_by_torchrun, started_by_slurm])
def test_processes_that_others_started_sample_the_images_of_one(
    tiny_runs: Any, tmp_path: Path, start: Any
) -> None:
    """And of what they print, each thing comes once: settings, an error of all, a mistake."""
    assert sample.main(flags(sample_keys(tiny_runs, tmp_path / "one"))) == 0

    def run(**changes: Any) -> tuple[set[bool], str, str]:
        keys = sample_keys(tiny_runs, tmp_path / "two", **changes)
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command, environ in start([f"{SCRIPTS}.sample", *flags(keys), "--log_level", "debug"])
        ]
        said = [process.communicate(timeout=300) for process in processes]
        codes = {process.returncode == 0 for process in processes}
        return codes, "".join(out for out, _ in said), "".join(error for _, error in said)

    codes, printed, said = run()
    assert codes == {True}, said
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert (tmp_path / "two" / "run" / "log-1.txt").exists()
    assert printed.count("defaults < config file < flags") == 1
    assert printed.count("Drew 6 images in") == 1

    for changes, error in (
        ({"eta": 1.0}, "sampled with other settings"),
        ({"sample_steps": 0}, "sample_steps: must"),
    ):
        codes, printed, said = run(**changes)
        assert codes == {False}
        assert len(re.findall(error, said)) == 1, said
        assert "mu/cli.py" not in said, "a traceback that is not torchrun's own"
    assert files(tmp_path / "two") == files(tmp_path / "one")
