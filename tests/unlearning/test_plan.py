"""What a plan says, and when it stops a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mu.config import ConfigError
from mu.datasets.index import DataError
from mu.unlearning.plan import Plan, PlannedFiles, disk_problems, size


def planned(
    folder: Path, count: int, *, what: str = "x", key: str = "output_dir", **more: Any
) -> PlannedFiles:
    return PlannedFiles(what=what, folder=folder, key=key, bytes=count, **more)


def a_plan(**changes: Any) -> Plan:
    wanted: dict[str, Any] = {
        "stage": "training",
        "device": "cuda:0",
        "processes": 2,
        "checkpoint": "CompVis checkpoint",
        "images": {"forget": 60, "retain": 1200, "to_sample": 7},
        "steps": 1500,
        "weights": {"total": 859_520_964, "train_method": 4000, "selected": 2000},
        "files": [planned(Path("out"), 3_440_000_000, what="model.safetensors")],
        "inputs": {"mask_path": Path("mask_0.5.safetensors")},
        **changes,
    }
    return Plan(**wanted)


def test_a_plan_is_a_short_text() -> None:
    text = str(a_plan(warnings=["memory: x"]))
    for line in (
        "# plan: training on cuda:0, 2 processes",
        "mask_path   mask_0.5.safetensors",
        "images      60 to forget, 1,200 to retain; of them to be sampled first: 7",
        "steps       1,500",
        "weights     total 859,520,964, train method 4,000, selected 2,000",
        "  model.safetensors  about 3.4 GB in out",
        "warning: memory: x",
        "this plan can be carried out",
    ):
        assert line in text.splitlines()


def test_a_run_without_images_and_steps_says_nothing_of_them() -> None:
    text = str(a_plan(images={}, steps=0, inputs={}))
    assert [line for line in text.splitlines() if line.startswith(("images", "steps", "mask"))] == []


def test_images_that_a_run_does_not_read_are_not_counted() -> None:
    text = str(a_plan(images={"forget": 30, "retain": 0, "to_sample": 0}))
    assert "images      30 to forget" in text.splitlines()


def test_problems_stop_a_run_together_or_one_by_itself() -> None:
    plan = a_plan()
    assert plan.require() is plan
    alone = DataError("no images")
    with pytest.raises(DataError, match=r"^no images$"):
        a_plan(problems=[alone]).require()
    with pytest.raises(ConfigError) as raised:
        a_plan(problems=[alone, ConfigError(["lr: x", "threshold: y"])]).require()
    assert raised.value.mistakes == ("no images", "lr: x", "threshold: y")
    text = str(a_plan(problems=[alone]))
    assert text.endswith("problem: no images\nthis plan cannot be carried out")


def test_what_is_examined_later_is_added_where_the_plan_is_sound() -> None:
    found, stops = DataError("of another"), ConfigError(["lr: x"])
    plan = a_plan(examine=lambda: [found])
    assert plan.can_run
    assert "this plan can be carried out" in str(plan)
    assert plan.examined().later_problems == [found]
    assert plan.examined().examined() == plan.examined()
    assert str(plan.examined()).endswith("problem: of another\nthis plan cannot be carried out")
    assert a_plan(problems=[stops], examine=lambda: [found]).examined().later_problems == ()


def test_the_exit_code_is_that_of_the_run() -> None:
    later = a_plan(examine=lambda: [DataError("met while encoding")]).examined()
    assert [a_plan().exit_code, later.exit_code] == [0, DataError.exit_code] == [0, 1]
    for problems in ([DataError("no images")], [ConfigError(["lr: x"])], [DataError("x"), DataError("y")]):
        plan = a_plan(problems=problems)
        with pytest.raises((DataError, ConfigError)) as raised:
            plan.require()
        assert plan.exit_code == raised.value.exit_code == 2


def test_folders_on_one_disk_share_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    one, other = planned(tmp_path / "a", 60), planned(tmp_path / "b" / "c", 60, key="processed_dataset_dir")
    assert disk_problems([one]) == ([], [])
    problems, _ = disk_problems([one, other])
    assert problems[0].startswith("output_dir, processed_dataset_dir: this run writes 120 B; 100 B are free")
    perhaps = planned(tmp_path, 60, what="checkpoints", key="keep_checkpoints", certain=False)
    problems, warnings = disk_problems([one, perhaps])
    assert problems == []
    assert warnings[0].startswith(
        "output_dir, keep_checkpoints: with checkpoints, 120 B may be needed; 100 B"
    )


@pytest.mark.parametrize(
    ("more", "stops"),
    [({}, True), ({"certain": False}, False)],
)
def test_only_what_is_written_for_certain_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], stops: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    files = [planned(tmp_path, 60), planned(tmp_path, 60, what="latents", **more)]
    problems, warnings = disk_problems(files)
    assert (len(problems), len(warnings)) == ((1, 0) if stops else (0, 1))
    if not stops:
        assert warnings[0].startswith("output_dir: with latents, 120 B may be needed; 100 B are free there")


def test_sizes_are_readable() -> None:
    assert [size(count) for count in (12, 1_500, 2_500_000, 5.16e9)] == ["12 B", "1.5 kB", "2.5 MB", "5.2 GB"]
