"""Every data set goes from a config to batches, and the ready-made configs of I2P to an unlearned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import (
    MaskConfig,
    TrainConfig,
    saliency_unlearning_generate_mask_i2p,
    saliency_unlearning_train_i2p,
)
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.masking import load_mask_metadata
from mu.config import load_config
from mu.datasets.index import DataError
from mu.ldm import LatentDiffusion, load_model
from mu.unlearning.find_checkpoint import checkpoint_file
from tests.datasets.drawing import draw, draw_i2p, write_table


@pytest.fixture(scope="module")
def model(tiny_runs: Any) -> LatentDiffusion:
    return load_model(tiny_runs.model_config, tiny_runs.checkpoint())


def keys(tiny_runs: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    """Keys of a run that reads `folder`/raw and writes below `folder`."""
    return {
        "ckpt_path": str(tiny_runs.checkpoint()),
        "model_config_path": str(tiny_runs.model_config),
        "devices": "cpu",
        "raw_dataset_dir": str(folder / "raw"),
        "processed_dataset_dir": str(folder / "processed"),
        "image_size": None,
        "sample_steps": 2,
        **changes,
    }


def lines(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").splitlines()


def test_the_ready_made_configs_of_i2p_run(tiny_runs: Any, tmp_path: Path) -> None:
    draw_i2p(tmp_path / "raw", seeds=2)
    shared = keys(tiny_runs, tmp_path)
    made = MaskingAlgorithm(
        saliency_unlearning_generate_mask_i2p, **shared, output_dir=str(tmp_path / "masks")
    ).run()
    assert made["images"] == 2
    assert made["run"].name.startswith("i2p-self-harm-")
    assert load_mask_metadata(made["masks"][0.5])["template_name"] == "self-harm"

    result = SaliencyUnlearningAlgorithm(
        saliency_unlearning_train_i2p,
        **shared,
        mask_path=str(tmp_path / "masks"),
        epochs=1,
        lr=1e-3,
        sample_prompts=(),
        output_dir=str(tmp_path / "models"),
    ).run()
    assert result["mask"] == made["masks"][0.5]
    assert result["steps"] == 1
    assert 0 < result["weights_changed"] <= result["weights_selected"]
    index = tmp_path / "processed/index/i2p/i2p-self-harm"
    assert lines(index / "forget", "prompts.txt") == ["a knife, on a table", "a dark room"]
    assert [Path(line).name for line in lines(index / "retain", "images.txt")] == ["0.jpg", "1.jpg"]


def test_images_of_a_folder_are_forgotten_beside_sampled_ones(
    tiny_runs: Any, model: LatentDiffusion, tmp_path: Path
) -> None:
    draw(tmp_path / "raw/a.jpg", 1)
    draw(tmp_path / "raw/b.jpg", 2)
    config = TrainConfig(
        **keys(tiny_runs, tmp_path, dataset_type="folder", retain_set="generated", template_name="dog"),
        forget_prompts=["my dog"],
        retain_prompts=["a cat, asleep", "a bird"],
        substitute="a cat",
        retain_images_per_prompt=1,
        masking="none",
        epochs=1,
        batch_size=2,
    )
    handler = SaliencyUnlearnDataHandler(config, model)
    (batch,) = list(handler.train_batches)
    assert torch.equal(batch.forget[3][0], model.embed(["my dog"])[0])
    assert torch.equal(batch.forget[4][1], model.embed(["a cat"])[0])
    retained = {row.prompt: row.image for row in handler.rows.retain}
    assert set(retained) == {"a cat, asleep", "a bird"}
    times = {path: path.stat().st_mtime_ns for path in retained.values()}
    assert all(str(tmp_path / "processed/generated_prompts") in str(path) for path in times)
    list(SaliencyUnlearnDataHandler(config, model).train_batches)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # kept
    assert len(lines(tmp_path / "processed/index/folder/style-dog/retain", "prompts.txt")) == 2


def test_promise_30_a_run_says_once_what_of_its_data_is_not_read_or_cut(
    tiny_runs: Any, tmp_path: Path
) -> None:
    long = " ".join(["street"] * 80)
    for number in range(2):
        draw(tmp_path / f"raw/{number}.bmp", number)
        draw(tmp_path / f"other/{number}.gif", 5 + number)
    (tmp_path / "raw/film.mp4").write_bytes(b"x")
    shared = keys(tiny_runs, tmp_path, dataset_type="folder", template_name="dog", substitute="a cat")
    shared |= {
        "retain_dataset_dir": str(tmp_path / "other"),
        "forget_prompts": [f"my dog {long}"],
        "retain_prompts": ["a cat, asleep"],
    }
    mask = MaskConfig(**shared, output_dir=str(tmp_path / "masks"))
    training = TrainConfig(
        **shared, masking="none", epochs=1, sample_prompts=(), output_dir=str(tmp_path / "models")
    )
    for algorithm, count in (
        (MaskingAlgorithm(mask), 2),
        (SaliencyUnlearningAlgorithm(training), 3),
    ):
        said = (
            f"files of {tmp_path / 'raw'} that are not where images are read",
            f"1 of {count} prompts are longer than the 77 tokens that a text encoder reads, and are cut; the first is "
            f"'my dog {long[:53]}...' with 84 tokens",
        )
        assert [sum(part in warning for warning in algorithm.plan().warnings) for part in said] == [1, 1]
        log = (algorithm.run()["run"] / "log.txt").read_text()
        assert [log.count(part) for part in said] == [1, 1]


def test_promise_30_prompts_that_are_the_same_to_the_model_are_refused_before_it_is_loaded(
    tiny_runs: Any, model: LatentDiffusion, tmp_path: Path
) -> None:
    long = " ".join(["street"] * 80)
    draw(tmp_path / "raw/1.png", 1)
    draw(tmp_path / "other/1.png", 2)
    config = MaskConfig(
        **keys(tiny_runs, tmp_path, dataset_type="folder", template_name="dog", substitute="a cat"),
        retain_dataset_dir=str(tmp_path / "other"),
        forget_prompts=[f"{long} with my dog"],
        retain_prompts=[f"{long} with a cat"],
        output_dir=str(tmp_path / "masks"),
    )
    (problem,) = MaskingAlgorithm(config).plan().problems
    assert "1 prompts cannot be told apart" in str(problem)
    with pytest.raises(DataError, match="1 prompts cannot be told apart"):
        SaliencyUnlearnDataHandler(config, model)


def test_prompts_alone_are_enough(tiny_runs: Any, model: LatentDiffusion, tmp_path: Path) -> None:
    config = MaskConfig(
        **keys(tiny_runs, tmp_path, dataset_type="generated", template_name="nudity", images_per_prompt=2),
        forget_prompts=["a photo of a nude person"],
        retain_prompts=["a photo of a person wearing clothes"],
    )
    handler = SaliencyUnlearnDataHandler(config, model)
    assert sum(len(batch[0]) for batch in handler.mask_batches()) == 2
    assert handler.rows.forget[0].substitute_prompt == "a photo of a person wearing clothes"
    assert len(list((tmp_path / "processed/generated_prompts").rglob("*.png"))) == 2
    assert not (tmp_path / "processed/generated").exists()


def test_generic_prompts_are_read(tiny_runs: Any, model: LatentDiffusion, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "a wasp", "categories": "insects"},
        {"prompt": "a rose", "categories": "flowers"},
    ]
    write_table(tmp_path / "raw/prompts/mine.csv", rows)
    draw(tmp_path / "raw/images/insects/1.jpg", 1)
    draw(tmp_path / "raw/images/flowers/1.jpg", 2)
    wanted = keys(tiny_runs, tmp_path, dataset_type="generic", template_name="insects", substitute="a lawn")
    handler = SaliencyUnlearnDataHandler(MaskConfig(**wanted), model)
    (batch,) = list(handler.mask_batches())
    assert torch.equal(batch[3][0], model.embed(["a wasp"])[0])
    assert [row.prompt for row in handler.rows.retain] == ["a rose"]


def test_a_sampled_prompt_is_not_one_that_a_folder_forgets(
    tiny_runs: Any, model: LatentDiffusion, tmp_path: Path
) -> None:
    draw_i2p(tmp_path / "raw")
    wanted = keys(tiny_runs, tmp_path, dataset_type="i2p", template="i2p", template_name="violence")
    config = MaskConfig(**wanted, retain_set="generated", retain_prompts=["A burning car", "a field"])
    with pytest.raises(DataError, match="'A burning car' is a prompt to forget and"):
        SaliencyUnlearnDataHandler(config, model)
    default = MaskConfig(**wanted, retain_set="generated")
    handler = SaliencyUnlearnDataHandler(default, model)
    assert {row.prompt for row in handler.rows.retain} == {"a photo of people in a park"}


def test_several_styles_are_forgotten_in_one_run_and_found_again(tiny_runs: Any, tmp_path: Path) -> None:
    names = {"template_name": ("Noto", "Blob"), "styles": ("Noto", "Blob", "Fluent"), "images_per_prompt": 1}
    made = MaskingAlgorithm(tiny_runs.mask_config(**names, output_dir=str(tmp_path / "masks"))).run()
    assert made["images"] == 4
    assert made["run"].name.startswith("style-Noto+Blob-")
    described = load_mask_metadata(made["masks"][0.5])
    assert (described["concept"], described["template_name"]) == ("Noto+Blob", ["Noto", "Blob"])

    order = {**names, "template_name": ("Blob", "Noto")}  # together, in whatever order
    config = tiny_runs.train_config(
        **order, mask_path=str(tmp_path / "masks"), epochs=1, output_dir=str(tmp_path / "models")
    )
    result = SaliencyUnlearningAlgorithm(config).run()
    assert result["mask"] == made["masks"][0.5]
    assert load_config(TrainConfig, config_path=result["run"] / "config.yaml") == config
    models = str(tmp_path / "models")
    assert checkpoint_file(models, template="style", template_name=("Noto", "Blob")) == result["checkpoint"]
    assert not checkpoint_file(models, template="style", template_name="Noto").exists()
