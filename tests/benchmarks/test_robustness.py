"""The scoreboard of robustness of tiny models: who is attacked, what is kept, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import robustness, robustness_table
from benchmarks.robustness_config import RobustnessConfig
from benchmarks.robustness_text import markdown
from benchmarks.table_rows import planned_rows
from mu.config import ConfigError, dump, keys_of, load_config, override, require_paths
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.emoji_classifier import EmojiClassifier, save_classifier
from mu.ldm import LatentDiffusion, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STYLES, OBJECTS = ("Noto", "Blob"), ("Cats", "Dogs")


@pytest.fixture
def config(
    tiny_runs: Any, make_tiny_model: Callable[..., LatentDiffusion], tmp_path: Path
) -> RobustnessConfig:
    """One style, forgotten without a mask, attacked in two ways, beside an oracle."""
    folder = tmp_path
    torch.manual_seed(3)
    classifier = EmojiClassifier("conv", STYLES, OBJECTS, width=8, input_size=16)
    for head in (classifier.style_head, classifier.object_head):
        torch.nn.init.normal_(head.weight)
    path = folder / "classifier.safetensors"
    save_classifier(classifier, path, style_accuracy=1.0, object_accuracy=1.0, seed=3)
    (folder / "emoji_canvas").mkdir()
    for kind, name in (("style", "Blob"), ("object", "Cats")):  # the names are replaced by the table's
        train = tiny_runs.train_config(
            template=kind,
            template_name=name,
            masking="none",
            mask_path=None,
            epochs=1,
            output_dir="elsewhere",
        )
        (folder / "emoji_canvas" / f"train_{kind}.yaml").write_text(dump(train))
        attack = AttackConfig(
            ckpt_path=str(tiny_runs.checkpoint()),
            base_ckpt_path=str(tiny_runs.checkpoint()),
            model_config_path=str(tiny_runs.model_config),
            template=kind,
            template_name=name,
            styles=STYLES,
            objects=OBJECTS,
            seeds=(188, 288),
            target_seeds=(901,),
            sample_steps=2,
            classifier_path=str(path),
            inversion_vectors=1,
            inversion_steps=2,
            inversion_batch_size=2,
            relearn_steps=(1,),
            relearn_images=2,
            relearn_batch_size=2,
        )
        (folder / f"attack_{kind}.yaml").write_text(dump(attack))
    (folder / "oracles").mkdir()
    save_checkpoint(make_tiny_model(7), folder / "oracles" / "Noto.safetensors")
    return RobustnessConfig(
        concepts=("Noto",),
        methods=("none",),
        recipes=str(folder),
        attacks=("inversion", "relearn"),
        attack_recipe=str(folder / "attack_{kind}.yaml"),
        oracles=str(folder / "oracles"),
        devices="cpu",
        output_dir=str(folder / "table"),
    )


def test_base_oracle_and_each_method_are_attacked_once(
    config: RobustnessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = robustness_table.run(config)
    table = json.loads((Path(config.output_dir) / "robustness.json").read_text())
    found = [(row["attack"], row["subject"], row["stage"]) for row in table["rows"]]
    assert len(found) == len(set(found)) == result["rows"]
    subjects = ("base", "oracle", "none")
    assert set(found) == {
        *(("inversion", subject, stage) for subject in subjects for stage in ("plain", "attacked")),
        *(
            ("relearn", subject, stage)
            for subject in (*subjects, "base, taught by another name")
            for stage in ("plain", "1 steps")
        ),
    }
    for row in table["rows"]:
        assert row["success"]["n"] == 4  # two objects, two seeds
        assert row["template_name"] == "Noto"

    text = (Path(config.output_dir) / "robustness.md").read_text()
    assert text == markdown(table["rows"])
    assert "### Style Noto" in text
    heading, _, *lines = text.splitlines()[2:]
    assert heading == "| | plain | inversion | relearn, 1 steps |"
    assert [line.split(" | ")[0] for line in lines] == [
        "| base",
        "| oracle",
        "| none",
        "| base, taught by another name",
    ]

    # Again: nothing is attacked, and the table is the same.
    monkeypatch.setattr(robustness_table.attack, "run", None)
    robustness_table.run(config)
    assert json.loads((Path(config.output_dir) / "robustness.json").read_text())["rows"] == table["rows"]


def test_a_wrong_recipe_is_told_before_anything_begins(config: RobustnessConfig, tmp_path: Path) -> None:
    (tmp_path / "attack_style.yaml").write_text("inversion_step: 3\n")
    (tmp_path / "attack_object.yaml").write_text("attack: relearn\n")
    wrong = override(config, attack_recipe=str(tmp_path / "attack_{kind}.yaml"))
    with pytest.raises(ConfigError, match=r"attack_style\.yaml: inversion_step: there is no such key"):
        require_paths(wrong)


def test_the_file_opens_with_its_command() -> None:
    path = ROOT / "benchmarks" / "emoji_canvas_robustness.yaml"
    assert (
        path.read_text().splitlines()[0]
        == f"# python -m benchmarks.robustness --config_path benchmarks/{path.name}"
    )
    config = load_config(RobustnessConfig, config_path=path)
    assert [row.name for row in planned_rows(config, "Noto")] == [
        *["salun"] * 3,
        "none",
        *["random"] * 3,
        "esd",
        "uce",
    ]


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert robustness.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n--{key.name}  " in told for key in keys_of(RobustnessConfig))
