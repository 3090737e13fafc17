"""The keys of evaluation beside its grid: what goes together, and what must be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mu.config import ConfigError, check_paths, load_config
from mu.datasets.canvas import UNLEARN_CANVAS_OBJECTS, UNLEARN_CANVAS_STYLES
from mu.evaluation.config import EvaluateConfig


def mistake(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        EvaluateConfig(**values)  # type: ignore[arg-type]
    return "\n".join(caught.value.mistakes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"classifier": "resnet"}, "classifier: "),
        ({"classifier": "os.path"}, "classifier: "),
        ({"fid_features": "vgg"}, "fid_features: "),
        ({"fid_reference": "folder"}, "give a folder with fid_reference folder, and only then"),
        ({"fid_reference_dir": "x"}, "give a folder with fid_reference folder, and only then"),
        ({"fid_reference": "base"}, "base needs base_ckpt_path or base_images_dir"),
        (
            {"fid_reference": "base_other_seeds", "images_dir": "x", "base_images_dir": "y"},
            "needs base_ckpt_path",
        ),
        (
            {"fid_reference": "base_other_seeds", "base_ckpt_path": "b", "fid_reference_seeds": [188]},
            "both have 188; the reference's must be others",
        ),
        (
            {"classifier": "none", "fid_reference": "base", "base_ckpt_path": "b"},
            "with classifier none, take fid_features inception or your own",
        ),
        ({"base_images_dir": "x"}, "goes with images_dir"),
        ({"images_dir": "x", "base_images_dir": "x", "base_ckpt_path": "y"}, "give one of the two"),
        (
            {"images_dir": "x", "classifier": "none", "base_ckpt_path": "y"},
            "give base_images_dir, or --base_ckpt_path null",
        ),
        ({"classifier": "unlearn_canvas"}, "there is no style 'Noto'; the grid has: Abstractionism"),
        ({"nudity_labels": ["FEET"]}, "nudity_labels: "),
        ({"nudity_threshold": 0.1}, "nudity_threshold: "),
    ],
)
def test_keys_that_do_not_go_together_are_told(values: dict[str, object], expected: str) -> None:
    assert expected in mistake(**values)


def test_a_base_that_is_needed_is_not_to_be_left_out() -> None:
    values = {"images_dir": "x", "classifier": "none", "base_ckpt_path": "y", "fid_reference": "base"}
    assert mistake(**values, fid_features="inception").endswith("; give base_images_dir")


def test_the_grid_of_unlearn_canvas_is_its_classifiers() -> None:
    config = EvaluateConfig(classifier="unlearn_canvas", template_name="Van_Gogh", left_out=("Seed_Images",))
    assert config.all_names() == (UNLEARN_CANVAS_STYLES, UNLEARN_CANVAS_OBJECTS)


def test_a_class_of_the_users_own_may_know_any_names() -> None:
    assert EvaluateConfig(classifier="my.models:Net", template_name="Mine").template_name == "Mine"


def test_what_is_missing_on_disk_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = check_paths(
        EvaluateConfig(
            classifier="unlearn_canvas",
            template_name="Monet",
            images_dir="images",
            base_images_dir="base",
            fid_reference="folder",
            fid_reference_dir="photos",
            fid_features="inception",
            inception_path="inception.pth",
            ckpt_path="nowhere.ckpt",  # not used
        )
    )
    missing = {line.partition(":")[0].split(",")[0] for line in found}
    assert missing == {
        "style_classifier_path",
        "object_classifier_path",
        "images_dir",
        "base_images_dir",
        "fid_reference_dir",
        "inception_path",
    }
    assert any("download_model classifier" in line for line in found)


def test_an_extra_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mu.evaluation.quality_config.find_spec", lambda _: None)
    found = "\n".join(
        check_paths(
            EvaluateConfig(
                nudity=True, fid_reference="folder", fid_reference_dir=".", fid_features="inception"
            )
        )
    )
    assert "pip install nudenet" in found
    assert "pip install torch-fidelity" in found


def test_keys_that_are_gone_are_taken_at_their_defaults(tmp_path: Path) -> None:
    """A config.yaml of the first version goes on working; another value would mean something, and is refused."""
    old = tmp_path / "config.yaml"
    old.write_text("fid_resamples: 50\nkid_subset_size: 1000\nfid_prompts: all\n")
    assert load_config(EvaluateConfig, config_path=old).fid_prompts == "all"
    old.write_text("fid_resamples: 200\n")
    with pytest.raises(ConfigError, match="fid_resamples"):
        load_config(EvaluateConfig, config_path=old)
