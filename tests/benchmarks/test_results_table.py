"""The results table of two tiny concepts: what is made, what is kept, and how it is counted."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import results_table
from benchmarks.methods import METHODS, Method, Stage
from benchmarks.results_table import ResultsTable
from benchmarks.table_config import TableConfig
from benchmarks.table_rows import deciding, planned_rows
from benchmarks.table_text import SCORES, markdown
from benchmarks.unlearned import claimed
from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import load_mask
from mu.config import ConfigError, check_paths, dump, override
from mu.datasets import emoji_canvas
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.images import load_pixels
from mu.evaluation.emoji_classifier import EmojiClassifier, load_classifier, save_classifier
from mu.evaluation.features import ClassifierFeatures
from mu.evaluation.grid import Grid, measure
from mu.evaluation.metrics import unlearning_scores
from mu.ldm import load_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STYLES, OBJECTS = ("Noto", "Blob"), ("Cats", "Dogs")
GRID = Grid(STYLES, OBJECTS, (188, 288))


@pytest.fixture(scope="module")
def finished(tiny_runs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TableConfig, Any]:
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
        for stage, recipe_of in (("mask", mask), ("train", train)):
            path = folder / "recipes" / "emoji_canvas" / f"{stage}_{kind}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dump(recipe_of))
    config = TableConfig(
        concepts=("Noto", "Dogs"),
        recipes=str(folder / "recipes"),
        seeds=(188, 288),
        sample_steps=2,
        guidance_scale=3.0,
        classifier_path=str(folder / "classifier.safetensors"),
        devices="cpu",
        output_dir=str(folder / "table"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_table, "STYLES", STYLES)
        patch.setattr(results_table, "OBJECTS", OBJECTS)
        return config, results_table.run(config)


@pytest.fixture(autouse=True)
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_table, "STYLES", STYLES)
    monkeypatch.setattr(results_table, "OBJECTS", OBJECTS)


class Begun(Exception):
    """A concept was going to be unlearned."""


@pytest.fixture
def unlearned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the concepts that a table begins to unlearn; it gets no further."""
    begun: list[str] = []

    def refused(_: Stage, config: Any) -> Any:
        begun.append(config.template_name)
        raise Begun

    monkeypatch.setattr(Stage, "run", refused)
    return begun


def with_recipe(config: TableConfig, folder: Path, stage: str, kind: str, **lines: str) -> TableConfig:
    """The same table, with some keys of one recipe changed."""
    name = f"emoji_canvas/{stage}_{kind}.yaml"
    shutil.copytree(str(config.recipes), folder, dirs_exist_ok=True)
    recipe = (folder / name).read_text().splitlines()
    changed = [
        f"{key}: {lines[key]}" if (key := line.partition(":")[0]) in lines else line for line in recipe
    ]
    assert changed != recipe
    (folder / name).write_text("\n".join(changed))
    return override(config, recipes=str(folder))


def try_each(config: TableConfig) -> None:
    """Make the row of each concept, as far as that goes without unlearning."""
    table = ResultsTable(config)
    for name in config.concepts or ():
        with suppress(Begun):
            table.rows(name)


def table_of(config: TableConfig) -> dict[str, Any]:
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
        *("table.json", "table.md"),
    }
    for concept in ("style-Noto", "object-Dogs"):
        made = folder / "runs" / concept
        assert {path.name for path in made.iterdir()} == {".lock", "masks", "salun-0.5"}
        assert {path.name for path in (made / "salun-0.5").iterdir()} == {"made.json", "runs"}
    assert result["table"] == folder / "table.md"
    assert not Path("elsewhere").exists()


def test_both_tables_say_the_same(finished: Any) -> None:
    config, result = finished
    content = table_of(config)
    assert content["seeds"] == [188, 288]
    assert content["means_percent"] == {"style": result["styles"], "object": result["objects"]}
    assert (Path(config.output_dir) / "table.md").read_text() == markdown(content["rows"])


# ---- going on


@pytest.fixture
def moved(finished: Any, tmp_path: Path) -> TableConfig:
    """The same table in another folder, which a test may change."""
    config, _ = finished
    shutil.copytree(config.output_dir, tmp_path / "table", copy_function=os.link)
    return override(config, output_dir=str(tmp_path / "table"))


def test_what_is_made_is_kept(moved: TableConfig, unlearned: list[str]) -> None:
    """Also where the folder has been moved, and by a call for one concept."""
    rows = table_of(moved)["rows"]
    images = {path: path.stat().st_mtime_ns for path in Path(moved.output_dir, "grids").rglob("*.png")}
    ResultsTable(override(moved, concepts=("Dogs",))).run()
    assert table_of(moved)["rows"] == rows[1:]
    ResultsTable(moved).run()
    assert table_of(moved)["rows"] == rows
    assert unlearned == []
    assert images == {
        path: path.stat().st_mtime_ns for path in Path(moved.output_dir, "grids").rglob("*.png")
    }


def test_only_a_changed_recipe_unlearns_anew(
    moved: TableConfig, unlearned: list[str], tmp_path: Path
) -> None:
    for stage, changed in (("train", {"alpha": "0.75"}), ("mask", {"c_guidance": "3.0"})):
        try_each(with_recipe(moved, tmp_path / stage, stage, "style", **changed))
        assert unlearned == ["Noto"], stage
        unlearned.clear()


def test_a_key_at_its_default_does_not_count(
    moved: TableConfig, unlearned: list[str], tmp_path: Path
) -> None:
    """So rows stay when a key is added: they have been made with its default."""
    (row,) = planned_rows(moved, "Noto")
    assert row.mask is not None
    assert not {"sample_precision", "output_dir"} & deciding(row.mask).keys()
    assert deciding(row.train)["lr"] == 1e-2
    try_each(with_recipe(moved, tmp_path / "half", "mask", "style", sample_precision="bf16"))
    assert unlearned == ["Noto"]


def test_another_reading_counts_again_and_unlearns_nothing(moved: TableConfig, unlearned: list[str]) -> None:
    result = ResultsTable(override(moved, cra_prompts="all")).run()
    assert unlearned == []
    assert (result["cra_prompts"], result["left_out"]) == ("all", "none")
    content = table_of(moved)
    assert (content["cra_prompts"], content["left_out"]) == ("all", [])
    assert [row["after"]["CRA"]["n"] for row in content["rows"]] == [8, 8]
    last = (Path(moved.output_dir) / "table.md").read_text().splitlines()[-1]
    assert last == "CRA is counted on all prompts, those of the forgotten concept too."


def test_other_weights_unlearn_anew(
    moved: TableConfig, unlearned: list[str], tiny_runs: Any, tmp_path: Path
) -> None:
    other = str(tiny_runs.checkpoint("other"))
    try_each(with_recipe(moved, tmp_path / "other", "train", "object", ckpt_path=other))
    assert unlearned == ["Dogs"]


def test_a_lost_checkpoint_or_resume_false_unlearns_anew(moved: TableConfig, unlearned: list[str]) -> None:
    Path(moved.output_dir, table_of(moved)["rows"][1]["checkpoint"]).unlink()
    try_each(moved)
    assert unlearned == ["Dogs"]
    unlearned.clear()
    try_each(override(moved, resume=False))
    assert unlearned == ["Noto", "Dogs"]


# ---- methods and thresholds


@pytest.fixture(scope="module")
def compared(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TableConfig, dict[str, Any]]:
    """The finished table gone on with: every method for Noto, two thresholds, one of which is the recipe's."""
    config, _ = finished
    folder = tmp_path_factory.mktemp("compared") / "table"
    shutil.copytree(config.output_dir, folder, copy_function=os.link)
    (folder / "table.json").unlink()  # a link
    config = override(
        config,
        concepts=("Noto",),
        methods=("salun", "random", "none", "ascent", "retain"),
        thresholds=(0.1, 0.5),
        table_name="controls",
        output_dir=str(folder),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_table, "STYLES", STYLES)
        patch.setattr(results_table, "OBJECTS", OBJECTS)
        results_table.run(config)
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


def test_several_missing_masks_share_a_pass(moved: TableConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(_: Stage, config: Any) -> Any:
        asked.append(config.thresholds)
        raise Begun

    monkeypatch.setattr(Stage, "run", noted)
    with pytest.raises(Begun):
        ResultsTable(override(moved, thresholds=(0.3, 0.5, 0.7))).rows("Noto")
    assert asked == [(0.3, 0.7)]


def test_the_controls_are_the_recipe_but_for_one_thing(compared: Any) -> None:
    config, _ = compared
    found = {(row.name, row.threshold): row.train for row in planned_rows(config, "Noto")}
    recipe = found["salun", 0.5]
    differs = {
        which: {
            key
            for key in (
                "masking",
                "random_fraction",
                "seed",
                "objective",
                "threshold",
                "epochs",
                "lr",
                "alpha",
            )
            if getattr(train, key) != getattr(recipe, key)
            and (key != "threshold" or train.masking == "saliency")  # it chooses a mask
        }
        for which, train in found.items()
    }
    assert differs == {
        ("salun", 0.1): {"threshold"},
        ("salun", 0.5): set(),
        ("random", 0.1): {"masking", "random_fraction"},
        ("random", 0.5): {"masking"},
        ("none", None): {"masking"},
        ("ascent", None): {"masking", "objective"},
        ("retain", None): {"masking", "objective"},
    }
    (other,) = planned_rows(override(config, methods=("random",), thresholds=None), "Blob")
    assert other.train.seed == recipe.seed + 1  # each concept has a draw of its own


def test_a_random_mask_of_another_size_is_refused(moved: TableConfig, tmp_path: Path) -> None:
    narrow = with_recipe(moved, tmp_path / "narrow", "train", "style", train_method="xattn")
    assert check_paths(narrow) == []
    (problem,) = check_paths(override(narrow, methods=("salun", "random")))
    assert problem.startswith("methods: of xattn, which moves, a random mask would select another number")


def test_thresholds_without_a_mask_are_refused(moved: TableConfig, tmp_path: Path) -> None:
    unmasked = with_recipe(moved, tmp_path / "unmasked", "train", "object", masking="none")
    (problem,) = check_paths(override(unmasked, thresholds=(0.1,)))
    assert problem.startswith("thresholds: ")
    assert "has masking none" in problem


def test_recipes_are_checked_before_the_table_starts(moved: TableConfig, tmp_path: Path) -> None:
    wrong = with_recipe(moved, tmp_path / "wrong", "train", "style", alpha="-1", lr="-1")
    problems = check_paths(wrong)
    assert len(problems) == 2
    for key, limit in (("alpha", ">= 0"), ("lr", "> 0")):
        path = tmp_path / "wrong" / "emoji_canvas" / "train_style.yaml"
        assert any(f"{path}: {key}: must be {limit}" in problem for problem in problems)
    (problem,) = check_paths(override(moved, recipes=str(tmp_path / "absent")))
    assert problem.startswith("recipes: there is no folder")
    # A folder without a recipe leaves the packaged one.
    (row,) = planned_rows(override(moved, recipes=str(tmp_path)), "Noto")
    assert row.train.train_method == "xattn"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"concepts": ["Nto"]}, "Did you mean 'Noto'?"),
        ({"left_out": ["Blob"]}, "'Blob' is forgotten and must be counted"),
        ({"methods": ["saln"]}, "Did you mean 'salun'?"),
        ({"fid_reference_seeds": [188]}, "both have 188"),
    ],
)
def test_mistakes_in_the_keys_are_told(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TableConfig(**values)
    assert expected in "\n".join(caught.value.mistakes)


# ---- another method


class Halved:
    """A method without mask, steps or pictures: every weight of the UNet times 0.9."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        model = load_model(self.config.model_config_path, self.config.checkpoint())
        with torch.no_grad():
            for parameter in model.unet.parameters():
                parameter.mul_(0.9)
        path = Path(self.config.output_dir) / "one" / "model.safetensors"
        path.parent.mkdir(parents=True)
        save_checkpoint(model, path)
        return {"checkpoint": path, "run": path.parent}


def test_a_method_is_one_entry(moved: TableConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("a_method")
    configs, algorithm = ModuleType("a_method.configs"), ModuleType("a_method.algorithm")
    configs.OwnConfig = TrainConfig  # type: ignore[attr-defined]
    algorithm.Halved = Halved  # type: ignore[attr-defined]
    for module in (package, configs, algorithm):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    stage = Stage("a_method", "OwnConfig", "Halved", "emoji_canvas/train_{kind}.yaml")
    entry = Method(stage, changes={"masking": "none"})
    monkeypatch.setattr("benchmarks.table_rows.METHODS", {**METHODS, "halved": entry})
    config = override(moved, concepts=("Noto",), table_name="two")
    object.__setattr__(config, "methods", ("salun", "halved"))  # its choices were made before the entry
    rows = ResultsTable(config).rows("Noto")
    assert [(row["method"], row["threshold"]) for row in rows] == [("salun", 0.5), ("halved", None)]
    assert rows[1]["recipe"] == "emoji_canvas/train_style.yaml"
    assert set(rows[1]["seconds"]) == {"train"}
    assert rows[1]["before"] == rows[0]["before"]
    assert "steps" not in rows[1]
    assert rows[1]["after"]["FID"] != rows[0]["after"]["FID"]
    again = ResultsTable(config).rows("Noto")
    assert again == rows


# ---- several processes


def test_a_concept_that_another_command_is_at_comes_last(
    moved: TableConfig, unlearned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when it is done there, it is only counted here."""
    order: list[str] = []
    other = ExitStack()
    rows = ResultsTable.rows

    def noted(self: ResultsTable, name: str) -> Any:
        order.append(name)
        other.close()  # the other command lets go while this one is at the next concept
        return rows(self, name)

    monkeypatch.setattr(ResultsTable, "rows", noted)
    assert other.enter_context(claimed(Path(moved.output_dir, "runs", "style-Noto"), wait=False))
    ResultsTable(moved).run()
    assert order == ["Dogs", "Noto"]
    assert [row["template_name"] for row in table_of(moved)["rows"]] == ["Noto", "Dogs"]
    assert unlearned == []


def test_a_claim_goes_with_its_process(tmp_path: Path) -> None:
    """Also when that is killed: no claim stays behind."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, begun))
    other.start()
    assert begun.wait(30)
    with claimed(tmp_path, wait=False) as mine:
        assert not mine
    other.kill()
    other.join()
    with claimed(tmp_path, wait=False) as mine:
        assert mine


def _hold(folder: Path, begun: Any) -> None:
    with claimed(folder, wait=True):
        begun.set()
        multiprocessing.Event().wait(60)


@pytest.mark.slow
def test_two_commands_at_once_make_each_row_once_and_the_same(finished: Any, tmp_path: Path) -> None:
    """On the whole grid, as patches do not reach the processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_table, "STYLES", emoji_canvas.STYLES)
        patch.setattr(results_table, "OBJECTS", emoji_canvas.OBJECTS)
        config, _ = finished
        classifier = EmojiClassifier(
            "conv", emoji_canvas.STYLES, emoji_canvas.OBJECTS, width=8, input_size=16
        )
        path = tmp_path / "classifier.safetensors"
        save_classifier(classifier, path, style_accuracy=1.0, object_accuracy=1.0, seed=3)
        one = override(config, seeds=(188,), classifier_path=str(path), output_dir=str(tmp_path / "one"))
        results_table.run(one)
        both = override(one, output_dir=str(tmp_path / "two"))
        # Concepts share images to train on; in which batch one is sampled, and so its last bits, is a matter of turns.
        shutil.copytree(tmp_path / "one" / "processed", tmp_path / "two" / "processed")
        (tmp_path / "table.yaml").write_text(dump(both), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.table", "--config_path", str(tmp_path / "table.yaml")]
        with ExitStack() as stack:
            commands = [stack.enter_context(subprocess.Popen(command, cwd=ROOT)) for _ in range(2)]
        assert [command.returncode for command in commands] == [0, 0]
    for row, alone in zip(table_of(both)["rows"], table_of(one)["rows"], strict=True):
        assert {**row, "checkpoint": "", "seconds": ""} == {**alone, "checkpoint": "", "seconds": ""}
        models = Path(both.output_dir, row["checkpoint"]).parent.parent
        assert len(list(models.iterdir())) == 1
