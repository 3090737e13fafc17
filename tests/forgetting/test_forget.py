"""The whole of it on a tiny model: what is written, what is said, and the same command goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mu
from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
from mu.commands.forget import main
from mu.errors import Terminated
from mu.forgetting import run, stages
from mu.forgetting.answer import finished
from mu.forgetting.config import ForgetConfig
from mu.forgetting.pictures import SEEDS, compare
from mu.forgetting.recipes import recipe_of
from mu.forgetting.timing import Timed
from mu.ldm.tensor_file import read_state_dict
from mu.unlearning.checkpoints import Checkpoints
from tests.algorithms.saliency_unlearning.test_kills import tensors
from tests.forked_commands import Commands, flags
from tests.kills import Found, assert_kills_change_nothing, contents


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_state_dict(path)[0]


def same_file(one: Path, other: Path) -> bool:
    mine, its = weights(one), weights(other)
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def test_one_call_from_a_word_to_the_answer(
    quick_keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = mu.forget("church", **quick_keys)
    told = capsys.readouterr()

    # 1. Everything is there, in one folder.
    for path in (found.checkpoint, found.patch, found.pictures, found.report):
        assert path is not None
        assert path.is_file()
        assert path.is_relative_to(found.folder)
    assert found.pictures == found.folder / "before_after.png"
    assert found.report == found.folder / "report.html"
    assert not list(found.folder.glob("*/*/report.html")), "one report, where one looks first"
    assert found.folder.parent == tmp_path / "forget"
    assert found.folder.name.startswith("object-church-")
    assert [path.suffix for path in (found.folder / "mask").rglob("mask_*")] == [".safetensors"]

    # 2. Only weights of the UNet moved, and some did.
    before, after = weights(Path(quick_keys["ckpt_path"])), weights(found.checkpoint)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert all(name.startswith("model.diffusion_model.") for name in moved)

    # 3. The numbers: of each prompt that was drawn, with n; no score is made up.
    assert found.scores is None
    assert found.moved is not None
    assert found.moved["n_pictures"] == {"forgotten": 6 * len(SEEDS), "kept": 2 * len(SEEDS)}
    assert set(found.moved["by_prompt"]["kept"]) == set(quick_keys["keep"])
    assert found.moved["forgotten"] > 0
    assert found.moved["two_seeds_of_one_prompt_before"] > 0

    report = found.report.read_text() if found.report is not None else ""
    assert "No classifier knows this concept" in report
    assert "data:image/" in report

    # 4. The plan came first, on stderr: what is forgotten, what is kept, what is written, how long. Then the answer.
    parts = (
        "To forget  the object church",
        "To keep    2 prompts of yours",
        "taken for an object by its words; --kind style or --kind prompt says otherwise",
        f"It will write, into {found.folder}:",
        "  before_after.png ",
        "  report.html ",
        "  train/*/model.safetensors ",
        "It will take about",
    )
    places = [told.err.index(part) for part in parts]
    assert places == sorted(places)
    for inner in ("latents/", "prompts-*", "metrics", "checkpoints/", "mask_*"):
        assert inner not in told.err
    text = str(found)
    assert text == (found.folder / "answer.txt").read_text().removesuffix("\n")
    for part in (
        "Forgotten: the object church. Asked for it, the model is now to give a landscape.",
        "2 prompts of yours",
        f"scripts.convert {found.checkpoint} {found.folder / 'diffusers'}",
        "whether it is forgotten, the pictures must show",
        str(found.report),
    ):
        assert part in text

    # 5. Asked again, nothing is made again.
    made = {path: path.stat().st_mtime_ns for path in found.checkpoint.parent.rglob("*")}
    again = mu.forget("church", **quick_keys)
    assert "All of it is done already." in capsys.readouterr().err
    assert again.checkpoint == found.checkpoint
    assert again.moved == json.loads(json.dumps(found.moved))
    assert {path: path.stat().st_mtime_ns for path in found.checkpoint.parent.rglob("*")} == made

    # 6. Its model is forgotten more of without a word on its structure.
    for path in (found.checkpoint, found.checkpoint.parent):
        assert ForgetConfig(what=("cats",), ckpt_path=str(path)).structure == quick_keys["model_config_path"]

    # 7. Another setting has another folder, and draws no image again.
    images = tree(tmp_path / "processed" / "generated_prompts")
    other = mu.forget("church", **{**quick_keys, "seed": 1})
    assert other.folder != found.folder
    assert tree(tmp_path / "processed" / "generated_prompts") == images
    assert not same_file(other.checkpoint, found.checkpoint)


def test_a_dry_run_says_all_of_it_and_writes_nothing(
    quick_keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    assert main(["church", "a small dog", *flags(quick_keys), "--kind", "object", "--dry_run"]) == 0
    assert tree(tmp_path) == before
    said = capsys.readouterr().out
    assert "To forget  the objects church and a small dog" in said
    for stage in ("images   16 to forget, 2 to keep: 18 to draw", "mask", "training", "pictures"):
        assert f"\n  {stage}" in said
    assert "model.safetensors" in said
    assert "model.patch.safetensors" in said


def test_a_dry_run_of_a_large_model_on_a_cpu_times_nothing_unless_it_is_asked(
    quick_keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[object] = []

    def timing(*configs: object) -> Timed:
        timed.append(configs)
        return stages.UNTIMED

    monkeypatch.setattr(stages, "timed", timing)
    words = ["church", *flags(quick_keys), "--dry_run"]
    for more, is_large, expected in (
        ([], False, 1),
        ([], True, 0),
        (["--timing", "true"], True, 1),
        (["--timing", "false"], False, 0),
    ):
        monkeypatch.setattr(stages, "SLOW_ON_A_CPU", 1 if is_large else 10**9)
        timed.clear()
        assert main([*words, *more]) == 0
        assert len(timed) == expected, more
        said = capsys.readouterr().out
        assert "How long it will take was not timed; --timing true times one step of each kind." in said
        assert "\n  training 2 steps\n" in said
    assert main([*words, "--timing", "false", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"]["training"] is None


PROGRAM = """
import json, sys
from mu.commands.forget import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({"torch", "transformers"} & set(sys.modules))]))
"""


def test_pytorch_is_loaded_only_where_something_is_done(quick_keys: dict[str, Any], tmp_path: Path) -> None:
    """Mistakes, and what an earlier call has done, are told without the wait."""
    keys = {**quick_keys, "method": "uce", "set": ("sample_steps=1",)}
    found = mu.forget("church", **keys)

    def apart(*argv: str, **changes: Any) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) in a process of its own."""
        words = ["church", *flags({**keys, **changes}), *argv]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True
        )
        *printed, last = done.stdout.splitlines()
        code, heavy = json.loads(last)
        assert heavy == [], argv
        return code, "\n".join(printed), done.stderr

    code, printed, said = apart("--quiet")
    assert (code, said) == (0, "")
    assert [Path(line) for line in printed.splitlines()] == [
        *(found.checkpoint, found.patch, found.pictures, found.report)
    ]
    code, printed, _ = apart("--json")
    assert json.loads(printed)["moved"] == json.loads(json.dumps(found.moved))
    code, printed, _ = apart("--dry_run")
    assert (code, printed.splitlines()[-1]) == (0, f"All of it is done already, in {found.folder}")
    for changes, mistake in (
        ({"keep": (str(tmp_path / "none.txt"),)}, "keep: there is no file"),
        ({"set": ("train.lr=3e-5",)}, "there is no such key"),
    ):
        code, _, said = apart(**changes)
        assert code == 2
        assert mistake in said


@pytest.mark.parametrize("method", ["esd", "uce"])
def test_the_other_methods(quick_keys: dict[str, Any], method: str) -> None:
    settings = ["sample_steps=2"]
    if method == "esd":
        settings += ["iterations=2", "ddim_steps=3", "lr=1e-3", "logger=none"]
    found = mu.forget("Van Gogh style", **{**quick_keys, "method": method, "set": settings, "images": None})
    assert found.what == "the style Van Gogh"
    assert found.instead == ("photography",)
    assert found.patch is not None
    assert "attn2" in str(sorted(name for name in weights(found.patch)))
    assert found.report is not None
    assert not (found.folder / "mask").exists()


def test_several_prompts_word_for_word(quick_keys: dict[str, Any]) -> None:
    found = mu.forget(
        "a nude person, standing", "a photo of a nude person", **{**quick_keys, "instead": "a clothed person"}
    )
    assert found.prompts == ("a nude person, standing", "a photo of a nude person")
    (substitutes,) = Path(quick_keys["processed_dataset_dir"]).rglob("substitutes.txt")
    assert set(substitutes.read_text().splitlines()) == {"a clothed person"}


class Stopped(Exception):
    """Stands for a kill: nothing that follows it in the program is run."""


def stop(*_: object) -> None:
    raise Stopped


@pytest.mark.usefixtures("one_thread")
def test_killed_between_and_within_stages_it_comes_to_the_same_bits(
    quick_keys: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick_keys["set"] = (*quick_keys["set"], "checkpoint_every_steps=1", "keep_checkpoints=9")
    whole = mu.forget("church", **quick_keys)
    images = Path(quick_keys["processed_dataset_dir"])
    shutil.move(whole.folder, tmp_path / "whole")
    shutil.rmtree(images)

    # 1. At the boundary after the mask.
    with monkeypatch.context() as patched:
        patched.setattr(run, "_train", stop)
        with pytest.raises(Stopped):
            mu.forget("church", **quick_keys)
    recipe = recipe_of(ForgetConfig(what=("church",), **quick_keys))
    mask = finished(recipe, "mask")
    assert mask is not None

    # 2. Within the training, by a signal: after its first step. (A test in the background does not hear SIGINT.)
    is_due = Checkpoints.is_due

    def interrupted(checkpoints: Checkpoints, step: int) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return is_due(checkpoints, step)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "is_due", interrupted)
        with pytest.raises(Terminated):
            mu.forget("church", **quick_keys)
    assert "goes on: python -m mu.commands.forget church --keep" in capsys.readouterr().err
    (begun,) = (recipe.folder / "train").glob("*")
    assert (begun / "checkpoints").is_dir()

    # 3. Before the pictures.
    with monkeypatch.context() as patched:
        patched.setattr(run, "_looked_at", stop)
        with pytest.raises(Stopped):
            mu.forget("church", **quick_keys)
    told = capsys.readouterr().err
    assert "\n  training 1 of 2 steps are left" in told
    assert "It goes on after step 1, where it was stopped." in told
    assert finished(recipe, "train") == begun

    again = mu.forget("church", **quick_keys)
    assert again.checkpoint.parent == begun
    assert finished(recipe, "mask") == mask
    (wanted,) = (tmp_path / "whole" / "train").glob("*/model.safetensors")
    assert same_file(wanted, again.checkpoint)
    (old,) = (tmp_path / "whole" / "train").glob("*/pictures/before_after.png")
    assert old.read_bytes() == again.pictures.read_bytes()
    assert again.moved == json.loads(json.dumps(whole.moved))


@pytest.mark.usefixtures("one_thread")
def test_a_training_whose_checkpoints_are_all_damaged_begins_anew(
    quick_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_keys["set"] = (*quick_keys["set"], "checkpoint_every_steps=1")
    with monkeypatch.context() as patched:
        patched.setattr(SaliencyUnlearningAlgorithm, "told", stop)
        with pytest.raises(Stopped):
            mu.forget("church", **quick_keys)
    damaged = list((tmp_path / "forget").rglob("step-*.safetensors"))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    assert mu.forget("church", **quick_keys).checkpoint.is_file()


def test_pictures_before_and_after_begin_from_the_same_noise(
    quick_keys: dict[str, Any], tmp_path: Path
) -> None:
    """Of a file that nothing has changed in, nothing moves."""
    recipe = recipe_of(ForgetConfig(what=("church",), **quick_keys))
    source = Path(quick_keys["ckpt_path"])
    path = tmp_path / "same.png"
    moved = compare(recipe.train, source, ["a church"], ["a dog", "a cat"], path=path, title="t")
    assert moved.forgotten == {"a church": 0.0}
    assert moved.kept == {"a dog": 0.0, "a cat": 0.0}
    assert moved.yardstick > 0
    with Image.open(path) as picture:
        assert picture.height > 3 * 64


def test_mistakes_are_told_before_anything_is_loaded(
    quick_keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags({**quick_keys, "set": ("train.lrr=3",)})
    assert main(["church", *words]) == 2
    assert "set: 'train.lrr=3': there is no such key. Did you mean 'lr'?" in capsys.readouterr().err
    assert main(["church", *flags({**quick_keys, "keep": (str(tmp_path / "none.txt"),)})]) == 2
    assert "keep: there is no file" in capsys.readouterr().err
    assert main([]) == 2
    assert "what: say what is to be forgotten" in capsys.readouterr().err
    assert main(["church", "--ckpt_path", str(tmp_path / "none.ckpt")]) == 2
    assert "ckpt_path" in capsys.readouterr().err
    assert not (tmp_path / "forget").exists()


@pytest.mark.slow
def test_killed_at_random_it_comes_to_the_same_files(
    commands: Commands, quick_keys: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    places = {"processed_dataset_dir": str(out / "processed"), "output_dir": str(out / "forget")}
    keys = {**quick_keys, **places, "set": (*quick_keys["set"], "checkpoint_every_steps=1")}

    def found(folder: Path) -> Found:
        return {
            **tensors(folder, "model.safetensors"),
            **contents(folder, "*.png", "mask_*.safetensors", "model.patch.safetensors"),
        }

    assert_kills_change_nothing(
        commands,
        "mu.commands.forget",
        lambda: ["church", *flags(keys)],
        folder=out,
        found=found,
        kills=20,
        seed=5,
    )


def test_quiet_prints_paths_and_json_the_result(
    quick_keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["church", *flags({**quick_keys, "method": "uce", "set": ("sample_steps=1",)})]
    assert main([*words, "--quiet"]) == 0
    told = capsys.readouterr()
    paths = [Path(line) for line in told.out.splitlines()]
    assert [path.suffix for path in paths] == [".safetensors", ".safetensors", ".png", ".html"]
    assert all(path.is_file() for path in paths)
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == str(paths[0])
    assert result["moved"]["n_pictures"]["kept"] == 4
    assert main([*words, "--json", "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"]["kind"] == "object"
