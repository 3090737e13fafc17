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
from mu.algorithms.saliency_unlearning.mask_file import load_mask
from mu.algorithms.saliency_unlearning.results_table import means_markdown, reading
from mu.algorithms.saliency_unlearning.variants import deciding, recipes, variants
from mu.algorithms.saliency_unlearning.workers import claimed
from mu.config import check_paths, dump
from mu.datasets import emoji_canvas
from mu.datasets.generated import GeneratedImages, SampleSettings
from mu.datasets.images import load_pixels
from mu.evaluation.classifier import EmojiClassifier, load_classifier, save_classifier
from mu.evaluation.evaluate import Grid, measure
from mu.evaluation.features import ClassifierFeatures
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
        devices=("cpu",),
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
            table.rows(name)


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
    base_images = GeneratedImages(
        load_model(tiny_runs.model_config, tiny_runs.checkpoint()),
        folder,
        SampleSettings(2, 3.0, 16),
        subfolder="grids",
    ).path
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
            fid = row[moment]["FID"]
            assert fid["value"] == pytest.approx(fid_by_hand(measured.images, base_images, row, classifier))
            assert fid["n"] == 4
            assert fid["n_reference"] == 10
        assert row["steps"] == 2
        assert row["weights_total"] > row["weights_changed"] > 0
    assert rows[0]["before"] != rows[0]["after"]
    assert len(list((folder / "grids").iterdir())) == 3  # of the base, once, and of each checkpoint


def fid_by_hand(images: Path, base: Path, row: dict[str, Any], classifier: EmojiClassifier) -> float:
    """Of the images of retained prompts, to the base's of the reference seeds, by torch's eigenvalues."""
    kept = {
        "style": [("Blob", "Cats"), ("Blob", "Dogs")],
        "object": [("Noto", "Cats"), ("Blob", "Cats")],
    }[row["template"]]
    moments = []
    for folder, seeds in ((images, (188, 288)), (base, (1188, 1288, 1588, 1688, 1888))):
        files = [folder / style / name / f"{seed}.png" for style, name in kept for seed in seeds]
        features = (
            ClassifierFeatures(classifier, "c")
            .features(torch.stack([load_pixels(f) for f in files]))
            .double()
        )
        moments.append((features.mean(0), features.T.cov()))
    (m, c), (n, d) = moments
    root = torch.linalg.eigvals(c @ d).sqrt().real.sum()
    return float((m - n).square().sum() + c.trace() + d.trace() - 2 * root)


def test_all_that_a_table_makes_lies_in_its_folder(finished: Any) -> None:
    config, result = finished
    folder = Path(config.output_dir)
    assert {path.name for path in folder.iterdir()} == {
        *("grids", "processed", "runs"),
        *("table.csv", "table.json", "table.md"),
    }
    for concept in ("style-Noto", "object-Dogs"):
        assert {path.name for path in (folder / "runs" / concept).iterdir()} == {
            *(".lock", "finetuned_models", "made.json", "masks")
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
        for key in ("template", "template_name", "method", "threshold"):
            assert line[key] == str(row[key])
        for key in (*SCORES, "FID"):
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
    mask, train = recipes(moved, "Noto")
    assert mask.sample_precision == "auto"
    assert "sample_precision" not in deciding(mask)
    assert {"threshold", "c_guidance", "template_name", "seed"} <= deciding(mask).keys()
    assert deciding(train)["alpha"] == 0.5  # also at its default
    assert not {"objective", "mask_pool", "logger"} & deciding(train).keys()
    assert deciding(train)["wandb"] == "off"  # the default has another name since
    recipe = Path(moved.style_mask).read_text().replace("sample_precision: auto", "sample_precision: bf16")
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


# ---- methods and thresholds


@pytest.fixture(scope="module")
def compared(
    finished: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BenchmarkConfig, dict[str, Any]]:
    """The finished table gone on with: every method for Noto, two thresholds, one of which is the recipe's."""
    config, _ = finished
    folder = tmp_path_factory.mktemp("compared") / "table"
    shutil.copytree(config.output_dir, folder, copy_function=os.link)
    (folder / "table.json").unlink()  # a link
    config = replace(
        config,
        concepts=("Noto",),
        methods=("salun", "random", "none", "ascent", "retain"),
        thresholds=(0.1, 0.5),
        table_name="controls",
        output_dir=str(folder),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "STYLES", STYLES)
        patch.setattr(benchmark, "OBJECTS", OBJECTS)
        benchmark.run(config)
    return config, json.loads((folder / "controls.json").read_text())


def test_each_method_has_its_rows(compared: Any, finished: Any) -> None:
    config, content = compared
    rows = content["rows"]
    assert [(row["method"], row["threshold"]) for row in rows] == [
        *(("salun", 0.1), ("salun", 0.5), ("random", 0.1), ("random", 0.5)),
        *(("none", None), ("ascent", None), ("retain", None)),
    ]
    assert rows[1] == table_of(finished[0])["rows"][0]  # the recipe as it is was there already
    assert len({json.dumps(row["after"]) + str(row["weights_changed"]) for row in rows}) == len(rows)
    assert [method["method"] for method in content["methods"]] == [row["method"] for row in rows]
    assert not Path(config.output_dir, "table.json").exists()


def test_a_random_mask_is_as_large_as_the_saliency_mask(compared: Any) -> None:
    rows = {(row["method"], row["threshold"]): row for row in compared[1]["rows"]}
    for threshold in (0.1, 0.5):
        chosen = rows["random", threshold]["weights_selected"]
        assert chosen == rows["salun", threshold]["weights_selected"]
        assert chosen == int(threshold * rows["none", None]["weights_selected"])


def test_only_missing_masks_are_made_in_one_pass(compared: Any) -> None:
    """0.5 was there; 0.1 is the only mask of the second pass, and none of the controls needs one."""
    config, content = compared
    masks = sorted(Path(config.output_dir, "runs", "style-Noto", "masks").rglob("*.safetensors"))
    assert [path.name for path in masks] == ["mask_0.5.safetensors", "mask_0.1.safetensors"]
    small, large = load_mask(masks[1]), load_mask(masks[0])
    assert all(bool((large[name] | ~small[name]).all()) for name in small)
    assert ["mask" in row["seconds"] for row in content["rows"]] == [True, True, *[False] * 5]


def test_several_missing_masks_share_a_pass(moved: BenchmarkConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Noted:
        def __init__(self, config: Any) -> None:
            asked.append(config.thresholds)
            raise Begun

    monkeypatch.setattr(benchmark, "MaskingAlgorithm", Noted)
    with pytest.raises(Begun):
        Benchmark(replace(moved, thresholds=(0.3, 0.5, 0.7))).rows("Noto")
    assert asked == [(0.3, 0.7)]


def test_the_controls_are_the_recipe_but_for_one_thing(compared: Any) -> None:
    config, _ = compared
    found = {(v.method, v.threshold): v.train for v in variants(config, "Noto")}
    recipe = found["salun", 0.5]
    differs = {
        which: {
            key
            for key in (
                "masking",
                "mask_pool",
                "mask_seed",
                "objective",
                "threshold",
                "epochs",
                "lr",
                "alpha",
            )
            if getattr(train, key) != getattr(recipe, key)
        }
        for which, train in found.items()
    }
    assert differs == {
        ("salun", 0.1): {"threshold"},
        ("salun", 0.5): set(),
        ("random", 0.1): {"threshold", "masking"},
        ("random", 0.5): {"masking"},
        ("none", None): {"masking"},
        ("ascent", None): {"masking", "objective"},
        ("retain", None): {"masking", "objective"},
    }
    (other,) = (v.train for v in variants(replace(config, methods=("random",), thresholds=None), "Blob"))
    assert other.mask_seed == recipe.mask_seed + 1  # each concept has a draw of its own


def test_a_random_mask_of_another_size_is_refused(moved: BenchmarkConfig, tmp_path: Path) -> None:
    recipe = Path(moved.style_train).read_text().replace("train_method: full", "train_method: xattn")
    (tmp_path / "narrow.yaml").write_text(recipe)
    narrow = replace(moved, style_train=str(tmp_path / "narrow.yaml"))
    assert check_paths(narrow) == []
    (problem,) = check_paths(replace(narrow, methods=("salun", "random")))
    assert problem.startswith("methods: of xattn, which moves, a random mask would select another number")


def test_thresholds_without_a_mask_are_refused(moved: BenchmarkConfig, tmp_path: Path) -> None:
    recipe = Path(moved.object_train).read_text().replace("masking: saliency", "masking: none")
    (tmp_path / "unmasked.yaml").write_text(recipe)
    unmasked = replace(moved, object_train=str(tmp_path / "unmasked.yaml"), thresholds=(0.1,))
    (problem,) = check_paths(unmasked)
    assert problem.startswith("thresholds: ")
    assert "has masking none" in problem


# ---- several processes


def test_a_concept_that_another_command_is_at_comes_last(
    moved: BenchmarkConfig, unlearned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when it is done there, it is only counted here."""
    order: list[str] = []
    other = contextlib.ExitStack()
    rows = Benchmark.rows

    def noted(self: Benchmark, name: str) -> Any:
        order.append(name)
        other.close()  # the other command lets go while this one is at the next concept
        return rows(self, name)

    monkeypatch.setattr(Benchmark, "rows", noted)
    assert other.enter_context(claimed(Path(moved.output_dir, "runs", "style-Noto"), wait=False))
    Benchmark(moved).run()
    assert order == ["Dogs", "Noto"]
    assert [row["template_name"] for row in table_of(moved)["rows"]] == ["Noto", "Dogs"]
    assert unlearned == []


@pytest.mark.slow
def test_workers_make_each_row_once_and_the_same(finished: Any, tmp_path: Path) -> None:
    """On the whole grid, as patches do not reach the processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "STYLES", emoji_canvas.STYLES)
        patch.setattr(benchmark, "OBJECTS", emoji_canvas.OBJECTS)
        config, _ = finished
        classifier = EmojiClassifier(
            "conv", emoji_canvas.STYLES, emoji_canvas.OBJECTS, width=8, input_size=16
        )
        path = tmp_path / "classifier.safetensors"
        save_classifier(classifier, path, style_accuracy=1.0, object_accuracy=1.0, seed=3)
        both = replace(
            config, seeds=(188,), classifier_path=str(path), workers=2, output_dir=str(tmp_path / "two")
        )
        benchmark.run(both)
        one = replace(both, workers=None, output_dir=str(tmp_path / "one"))
        benchmark.run(one)
    for row, alone in zip(table_of(both)["rows"], table_of(one)["rows"], strict=True):
        assert {**row, "checkpoint": "", "seconds": ""} == {**alone, "checkpoint": "", "seconds": ""}
        models = Path(both.output_dir, row["checkpoint"]).parent.parent
        assert len(list(models.iterdir())) == 1


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


def test_several_methods_have_a_table_each_below_their_means() -> None:
    rows = [
        *({**row, "method": "salun", "threshold": 0.5} for row in ROWS),
        {**ROWS[0], "method": "random", "threshold": 0.5},
        {**ROWS[2], "method": "ascent", "threshold": None},
    ]
    means, *tables = markdown(rows).split("\n### ")
    assert means == means_markdown(rows)
    assert means.splitlines()[2:] == [
        "| styles | salun 0.5 | 2 | 95.5 | 92.5 | 98.0 | 94.5 | 97.0 | 75.0 | 96.0 | 45 |",
        "| styles | random 0.5 | 1 | 100.0 | 90.0 | 99.0 | 94.0 | 98.0 | 80.0 | 97.0 | 30 |",
        "| objects | salun 0.5 | 1 | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
        "| objects | ascent | 1 | 50.0 | 99.0 | 100.0 | 97.1 | 98.0 | 12.5 | 99.0 | 90 |",
    ]
    assert [table.partition("\n\n")[0] for table in tables] == ["salun 0.5", "random 0.5", "ascent"]
    assert tables[0].partition("\n\n")[2].strip() == markdown(ROWS).strip()
