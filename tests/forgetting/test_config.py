"""What is meant by a word: kinds, what is given instead, what is kept, and the stages that come of it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from mu.algorithms.saliency_unlearning.configs import (
    saliency_unlearning_generate_mask_emoji_canvas,
    saliency_unlearning_train_emoji_canvas,
)
from mu.algorithms.uce.configs import UCEConfig
from mu.commands.forget import _named
from mu.config import ConfigError
from mu.datasets.data_sets import data_set_of
from mu.forgetting.config import ForgetConfig, asked_of
from mu.forgetting.kept import everyday_prompts, mentions
from mu.forgetting.recipes import recipe_of
from mu.forgetting.run import command
from tests.importable.command_lines import parse_cli

PLACES = ("output_dir", "processed_dataset_dir", "mask_path", "devices")


def sd(tiny_runs: Any, *what: str, **keys: Any) -> ForgetConfig:
    """A config of a model whose names are not known."""
    model = {"ckpt_path": str(tiny_runs.checkpoint()), "model_config_path": str(tiny_runs.model_config)}
    return ForgetConfig(what=what, **model, **keys)


@pytest.mark.parametrize(
    ("what", "kind", "names"),
    [
        ("Noto", "style", ("Noto",)),
        ("fluent flat", "style", ("Fluent_Flat",)),
        ("Noto style", "style", ("Noto",)),
        ("cats", "object", ("Cats",)),
    ],
)
def test_names_of_the_bundled_model_are_known_however_they_are_written(
    what: str, kind: str, names: tuple[str, ...]
) -> None:
    asked = asked_of(ForgetConfig(what=(what,)))
    assert (asked.kind, asked.names) == (kind, names)


@pytest.mark.parametrize(
    ("what", "keys", "message"),
    [
        (("Noot",), {}, "Did you mean 'Noto'?"),
        (("Noto",), {"kind": "object"}, "objects: Cats, Dogs"),
        (("church",), {}, "--kind prompt forgets a prompt word for word"),
        (("Noto", "Cats"), {}, "only things of one kind are forgotten together"),
        (("Noto",), {"instead": "noto"}, "'noto' is itself to be forgotten"),
        (("Noto",), {"instead": "Blub"}, "Did you mean 'Blob'?"),
        (("Noto",), {"keep": ("a dog",)}, "all other styles and objects of the bundled model are kept"),
        (("a dog",), {"kind": "prompt"}, "instead: say in a whole prompt"),
        (("a dog",), {"kind": "prompt", "instead": "A dog"}, "instead: 'A dog' is itself to be forgotten"),
        ((), {}, "say what is to be forgotten"),
    ],
)
def test_what_the_bundled_model_cannot_be_asked(
    what: tuple[str, ...], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        ForgetConfig(what=what, **keys)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("what", "kind", "name"),
    [
        ("Van Gogh style", "style", "Van Gogh"),
        ("in the style of Van Gogh", "style", "Van Gogh"),
        ("church", "object", "church"),
        ("golden retriever", "object", "golden retriever"),
        ("a photo of a nude person", "prompt", "a photo of a nude person"),
    ],
)
def test_the_rule_for_other_models_is_by_words_and_is_said(
    tiny_runs: Any, what: str, kind: str, name: str
) -> None:
    asked = asked_of(sd(tiny_runs, what))
    assert (asked.kind, asked.names) == (kind, (name,))
    assert any("by its words" in note for note in asked.notes)
    assert not any("by its words" in note for note in asked_of(sd(tiny_runs, what, kind=kind)).notes)


def test_the_bundled_model_has_the_recipes_of_the_results_table() -> None:
    recipe = recipe_of(ForgetConfig(what=("Noto",)))
    assert recipe.mask is not None
    wanted = {
        "mask": saliency_unlearning_generate_mask_emoji_canvas,
        "train": saliency_unlearning_train_emoji_canvas,
    }
    for name, stage in (("mask", recipe.mask), ("train", recipe.train)):
        differing = {key for key, value in stage if value != getattr(wanted[name], key)} - {*PLACES}
        assert differing <= {"template_name", "sample_prompts", "raw_dataset_dir", "checkpoint_every_minutes"}
    assert recipe.scores is not None
    assert (len(recipe.prompts), len(recipe.kept)) == (12, 72)
    assert recipe.asked.instead == ("Blob",)
    assert recipe_of(ForgetConfig(what=("High Contrast", "Noto"))).asked.instead == ("Blob", "Blob")


def test_the_words_that_are_given_instead_take_its_place_in_every_prompt(tiny_runs: Any) -> None:
    recipe = recipe_of(sd(tiny_runs, "church", "old castle", kind="object", instead="a dog"))
    rows = data_set_of(recipe.train).rows(Path())
    pairs = dict.fromkeys((row.prompt, row.substitute_prompt) for row in rows.forget)
    assert ("a photo of church", "a photo of a dog") in pairs
    assert ("old castle in a city", "a dog in a city") in pairs
    assert tuple(prompt for prompt, _ in pairs) != ()
    assert {prompt for prompt, _ in pairs} == set(recipe.prompts)
    assert len(rows.forget) == 16 * 5
    uce = recipe_of(sd(tiny_runs, "church", "old castle", kind="object", instead="a dog", method="uce"))
    assert isinstance(uce.train, UCEConfig)
    assert set(uce.train.pairs()) == set(pairs)
    assert uce.train.preserved() == list(uce.kept)


def test_what_is_kept(tiny_runs: Any, tmp_path: Path) -> None:
    assert len(everyday_prompts()) == len(set(everyday_prompts())) == 64
    recipe = recipe_of(sd(tiny_runs, "dogs", neighbours=("wolf",)))
    assert len(recipe.kept) == 63 + 8
    assert "a photo of wolf" in recipe.kept
    (note,) = (note for note in recipe.notes if "left out" in note)
    assert note.endswith("'a photo of a dog on a lawn'")

    (tmp_path / "keep.txt").write_text("a red boat\n\na blue boat\n")
    (tmp_path / "keep.csv").write_text('prompt\n"a boat, green"\n')
    files = (str(tmp_path / "keep.txt"), str(tmp_path / "keep.csv"), "a boat")
    assert recipe_of(sd(tiny_runs, "dogs", keep=files)).kept == (
        "a red boat",
        "a blue boat",
        "a boat, green",
        "a boat",
    )
    with pytest.raises(ConfigError, match="'a photo of dogs' is one of the prompts to forget"):
        recipe_of(sd(tiny_runs, "dogs", keep=("a photo of dogs",)))


def test_a_folder_of_images_is_kept_by_its_texts(tiny_runs: Any, tmp_path: Path) -> None:
    for name, text in (("1", "a red boat"), ("2", "a blue boat")):
        (tmp_path / f"{name}.jpg").write_bytes(b"image")
        (tmp_path / f"{name}.txt").write_text(text)
    assert recipe_of(sd(tiny_runs, "dogs", keep=(str(tmp_path),))).kept == ("a red boat", "a blue boat")


@pytest.mark.parametrize(
    ("prompt", "name", "does"),
    [
        ("a photo of a Dog on a lawn", "dogs", True),
        ("two churches", "a church", True),
        ("hot dogs", "dog", True),
        ("a dogma", "dog", False),
        ("a van in a town", "Van Gogh", False),
    ],
)
def test_a_prompt_mentions_a_concept_by_whole_words(prompt: str, name: str, does: bool) -> None:
    assert mentions(prompt, [name]) is does


def test_other_settings_and_other_models_have_other_folders(tiny_runs: Any) -> None:
    config = sd(tiny_runs, "church")
    first = recipe_of(config).folder
    assert recipe_of(config).folder == first
    assert recipe_of(sd(tiny_runs, "church", devices="cpu")).folder == first
    for keys in ({"instead": "a dog"}, {"seed": 1}, {"set": ("train.lr=2e-5",)}, {"neighbours": ("chapel",)}):
        assert recipe_of(sd(tiny_runs, "church", **keys)).folder != first
    other = ForgetConfig(
        what=("church",),
        ckpt_path=str(tiny_runs.checkpoint("other")),
        model_config_path=str(tiny_runs.model_config),
    )
    assert recipe_of(other).folder != first


def test_any_key_of_the_stages_may_be_set(tiny_runs: Any) -> None:
    recipe = recipe_of(
        sd(tiny_runs, "church", set=("train.lr=2e-5", "sample_steps=30", "mask.threshold=0.3"))
    )
    assert recipe.mask is not None
    assert (recipe.mask.lr, recipe.mask.sample_steps, recipe.mask.threshold) == (1e-5, 30, 0.3)
    assert (recipe.train.sample_steps, dict(recipe.train)["lr"]) == (30, 2e-5)
    with pytest.raises(ConfigError) as error:
        recipe_of(
            sd(
                tiny_runs,
                "church",
                set=("train.lr=fast", "masks.lr=1", "thresold=0.1", "train.lr", "epochs=0"),
            )
        )
    for part in (
        "train: lr: must be a number, got 'fast'",
        "there is no stage 'masks'",
        "Did you mean 'threshold'?",
        "'train.lr' is no setting",
        "epochs: must be >= 1",
    ):
        assert part in str(error.value)


def test_a_file_that_a_later_stage_lacks_is_told_first() -> None:
    with pytest.raises(ConfigError, match=r"scores: classifier_path: there is no file none\.safetensors"):
        recipe_of(ForgetConfig(what=("Noto",), set=("scores.classifier_path=none.safetensors",)))


@pytest.mark.parametrize("seeds", ["1,2,30", "[1, 2, 30]"])
def test_a_list_may_be_set_on_the_command_line(tiny_runs: Any, seeds: str) -> None:
    model = ["--ckpt_path", str(tiny_runs.checkpoint()), "--model_config_path", str(tiny_runs.model_config)]
    words = ["church", *model, "--set", f"train.lr=2e-5,sample_seeds={seeds},sample_steps=30"]
    recipe = recipe_of(parse_cli(ForgetConfig, _named(words)))
    train = dict(recipe.train)
    assert (train["lr"], train["sample_seeds"], train["sample_steps"]) == (2e-5, (1, 2, 30), 30)


def test_the_command_that_goes_on_asks_for_the_same(tiny_runs: Any) -> None:
    config = sd(tiny_runs, "a church, old", keep=("a dog, sitting", "a cat"), set=("train.lr=1e-4",))
    *program, what = shlex.split(command(config))[:4]
    assert (program, what) == (["python", "-m", "mu.commands.forget"], "a church, old")
    words = shlex.split(command(config))[3:]
    assert parse_cli(ForgetConfig, _named(words)) == config
