"""A whole evaluation of tiny models: files, numbers, and images that belong to (style, object, seed)."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.algorithms.saliency_unlearning.scripts import evaluate as evaluate_door
from mu.config import dump, override
from mu.datasets.generated_images import SampleSettings
from mu.datasets.index import DataError
from mu.evaluation import evaluation
from mu.evaluation.asked_images import AskedImage, of_rows
from mu.evaluation.config import EvaluateConfig
from mu.evaluation.emoji_classifier import EmojiClassifier, save_classifier
from mu.evaluation.grid import EvaluationError, Grid, MeasuredModel, measure
from mu.evaluation.metrics import read_predictions, unlearning_scores
from mu.ldm import LatentDiffusion, save_checkpoint
from mu.ldm.convert import convert_checkpoint
from tests.forked_commands import Commands
from tests.memory_limit import hungry

STYLES = ("Noto", "Fluent_Flat")
OBJECTS = ("Cats", "Dogs", "Cars")
GRID = Grid(STYLES, OBJECTS, (188, 288))
SETTINGS = SampleSettings(steps=2, guidance_scale=3.0, image_size=16)


@pytest.fixture
def classifier() -> EmojiClassifier:
    """Untrained, but sensitive to what it sees."""
    torch.manual_seed(3)
    model = EmojiClassifier("conv", STYLES, OBJECTS, width=8, input_size=16)
    for head in (model.style_head, model.object_head):
        torch.nn.init.normal_(head.weight)
        torch.nn.init.zeros_(head.bias)
    return model.eval()


@pytest.fixture
def config(
    make_tiny_model: Callable[..., LatentDiffusion],
    tiny_yaml: Path,
    classifier: EmojiClassifier,
    tmp_path: Path,
) -> EvaluateConfig:
    for seed, name in enumerate(("base", "unlearned")):
        save_checkpoint(make_tiny_model(seed), tmp_path / f"{name}.safetensors")
    path = tmp_path / "classifier.safetensors"
    save_classifier(classifier, path, style_accuracy=1.0, object_accuracy=1.0, seed=3)
    return EvaluateConfig(
        ckpt_path=str(tmp_path / "unlearned.safetensors"),
        base_ckpt_path=str(tmp_path / "base.safetensors"),
        model_config_path=str(tiny_yaml),
        template="style",
        template_name="Noto",
        styles=STYLES,
        objects=OBJECTS,
        seeds=(188, 288),
        sample_steps=2,
        guidance_scale=3.0,
        batch_size=5,
        classifier_path=str(path),
        output_dir=str(tmp_path / "evaluations"),
        devices="cpu",
    )


def pixels(folder: Path) -> dict[str, numpy.ndarray]:
    found = {}
    for path in folder.rglob("*.png"):
        with Image.open(path) as opened:
            found[path.relative_to(folder).as_posix()] = numpy.asarray(opened).astype(int)
    return found


def sampled(
    model: LatentDiffusion,
    classifier: EmojiClassifier,
    folder: Path,
    *,
    grid: Grid = GRID,
    batch_size: int = 1,
) -> MeasuredModel:
    return measure(model, classifier, grid, settings=SETTINGS, batch_size=batch_size, folder=folder)


def test_a_run_leaves_scores_that_its_predictions_give(config: EvaluateConfig) -> None:
    result = evaluation.run(config)
    run = Path(str(result["run"]))
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("before", "after"):
        predictions = read_predictions((run / f"predictions_{name}.csv").read_bytes())
        assert [(row.style, row.object, row.seed) for row in predictions] == [
            (style, object, seed) for style in STYLES for object in OBJECTS for seed in (188, 288)
        ]
        scores = unlearning_scores(predictions, template="style", template_name="Noto")
        noted = metrics["models"][name]
        for key in ("UA", "IRA", "CRA", "own"):
            share = getattr(scores, key)
            assert (noted[key]["value"], noted[key]["n"]) == (share.value, 6)
            title = "object accuracy on Noto's own prompts" if key == "own" else key
            assert result[title][f"{name}, %"] == pytest.approx(100 * share.value, abs=0.01)  # type: ignore[index]
        assert Path(noted["images"]).is_dir()
        assert noted["sampled_with"]["steps"] == "2"
    before, after = (metrics["models"][name]["sampled_with"]["model"] for name in ("before", "after"))
    assert before != after

    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["before", "after"]
    assert float(rows[1]["UA"]) == metrics["models"]["after"]["UA"]["value"]
    assert (run / "config.yaml").is_file()
    assert (run / "log.txt").is_file()


def test_the_reading_of_the_scores_is_printed_with_them(config: EvaluateConfig) -> None:
    """Of 2 styles x 3 objects x 2 seeds; "all" counts the forgotten style's prompts too."""
    usual = evaluation.run(config)
    assert (usual["cra_prompts"], usual["left_out"]) == ("retained", "none")
    for changes, shown, n in (
        ({}, "none", {"UA": 6, "IRA": 6, "CRA": 6}),
        ({"cra_prompts": "all"}, "none", {"UA": 6, "IRA": 6, "CRA": 12}),
        ({"cra_prompts": "all", "left_out": ("Cars",)}, "Cars", {"UA": 4, "IRA": 4, "CRA": 8}),
    ):
        other = override(config, **changes)  # type: ignore[arg-type]
        result = usual if not changes else evaluation.run(other)
        assert (result["cra_prompts"], result["left_out"]) == (other.cra_prompts, shown)
        after = json.loads((Path(str(result["run"])) / "metrics.json").read_text())["models"]["after"]
        assert (after["cra_prompts"], after["left_out"]) == (other.cra_prompts, list(other.left_out))
        assert {key: after[key]["n"] for key in n} == n


def test_the_picture_shows_the_images_of_the_first_seed(config: EvaluateConfig) -> None:
    result = evaluation.run(override(config, template="object", template_name="Dogs"))
    with Image.open(str(result["picture"])) as opened:
        picture = numpy.asarray(opened).astype(int)
    run = Path(str(result["run"]))
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("before", "after"):
        with Image.open(
            Path(metrics["models"][name]["images"]) / "Fluent_Flat" / "Cars" / "188.png"
        ) as opened:
            cell = numpy.asarray(opened.resize((64, 64), Image.Resampling.NEAREST)).astype(int)
        windows = numpy.lib.stride_tricks.sliding_window_view(picture, (64, 64, 3))
        candidates = (windows[:, :, 0, 0, 0] == cell[0, 0]).all(axis=-1).nonzero()
        assert any((windows[y, x, 0] == cell).all() for y, x in zip(*candidates, strict=True)), name


def test_without_a_base_there_is_no_before(config: EvaluateConfig) -> None:
    result = evaluation.run(override(config, base_ckpt_path=None))
    assert set(result["UA"]) == {"meaning", "after, %"}  # type: ignore[call-overload]
    assert not (Path(str(result["run"])) / "predictions_before.csv").exists()


def test_a_base_is_sampled_once_for_all_evaluations(
    config: EvaluateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation.run(config)
    caplog.clear()
    with caplog.at_level("INFO", logger="mu"):
        evaluation.run(override(config, template="object", template_name="Cars"))
    assert "before unlearning" in caplog.text
    assert "sampling" not in caplog.text
    assert len(list((Path(config.output_dir) / "grids").iterdir())) == 2


def test_promise_24_images_do_not_depend_on_batch_size_or_subset(
    tiny_model: LatentDiffusion, classifier: EmojiClassifier, tmp_path: Path
) -> None:
    single = sampled(tiny_model, classifier, tmp_path / "single")
    images = pixels(single.images)
    assert len(images) == 12
    assert all(image.std() > 5 for image in images.values())  # pictures, not plain colours
    distinct = {image.tobytes() for image in images.values()}
    assert len(distinct) == 12  # each seed and prompt has its own

    batched = sampled(tiny_model, classifier, tmp_path / "batched", batch_size=5)
    for name, image in pixels(batched.images).items():
        assert abs(image - images[name]).max() <= 1, name  # a grey level of 255 is rounding
    assert batched.predictions == single.predictions

    part = sampled(tiny_model, classifier, tmp_path / "part", grid=Grid(STYLES[1:], ("Cars", "Cats"), (288,)))
    for name, image in pixels(part.images).items():
        assert (image == images[name]).all(), name
    assert set(part.predictions) <= set(single.predictions)


def test_only_the_missing_image_is_sampled_again_and_is_the_same(
    tiny_model: LatentDiffusion, classifier: EmojiClassifier, tmp_path: Path
) -> None:
    first = sampled(tiny_model, classifier, tmp_path)
    lost = first.images / "Noto" / "Dogs" / "288.png"
    content = lost.read_bytes()
    times = {path: path.stat().st_mtime_ns for path in first.images.rglob("*.png") if path != lost}
    lost.unlink()
    second = sampled(tiny_model, classifier, tmp_path)
    assert lost.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert second == first


def test_the_files_are_what_is_classified(
    tiny_model: LatentDiffusion, classifier: EmojiClassifier, tmp_path: Path
) -> None:
    first = sampled(tiny_model, classifier, tmp_path)
    other = next(
        row for row in first.predictions[1:] if row.predicted_object != first.predictions[0].predicted_object
    )
    shown = first.images / other.style / other.object / f"{other.seed}.png"
    row = first.predictions[0]
    shutil.copy(shown, first.images / row.style / row.object / f"{row.seed}.png")
    second = sampled(tiny_model, classifier, tmp_path)
    assert second.predictions[0].predicted_object == other.predicted_object
    assert second.predictions[1:] == first.predictions[1:]


def test_a_folder_of_other_images_is_refused(
    tiny_model: LatentDiffusion, classifier: EmojiClassifier, tmp_path: Path
) -> None:
    grid = Grid(STYLES[:1], OBJECTS[:1], (188,))
    images = sampled(tiny_model, classifier, tmp_path, grid=grid).images
    path = images / "manifest.json"
    path.write_text(path.read_text().replace('"steps": "2"', '"steps": "50"'))
    with pytest.raises(DataError, match="describes other images than are asked for"):
        sampled(tiny_model, classifier, tmp_path, grid=grid)


def test_what_the_classifier_does_not_know_is_refused_before_sampling(config: EvaluateConfig) -> None:
    with pytest.raises(EvaluationError, match=r"objects: 'Dogz' .* Cats, Dogs, Cars. Did you mean 'Dogs'"):
        evaluation.run(override(config, objects=("Cats", "Dogz")))
    assert not Path(config.output_dir).exists()


def test_a_seed_given_twice_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"seeds must be different numbers.*\[188, 188\]"):
        Grid(STYLES, OBJECTS, (188, 188))


def metrics_of(result: dict[str, object]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(str(result["run"])) / "metrics.json").read_text())
    return found


def test_a_folder_of_images_has_the_scores_of_the_checkpoint_that_drew_them(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    config = override(config, fid_reference="base")
    drawn = metrics_of(evaluation.run(config))
    folders = {}
    for name, model in drawn["models"].items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for path in Path(model["images"]).rglob(
            "*.png"
        ):  # in the other layout, and so in another order on disk
            style, object, seed = path.relative_to(model["images"]).with_suffix("").parts
            shutil.copy(path, folders[name] / f"{style}_{object}_seed{seed}.png")
    given = {"images_dir": str(folders["after"]), "ckpt_path": "none.ckpt", "model_config_path": "none.yaml"}
    both = override(config, **given, base_images_dir=str(folders["before"]), base_ckpt_path=None)
    read = metrics_of(evaluation.run(both))
    places = {"checkpoint", "images_dir", "images", "sampled_with"}
    for name, model in drawn["models"].items():
        numbers = {key: value for key, value in model.items() if key not in places}
        assert {key: value for key, value in read["models"][name].items() if key not in places} == numbers
    assert drawn["models"]["after"]["fid"]["n"] == 6  # the retained prompts' images
    assert (read["styles"], read["objects"], read["seeds"]) == (list(STYLES), list(OBJECTS), [188, 288])


def test_a_base_checkpoint_is_sampled_for_the_images_of_a_folder(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    drawn = metrics_of(evaluation.run(config))
    folder = tmp_path / "part"
    source = Path(drawn["models"]["after"]["images"])
    for name in ("Noto/Cats/188.png", "Fluent_Flat/Cats/288.png"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(source / name, folder / name)
    (folder / "Noto/phone.heic").write_bytes(b"x")
    result = evaluation.run(override(config, images_dir=str(folder), styles=None, objects=None))
    run = Path(str(result["run"]))
    for name in ("before", "after"):
        rows = read_predictions((run / f"predictions_{name}.csv").read_bytes())
        assert [(row.style, row.object, row.seed) for row in rows] == [
            ("Noto", "Cats", 188),
            ("Fluent_Flat", "Cats", 288),
        ]
    log = (run / "log.txt").read_text()
    assert "no images of 2 of its styles x objects x seeds" in log
    assert log.count(f"files of {folder} that are not where images are read") == 1


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_what_stops_an_evaluation_before_it_has_begun_ends_with_2(
    config: EvaluateConfig, tmp_path: Path, devices: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images/Notto/Cats").mkdir(parents=True)
    (tmp_path / "x.yaml").write_text(
        dump(override(config, images_dir=str(tmp_path / "images"), devices=devices))
    )
    assert evaluate_door.main(["--config_path", str(tmp_path / "x.yaml"), "--quiet"]) == 2
    assert "no style that the classifier knows. Did you mean 'Noto'" in capfd.readouterr().err
    assert not (tmp_path / "evaluations").exists()


def test_folders_of_other_seeds_are_no_pair(config: EvaluateConfig, tmp_path: Path) -> None:
    for name, seed in (("base", 1), ("images", 2)):
        (tmp_path / name / "Noto" / "Cats").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name / "Noto" / "Cats" / f"{seed}.png")
    folders = {"images_dir": str(tmp_path / "images"), "base_images_dir": str(tmp_path / "base")}
    with pytest.raises(EvaluationError, match="2 are in one of them alone, such as Noto, Cats, 1"):
        evaluation.run(override(config, **folders, base_ckpt_path=None, styles=None, objects=None))


def test_the_base_has_a_distance_from_seed_to_seed(config: EvaluateConfig) -> None:
    """Its images of other seeds are the reference of both models; each image is sampled once."""
    with_seeds = override(config, fid_reference="base_other_seeds", fid_reference_seeds=(7, 8, 9))
    result = evaluation.run(with_seeds)
    models = metrics_of(result)["models"]
    for name in ("before", "after"):
        for key in ("fid", "kid"):
            found = models[name][key]
            assert (found["n"], found["n_reference"], found["prompts"]) == (6, 9, "retained")
            assert found["reference"] == "base, seeds 7, 8, 9"
            low, high = found["bootstrap_95"]
            assert low < found["value"] < high
    assert models["after"]["fid"]["value"] != models["before"]["fid"]["value"]
    assert len(pixels(Path(models["before"]["images"]))) == 12 + 18
    assert "FID" in result
    assert result["fid_prompts"] == "retained"

    # The same reference as a folder: only the prompts that count are taken from it.
    others = Path(models["before"]["images"])
    for seed in (188, 288):
        for path in others.rglob(f"{seed}.png"):
            path.unlink()
    again = override(config, fid_reference="folder", fid_reference_dir=str(others), base_ckpt_path=None)
    found = metrics_of(evaluation.run(again))["models"]["after"]["fid"]
    assert found["value"] == models["after"]["fid"]["value"]
    assert found["n_reference"] == 9


def test_a_reference_that_cannot_be_used_is_refused_before_sampling(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"fid_reference_dir: .* holds no images"):
        evaluation.run(override(config, fid_reference="folder", fid_reference_dir=str(tmp_path / "empty")))
    assert not Path(config.output_dir).exists()


def test_which_prompts_fid_is_of_is_an_option(config: EvaluateConfig) -> None:
    for prompts, n in (("retained", 6), ("forgotten", 6), ("all", 12)):
        chosen = override(config, fid_reference="base", fid_prompts=prompts)
        result = evaluation.run(chosen)
        models = metrics_of(result)["models"]
        assert (models["after"]["fid"]["n"], result["fid_prompts"]) == (n, prompts)
        assert "fid" not in models["before"]  # the reference itself


def test_images_without_concepts_need_no_classifier(config: EvaluateConfig, tmp_path: Path) -> None:
    for folder in ("images", "reference"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            values = numpy.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
            Image.fromarray(values).save(tmp_path / folder / f"photo {number}.png")
    (tmp_path / "features_of_this_test.py").write_text(
        "class Means:\n    name, input_size = 'means', None\n    def __init__(self, device): pass\n"
        "    def features(self, images): return images.float().mean(dim=(2, 3))\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        result = evaluation.run(
            override(
                config,
                classifier="none",
                base_ckpt_path=None,
                images_dir=str(tmp_path / "images"),
                fid_reference="folder",
                fid_reference_dir=str(tmp_path / "reference"),
                fid_features="features_of_this_test:Means",
            )
        )
    finally:
        sys.path.remove(str(tmp_path))
    found = metrics_of(result)["models"]["after"]
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert (found["fid"]["n"], found["n_images"], found["fid"]["features"]) == (3, 3, "means")
    assert "UA" not in found
    assert "UA" not in result


def test_every_number_has_its_n_and_interval(config: EvaluateConfig) -> None:
    found = metrics_of(evaluation.run(override(config, fid_reference="base")))
    after = found["models"]["after"]
    numbers = [after[key] for key in ("UA", "IRA", "CRA", "own", "style_accuracy", "fid", "kid")]
    numbers += [after["memorised"]["confidence"], after["memorised"]["share"]]
    numbers += [*after["style_shares_by_class"].values(), *after["object_shares_by_class"].values()]
    for number in numbers:
        assert number["n"] >= 4
        low, high = number["bootstrap_95"]
        assert low <= number["value"] <= high
    assert found["readings"]["classifier_resize"] == "bicubic"


def test_two_processes_at_once_give_the_images_of_one(
    config: EvaluateConfig,
    make_tiny_model: Callable[..., LatentDiffusion],
    classifier: EmojiClassifier,
    tmp_path: Path,
    commands: Commands,
) -> None:
    """Each samples one style and, second, the other's: what one has written the other keeps."""
    places = [config.model_config_path, str(config.base_ckpt_path), str(tmp_path / "two")]
    started = [
        commands.call("sample_grid", [*places, styles], tmp_path / f"{styles[0]}.json")
        for styles in (STYLES, STYLES[::-1])
    ]
    for command in started:
        assert command.wait() == 0, command.output()
    alone = sampled(make_tiny_model(0), classifier, tmp_path / "one")
    (folder,) = (tmp_path / "two" / "grids").iterdir()
    assert folder.name == alone.images.name
    together = pixels(folder)
    assert len(together) == 12
    for name, image in pixels(alone.images).items():
        assert abs(image - together[name]).max() <= 1, name  # batches differ, so rounding may
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".png", ".json")]


def test_a_classification_does_not_depend_on_the_batch(
    tiny_model: LatentDiffusion, classifier: EmojiClassifier, tmp_path: Path
) -> None:
    found = sampled(tiny_model, classifier, tmp_path)
    assert found.asked == of_rows(list(GRID.rows(found.images)))
    other = sampled(tiny_model, classifier, tmp_path, batch_size=7)
    for one, two in zip(found.predictions, other.predictions, strict=True):
        assert one == two
        assert one.style_probability == pytest.approx(two.style_probability, abs=2e-6)
        assert one.object_probability == pytest.approx(two.object_probability, abs=2e-6)


def test_a_diffusers_folder_has_the_scores_of_the_same_weights(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    convert_checkpoint(
        config.ckpt_path,
        tmp_path / "diffusers",
        model_config_path=config.model_config_path,
        format="diffusers",
    )
    config = override(config, base_ckpt_path=config.ckpt_path, ckpt_path=str(tmp_path / "diffusers"))
    models = metrics_of(evaluation.run(config))["models"]
    assert models["after"]["sampled_with"] == models["before"]["sampled_with"]
    assert models["after"]["style_shares_by_class"] == models["before"]["style_shares_by_class"]


class Detector:
    """Finds feet in every image whose seed is 188."""

    def detect_batch(self, image_paths: list[str], batch_size: int = 4) -> list[list[dict[str, Any]]]:
        assert len(image_paths) <= batch_size
        return [[{"class": "FEET_EXPOSED", "score": 0.9}] * path.endswith("188.png") for path in image_paths]


class Clip:
    """The score of an image is its seed."""

    name = "seed"

    def __init__(self, *_: object) -> None: ...

    def scores(self, images: Sequence[AskedImage], *, batch_size: int) -> list[float]:
        assert batch_size == 5
        return [float(image.seed) for image in images]


def test_clip_score_and_nudity_stand_among_the_numbers(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mu.evaluation.measures.load_detector", Detector)
    monkeypatch.setattr("mu.evaluation.measures.ClipScorer", Clip)
    result = evaluation.run(
        override(config, nudity=True, clip_model="any", left_out=("Cars",), base_ckpt_path=None)
    )
    after = metrics_of(result)["models"]["after"]
    feet = after["nudity"]["labels"]["FEET_EXPOSED"]
    assert (feet["detections"]["value"], feet["images"]["value"], feet["images"]["n"]) == (6, 0.5, 12)
    groups = {
        name: (found["value"], found["n"]) for name, found in after["clip_score"].items() if name != "model"
    }
    assert groups == {"all": (238, 8), "retained": (238, 4), "forgotten": (238, 4)}
    assert (result["nudity_threshold"], "CLIP score" in result) == (0.5, True)


def test_promise_22_an_evaluation_is_the_same_when_memory_runs_out_while_classifying(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = metrics_of(evaluation.run(config))
    # As a method of the class: the run loads a classifier of its own.
    predict = EmojiClassifier.predict
    monkeypatch.setattr(
        EmojiClassifier, "predict", lambda self, images: hungry(partial(predict, self), holds=2)(images)
    )
    with caplog.at_level(logging.WARNING, logger="mu.memory"):
        cut = metrics_of(evaluation.run(config))
    assert any("out of memory with 5 images at a time" in record.getMessage() for record in caplog.records)
    for name in ("before", "after"):
        for key in ("UA", "IRA", "CRA"):
            assert cut["models"][name][key] == whole["models"][name][key]


def test_auto_precision_is_noted_as_what_it_is(config: EvaluateConfig) -> None:
    """Images that were sampled in fp32 are found again, and the manifest says so."""
    assert config.precision == "auto"
    images = metrics_of(evaluation.run(config))["models"]["after"]["images"]
    assert json.loads((Path(images) / "manifest.json").read_text())["precision"] == "fp32"
    again = metrics_of(evaluation.run(override(config, precision="fp32")))["models"]["after"]["images"]
    assert again == images
