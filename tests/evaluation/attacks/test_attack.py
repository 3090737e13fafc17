"""Whole attacks on tiny models: files, numbers, and what is done again by a second run: nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file

from mu.commands.report import main
from mu.config import ConfigError, override
from mu.evaluation.asked_images import AskedImage
from mu.evaluation.attacks import attack, inversion
from mu.evaluation.attacks.config import ATTACKS, AttackConfig
from mu.evaluation.attacks.results import success_of
from mu.evaluation.metrics import Prediction, read_predictions
from mu.ldm.text_encoder import token_ids
from tests.evaluation.attacks.conftest import OBJECTS, STYLES

STAGES = {
    "inversion": ["attacked"],
    "prompt": ["attacked"],
    "ring_a_bell": ["attacked"],
    "relearn": ["1 steps", "3 steps"],
    "noised": ["50% of the steps", "100% of the steps"],
}


def metrics_of(result: dict[str, object]) -> dict:
    return json.loads((Path(str(result["run"])) / "metrics.json").read_text())


def files_below(folder: Path, *names: str) -> dict[str, tuple[int, bytes]]:
    found = sorted(path for name in names for path in folder.glob(f"{name}/**/*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_what_its_images_say_and_is_not_made_twice(name: str, config: AttackConfig) -> None:
    config = override(config, attack=name)
    if name not in ("inversion", "relearn"):  # the base alone, which takes half the time
        config = override(config, ckpt_path=config.base_ckpt_path)
    result = attack.run(config)
    run = Path(str(result["run"]))
    metrics = metrics_of(result)
    models = {"inversion": ["before", "after"], "relearn": ["before_other_name", "before", "after"]}.get(
        name, ["after"]
    )
    assert list(metrics["models"]) == models
    folders = set()
    for model, numbers in metrics["models"].items():
        assert list(numbers["stages"]) == ["plain", *STAGES[name]]
        for stage, found in numbers["stages"].items():
            table = run / f"predictions_{model}_{stage}.csv".replace(" ", "_")
            seen = read_predictions(table.read_bytes())
            assert [(row.style, row.object, row.seed) for row in seen] == [
                ("Noto", object, seed) for object in OBJECTS for seed in (188, 288)
            ]
            right = [row.predicted_style == "Noto" for row in seen]
            both = [row.predicted_style == "Noto" and row.predicted_object == row.object for row in seen]
            assert (found["success"]["value"], found["success"]["n"]) == (sum(right) / 4, 4)
            assert found["both"]["value"] == sum(both) / 4
            assert len(found["by_prompt"]) == 2
            assert all(
                (Path(found["images"]) / f"Noto/{row.object}/{row.seed}.png").is_file() for row in seen
            )
            folders.add(found["images"])
            assert result["success"][f"{model}, {stage}, %"] == round(100 * sum(right) / 4, 2)  # type: ignore[index]
    # The base's plain images are those that it drew to learn from, with other seeds; all else has its own folder.
    assert len(folders) == sum(1 + len(STAGES[name]) for _ in models)
    with open(run / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(folders)
    with Image.open(run / "pictures" / "attack.png") as picture:
        assert picture.height > 64 * len(folders)

    output = Path(config.output_dir)
    kept = files_below(output, "grids", "learnt")
    again = metrics_of(attack.run(config))
    assert files_below(output, "grids", "learnt") == kept
    for model in models:
        for stage in STAGES[name]:
            first, second = (found["models"][model]["stages"][stage] for found in (metrics, again))
            assert {**first, "seconds_drawing": 0} == {**second, "seconds_drawing": 0}


def test_learning_that_was_stopped_comes_to_the_same_bits(
    config: AttackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, base_ckpt_path=config.ckpt_path)
    whole = metrics_of(attack.run(config))["models"]["after"]["stages"]["attacked"]
    wanted = load_file(whole["learnt"]["kept"])

    # Stopped after four of six steps, of which the third was the last to be kept.
    monkeypatch.setattr(inversion, "_KEEP_EVERY_STEPS", 3)
    taken = inversion.AdamState.step

    def step(state: inversion.AdamState, gradient: torch.Tensor) -> None:
        if state.steps == 4:
            raise KeyboardInterrupt
        taken(state, gradient)

    elsewhere = override(config, output_dir=f"{config.output_dir}-again")
    monkeypatch.setattr(inversion.AdamState, "step", step)
    with pytest.raises(KeyboardInterrupt):
        attack.run(elsewhere)
    (half,) = Path(elsewhere.output_dir).glob("learnt/*.safetensors")
    assert int(load_file(half)["steps"]) == 3
    more: list[int] = []

    def counted(state: inversion.AdamState, gradient: torch.Tensor) -> None:
        more.append(state.steps)
        taken(state, gradient)

    monkeypatch.setattr(inversion.AdamState, "step", counted)
    found = metrics_of(attack.run(elsewhere))["models"]["after"]["stages"]["attacked"]
    for name, tensor in load_file(found["learnt"]["kept"]).items():
        assert torch.equal(tensor, wanted[name]), name
    assert int(wanted["steps"]) == 6
    assert more == [3, 4, 5]


def test_other_settings_are_other_images_and_the_base_is_not_attacked_twice(config: AttackConfig) -> None:
    alone = override(config, base_ckpt_path=config.ckpt_path)
    first = metrics_of(attack.run(alone))["models"]
    assert list(first) == ["after"]
    for changed in ({"inversion_lr": 0.5}, {"attack_seed": 1}):
        other = metrics_of(attack.run(override(alone, **changed)))["models"]["after"]["stages"]
        assert other["attacked"]["images"] != first["after"]["stages"]["attacked"]["images"]
        assert other["plain"]["images"] == first["after"]["stages"]["plain"]["images"]


def test_a_text_that_was_found_is_typed_as_it_stands(config: AttackConfig) -> None:
    for changed in ({"attack": "prompt", "prompt_target": "original"}, {"attack": "ring_a_bell"}):
        made = override(config, **changed)
        for numbers in metrics_of(attack.run(made))["models"].values():
            learnt = numbers["stages"]["attacked"]["learnt"]
            written = Path(learnt["kept"]).with_suffix(".txt").read_text()
            texts = [learnt["text"]] if "text" in learnt else list(learnt["texts"].values())
            count = 2 if made.attack == "prompt" else 3
            for text in texts:
                assert text in written
                assert len(text.split()) == count
                assert len(token_ids([text])[0]) == count + 2
            if made.attack == "prompt":
                drawn = numbers["stages"]["attacked"]
                assert learnt["loss"] > 0
                assert drawn["n_images"] == 4


def test_images_of_ones_own_are_learnt_from(config: AttackConfig, tmp_path: Path) -> None:
    laid_out, loose = tmp_path / "laid_out", tmp_path / "loose"
    (laid_out / "Noto" / "Cats").mkdir(parents=True)
    loose.mkdir()
    for number in range(3):
        for path in (laid_out / "Noto/Cats" / f"{number}.png", loose / f"photo {number}.png"):
            Image.new("RGB", (16, 16), (80 * number, 20, 20)).save(path)
    for folder in (laid_out, loose):
        own = override(config, base_ckpt_path=None, target_images_dir=str(folder))
        metrics = metrics_of(attack.run(own))
        assert len(metrics["target_images"]) == 3
        assert list(metrics["models"]) == ["after"]


def test_success_is_counted_by_hand() -> None:
    seen = [("Noto", "Cats"), ("Noto", "Dogs"), ("Blob", "Dogs"), ("Noto", "Dogs")]
    asked = ["Cats", "Cats", "Dogs", "Dogs"]
    images = [AskedImage(Path("x.png"), f"a {object}", "Noto", object, i) for i, object in enumerate(asked)]
    predictions = [
        Prediction("Noto", object, i, *found)
        for i, (object, found) in enumerate(zip(asked, seen, strict=True))
    ]
    found = success_of(predictions, images, template="style", name="Noto")
    assert (found.success.value, found.both.value, found.success.n) == (0.75, 0.5, 4)
    # Wilson 1927: (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)
    assert found.success.wilson_95 == pytest.approx((0.300642, 0.954413), abs=1e-5)
    assert found.by_prompt["a Cats"][0].value == 1
    assert found.by_prompt["a Dogs"][1].value == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_seeds": (188,)}, "both have 188"),
        ({"classifier": "none"}, "none is not allowed"),
        ({"devices": "cpu,cpu"}, "one process"),
        ({"base_ckpt_path": None}, "give a folder of them, or base_ckpt_path"),
        ({"template_name": "Notto"}, "Did you mean"),
        ({"relearn_steps": (3, 2)}, "must rise"),
        ({"attack": "inverse"}, "inversion"),
    ],
)
def test_mistakes_are_told(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AttackConfig(**changes)


def test_an_object_is_attacked_in_its_styles(config: AttackConfig) -> None:
    config = override(config, template="object", template_name="Cats", base_ckpt_path=config.ckpt_path)
    stages = metrics_of(attack.run(config))["models"]["after"]["stages"]
    assert stages["attacked"]["n_images"] == 4
    assert list(stages["plain"]["by_prompt"]) == [
        f"A Cats image in {style.replace('_', ' ')} style." for style in STYLES
    ]


def test_deterministic_kernels_are_taken_where_they_are_asked_for(
    config: AttackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seen: list[bool] = []
    taken = inversion.AdamState.step

    def step(state: inversion.AdamState, gradient: torch.Tensor) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        taken(state, gradient)

    monkeypatch.setattr(inversion.AdamState, "step", step)
    attack.run(override(config, base_ckpt_path=config.ckpt_path, inversion_steps=1, deterministic=True))
    assert seen == [True]


def test_what_is_damaged_is_learnt_again(config: AttackConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = override(config, base_ckpt_path=config.ckpt_path)
    kept = Path(metrics_of(attack.run(config))["models"]["after"]["stages"]["attacked"]["learnt"]["kept"])
    whole = load(kept.read_bytes())
    kept.write_bytes(kept.read_bytes()[:300])
    attack.run(config)
    assert "is damaged" in caplog.text
    assert torch.equal(load_file(kept)["vectors"], whole["vectors"])


def test_the_report_tells_the_numbers_and_is_made_again(config: AttackConfig) -> None:
    result = attack.run(override(config, attack="prompt", base_ckpt_path=config.ckpt_path))
    run, report = Path(str(result["run"])), Path(str(result["report"]))
    found = metrics_of(result)["models"]["after"]["stages"]["attacked"]
    page = report.read_text()
    assert f'<data value="{found["success"]["value"]}">' in page
    assert f"<code>{found['learnt']['text']}</code>" in page
    assert "data:image/png;base64," in page or "data:image/jpeg;base64," in page
    assert "What this does not show" in page
    report.unlink()
    assert main([str(run), "--quiet"]) == 0
    assert report.read_text() == page
