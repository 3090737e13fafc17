"""The results table of two tiny concepts: what is made, what is kept, and how it is counted."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.algorithms.saliency_unlearning import benchmark
from mu.algorithms.saliency_unlearning.benchmark import SCORES, Benchmark, markdown, mean_of
from mu.algorithms.saliency_unlearning.configs import BenchmarkConfig
from mu.algorithms.saliency_unlearning.results_table import reading
from mu.config import dump
from mu.datasets.generated import SampleSettings
from mu.evaluation.classifier import EmojiClassifier, load_classifier, save_classifier
from mu.evaluation.evaluate import Grid, measure
from mu.evaluation.metrics import unlearning_scores
from mu.ldm import load_model

STYLES, OBJECTS = ("Noto", "Blob"), ("Cats", "Dogs")
GRID = Grid(STYLES, OBJECTS, (188, 288))


@pytest.fixture(scope="module")
def finished(tiny_runs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchmarkConfig, Any]:
    """A table of the style Noto and the object Dogs, and what its run returned."""
    folder = tmp_path_factory.mktemp("benchmark")
    torch.manual_seed(3)
    classifier = EmojiClassifier("conv", STYLES, OBJECTS, width=8, input_size=16)
    for head in (classifier.style_head, classifier.object_head):  # untrained, but sensitive to what it sees
        torch.nn.init.normal_(head.weight)
    save_classifier(
        classifier, folder / "classifier.safetensors", style_accuracy=1.0, object_accuracy=1.0, seed=3
    )
    for kind, name in (("style", "Blob"), ("object", "Cats")):  # the names are replaced by the table's
        recipe = {"template": kind, "template_name": name}
        mask = tiny_runs.mask_config(**recipe, output_dir="elsewhere")
        train = tiny_runs.train_config(**recipe, epochs=1, lr=1e-2, output_dir="elsewhere")
        (folder / f"mask_{kind}.yaml").write_text(dump(mask))
        (folder / f"train_{kind}.yaml").write_text(dump(train))
    config = BenchmarkConfig(
        concepts=("Noto", "Dogs"),
        **{
            f"{kind}_{stage}": str(folder / f"{stage}_{kind}.yaml")
            for kind in ("style", "object")
            for stage in ("mask", "train")
        },
        seeds=(188, 288),
        sample_steps=2,
        guidance_scale=3.0,
        classifier_path=str(folder / "classifier.safetensors"),
        devices="cpu",
        output_dir=str(folder / "table"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "STYLES", STYLES)
        patch.setattr(benchmark, "OBJECTS", OBJECTS)
        return config, benchmark.run(config)


@pytest.fixture(autouse=True)
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "STYLES", STYLES)
    monkeypatch.setattr(benchmark, "OBJECTS", OBJECTS)


class Begun(Exception):
    """A concept was going to be unlearned."""


@pytest.fixture
def unlearned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the concepts that a table begins to unlearn; it gets no further."""
    begun: list[str] = []

    class Refused:
        def __init__(self, config: Any) -> None:
            begun.append(config.template_name)
            raise Begun

    monkeypatch.setattr(benchmark, "MaskingAlgorithm", Refused)
    monkeypatch.setattr(benchmark, "SaliencyUnlearningAlgorithm", Refused)
    return begun


def try_each(config: BenchmarkConfig) -> None:
    """Make the row of each concept, as far as that goes without unlearning."""
    table = Benchmark(config)
    for name in config.concepts or ():
        with contextlib.suppress(Begun):
            table.row(name)


def table_of(config: BenchmarkConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(config.output_dir) / "table.json").read_text())
    return content


def test_the_rows_are_the_scores_before_and_after(finished: Any, tiny_runs: Any) -> None:
    """Counted here from the images of the checkpoints that the rows name."""
    config, _ = finished
    folder = Path(config.output_dir)
    rows = table_of(config)["rows"]
    assert [(row["template"], row["template_name"]) for row in rows] == [
        ("style", "Noto"),
        ("object", "Dogs"),
    ]
    classifier = load_classifier(config.classifier_path)
    for row in rows:
        checkpoints = {"before": tiny_runs.checkpoint(), "after": folder / row["checkpoint"]}
        for moment, checkpoint in checkpoints.items():
            measured = measure(
                load_model(tiny_runs.model_config, checkpoint),
                classifier,
                GRID,
                settings=SampleSettings(2, 3.0, 16),
                batch_size=8,
                folder=folder,
            )
            scores = unlearning_scores(
                measured.predictions, template=row["template"], template_name=row["template_name"]
            )
            for key in SCORES:
                assert row[moment][key]["value"] == getattr(scores, key).value
                assert row[moment][key]["n"] == 4
        assert row["steps"] == 2
        assert row["weights_total"] > row["weights_changed"] > 0
    assert rows[0]["before"] != rows[0]["after"]
    assert len(list((folder / "grids").iterdir())) == 3  # of the base, once, and of each checkpoint


def test_all_that_a_table_makes_lies_in_its_folder(finished: Any) -> None:
    config, result = finished
    folder = Path(config.output_dir)
    assert {path.name for path in folder.iterdir()} == {
        *("grids", "processed", "runs"),
        *("table.csv", "table.json", "table.md"),
    }
    for concept in ("style-Noto", "object-Dogs"):
        assert {path.name for path in (folder / "runs" / concept).iterdir()} == {
            *("finetuned_models", "made.json", "masks")
        }
    assert result["table"] == folder / "table.md"
    assert not Path("elsewhere").exists()


def test_the_three_tables_say_the_same(finished: Any) -> None:
    config, result = finished
    content = table_of(config)
    assert content["seeds"] == [188, 288]
    assert content["means_percent"] == {"style": result["styles"], "object": result["objects"]}
    with open(Path(config.output_dir) / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(content["rows"], lines, strict=True):
        assert (line["template"], line["template_name"]) == (row["template"], row["template_name"])
        for key in SCORES:
            assert float(line[key]) == row["after"][key]["value"]
            assert float(line[f"base_{key}"]) == row["before"][key]["value"]
    assert (Path(config.output_dir) / "table.md").read_text() == markdown(content["rows"])


# ---- going on


@pytest.fixture
def moved(finished: Any, tmp_path: Path) -> BenchmarkConfig:
    """The same table in another folder, which a test may change."""
    config, _ = finished
    shutil.copytree(config.output_dir, tmp_path / "table", copy_function=os.link)
    return replace(config, output_dir=str(tmp_path / "table"))


def test_what_is_made_is_kept(moved: BenchmarkConfig, unlearned: list[str]) -> None:
    """Also where the folder has been moved, and by a call for one concept."""
    rows = table_of(moved)["rows"]
    images = {path: path.stat().st_mtime_ns for path in Path(moved.output_dir, "grids").rglob("*.png")}
    Benchmark(replace(moved, concepts=("Dogs",))).run()
    assert table_of(moved)["rows"] == rows[1:]
    Benchmark(moved).run()
    assert table_of(moved)["rows"] == rows
    assert unlearned == []
    assert images == {
        path: path.stat().st_mtime_ns for path in Path(moved.output_dir, "grids").rglob("*.png")
    }


def test_only_a_changed_recipe_unlearns_anew(
    moved: BenchmarkConfig, unlearned: list[str], tmp_path: Path
) -> None:
    for stage, line in (("train", "alpha: 0.75"), ("mask", "c_guidance: 3.0")):
        recipe = Path(getattr(moved, f"style_{stage}")).read_text()
        key = line.partition(":")[0]
        changed = [line if old.startswith(f"{key}:") else old for old in recipe.splitlines()]
        (tmp_path / "changed.yaml").write_text("\n".join(changed))
        try_each(replace(moved, **{f"style_{stage}": str(tmp_path / "changed.yaml")}))
        assert unlearned == ["Noto"], stage
        unlearned.clear()


def test_a_key_that_came_later_counts_where_it_is_set(
    moved: BenchmarkConfig, unlearned: list[str], tmp_path: Path
) -> None:
    """`sample_precision` is such a key: rows that were made before it was there have been made with its default."""
    table = Benchmark(moved)
    mask, train = table.recipes("Noto")
    assert mask.sample_precision == "fp32"
    assert "sample_precision" not in benchmark._deciding(mask)
    assert {"threshold", "c_guidance", "template_name", "seed"} <= benchmark._deciding(mask).keys()
    assert benchmark._deciding(train)["alpha"] == 0.5  # also at its default
    recipe = Path(moved.style_mask).read_text().replace("sample_precision: fp32", "sample_precision: bf16")
    (tmp_path / "half.yaml").write_text(recipe)
    try_each(replace(moved, style_mask=str(tmp_path / "half.yaml")))
    assert unlearned == ["Noto"]


def test_another_reading_counts_again_and_unlearns_nothing(
    moved: BenchmarkConfig, unlearned: list[str]
) -> None:
    result = Benchmark(replace(moved, cra_prompts="all")).run()
    assert unlearned == []
    assert (result["cra_prompts"], result["left_out"]) == ("all", "none")
    content = table_of(moved)
    assert (content["cra_prompts"], content["left_out"]) == ("all", [])
    assert [row["after"]["CRA"]["n"] for row in content["rows"]] == [8, 8]
    last = (Path(moved.output_dir) / "table.md").read_text().splitlines()[-1]
    assert last == "CRA is counted on all prompts, those of the forgotten concept too."


def test_other_weights_unlearn_anew(
    moved: BenchmarkConfig, unlearned: list[str], tiny_runs: Any, tmp_path: Path
) -> None:
    recipe = Path(moved.object_train).read_text()
    other = recipe.replace(str(tiny_runs.checkpoint()), str(tiny_runs.checkpoint("other")))
    assert other != recipe
    (tmp_path / "other.yaml").write_text(other)
    try_each(replace(moved, object_train=str(tmp_path / "other.yaml")))
    assert unlearned == ["Dogs"]


def test_a_lost_checkpoint_or_resume_false_unlearns_anew(
    moved: BenchmarkConfig, unlearned: list[str]
) -> None:
    Path(moved.output_dir, table_of(moved)["rows"][1]["checkpoint"]).unlink()
    try_each(moved)
    assert unlearned == ["Dogs"]
    unlearned.clear()
    try_each(replace(moved, resume=False))
    assert unlearned == ["Noto", "Dogs"]


# ---- counting


def row(template: str, name: str, seconds: float, **percents: tuple[float, float]) -> dict[str, Any]:
    """A row whose scores are (before, after) in percent."""
    return {
        "template": template,
        "template_name": name,
        "before": {key: {"value": before / 100} for key, (before, _) in percents.items()},
        "after": {key: {"value": after / 100} for key, (_, after) in percents.items()},
        "seconds": {"mask": seconds, "train": 2 * seconds},
    }


ROWS = [
    row("style", "Noto", 10.0, UA=(1, 100), IRA=(99, 90), CRA=(98, 94), own=(97, 80)),
    row("style", "High_Contrast", 20.0, UA=(2, 91), IRA=(97, 95), CRA=(96, 95), own=(95, 70)),
    row("object", "Cats", 30.0, UA=(0, 50), IRA=(100, 99), CRA=(98, 97.06), own=(99, 12.5)),
]


def test_means_are_of_the_rows_of_their_kind() -> None:
    assert mean_of(ROWS, "style") == {
        "UA": 95.5,
        "IRA": 92.5,
        "CRA": 94.5,
        "own": 75.0,
        "base_UA": 1.5,
        "base_IRA": 98.0,
        "base_CRA": 97.0,
        "base_own": 96.0,
        "seconds": 45.0,
    }
    assert mean_of(ROWS, "object")["CRA"] == 97.06
    assert mean_of(ROWS[:2], "object") == {}


def test_the_usual_reading_is_not_mentioned() -> None:
    assert reading("retained", ()) == ""
    assert reading("retained", ["Blob"]) == "\nNot counted: Blob.\n"


def test_the_markdown_table_is_the_hand_written_one() -> None:
    assert markdown(ROWS).splitlines() == [
        "| kind | forgotten | UA | IRA | base | CRA | base | own | base | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| style | Noto | 100.0 | 90.0 | 99.0 | 94.0 | 98.0 | 80.0 | 97.0 | 30 |",
        "| style | High Contrast | 91.0 | 95.0 | 97.0 | 95.0 | 96.0 | 70.0 | 95.0 | 60 |",
        "| **styles** | **mean** | 95.5 | 92.5 | 98.0 | 94.5 | 97.0 | 75.0 | 96.0 | 45 |",
        "| object | Cats | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
        "| **objects** | **mean** | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
    ]
