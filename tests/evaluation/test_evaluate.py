"""A whole evaluation of tiny models: files, numbers, and images that belong to (style, object, seed)."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from mu.algorithms.saliency_unlearning.configs import EvaluateConfig
from mu.datasets.generated import SampleSettings
from mu.datasets.index import DataError
from mu.evaluation import evaluate
from mu.evaluation.classifier import EmojiClassifier, save_classifier
from mu.evaluation.evaluate import EvaluationError, Grid, MeasuredModel, measure
from mu.evaluation.metrics import read_predictions, unlearning_scores
from mu.ldm import LatentDiffusion, save_checkpoint

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
    result = evaluate.run(config)
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
    usual = evaluate.run(config)
    assert (usual["cra_prompts"], usual["left_out"]) == ("retained", "none")
    for changes, shown, n in (
        ({}, "none", {"UA": 6, "IRA": 6, "CRA": 6}),
        ({"cra_prompts": "all"}, "none", {"UA": 6, "IRA": 6, "CRA": 12}),
        ({"cra_prompts": "all", "left_out": ("Cars",)}, "Cars", {"UA": 4, "IRA": 4, "CRA": 8}),
    ):
        other = replace(config, **changes)  # type: ignore[arg-type]
        result = usual if not changes else evaluate.run(other)
        assert (result["cra_prompts"], result["left_out"]) == (other.cra_prompts, shown)
        after = json.loads((Path(str(result["run"])) / "metrics.json").read_text())["models"]["after"]
        assert (after["cra_prompts"], after["left_out"]) == (other.cra_prompts, list(other.left_out))
        assert {key: after[key]["n"] for key in n} == n


def test_the_picture_shows_the_images_of_the_first_seed(config: EvaluateConfig) -> None:
    result = evaluate.run(replace(config, template="object", template_name="Dogs"))
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
    result = evaluate.run(replace(config, base_ckpt_path=None))
    assert set(result["UA"]) == {"meaning", "after, %"}  # type: ignore[call-overload]
    assert not (Path(str(result["run"])) / "predictions_before.csv").exists()


def test_a_base_is_sampled_once_for_all_evaluations(
    config: EvaluateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate.run(config)
    caplog.clear()
    with caplog.at_level("INFO", logger="mu"):
        evaluate.run(replace(config, template="object", template_name="Cars"))
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
        evaluate.run(replace(config, objects=("Cats", "Dogz")))
    assert not Path(config.output_dir).exists()


def test_a_seed_given_twice_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"seeds must be different numbers.*\[188, 188\]"):
        Grid(STYLES, OBJECTS, (188, 188))
