"""What came of it, from the files that it has left, and in plain words. Nothing here imports torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mu.config import resolve_path
from mu.console import Answer, called, quoted
from mu.datasets.index import concept_words
from mu.forgetting.recipes import Recipe
from mu.run_folder import RESULT, is_finished
from mu.unlearning.config import EMOJI_MODEL_CONFIG, SD_MODEL_CONFIG

RESULT_NAME = "result.json"
"""What is written last into the result's folder."""
_SCORES = ("UA", "own", "IRA", "CRA")
_DOORS = "mu.algorithms.saliency_unlearning.scripts"


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """What was forgotten and what was kept: numbers, and where the files are. `str` of it is the answer in words."""

    what: str
    """`the style Noto`."""
    prompts: tuple[str, ...]
    """All that were forgotten."""
    instead: tuple[str, ...]
    kept: str
    """What was to stay, in words."""
    folder: Path
    """Of the result: the same command finds it again."""
    checkpoint: Path
    patch: Path | None
    pictures: Path
    """Before and after, side by side."""
    report: Path | None
    scores: Mapping[str, Mapping[str, Any]] | None
    """UA, IRA, CRA and own -> meaning, before, after (shares, 0 to 1) and n; None where there is no classifier."""
    moved: Mapping[str, Any] | None
    """Where there is none: how far pictures moved, see `mu.forgetting.pictures.Moved`."""
    weights: tuple[int, int]
    """Of the UNet: changed, all."""
    base: str
    """`ckpt_path` of the model that it was made from."""
    structure: str
    """`model_config_path` of both."""
    seconds: float
    """Of this call."""

    def __str__(self) -> str:
        return str(self.answer())

    def answer(self) -> Answer:
        """What a command says at its end."""
        instead = " or ".join(dict.fromkeys(name.replace("_", " ") for name in self.instead))
        changed, total = self.weights
        return Answer(
            [
                f"Forgotten: {self.what}. Asked for it, the model is now to give {instead}.",
                f"Kept: {self.kept}.",
                f"Changed: {changed:,} of {total:,} weights of the UNet; every other bit of the file is as it was.",
                "",
                *(_score_lines(self.scores) if self.scores is not None else _moved_lines(self.moved or {})),
                "",
            ],
            made={
                "model": self.checkpoint,
                "patch": self.patch,
                "pictures": self.pictures,
                "report": self.report,
            },
            following=list(_following(self)),
        )


def finished(recipe: Recipe, stage: str) -> Path | None:
    """The folder of the run in which a stage was done, and whose files are still there; None: there is none."""
    for run in sorted((recipe.folder / stage).glob("*"), reverse=True):
        if is_finished(run):
            result = json.loads((run / RESULT).read_text(encoding="utf-8"))
            made = [result["checkpoint"]] if stage == "train" else result["masks"].values()
            if all(Path(path).exists() for path in made):
                return run
    return None


def read_answer(recipe: Recipe, *, seconds: float) -> Forgotten | None:
    """What has come of it; None where a stage is not done, or a file of it is gone.

    Args:
        seconds: that this call has taken.
    """
    trained, result = finished(recipe, "train"), recipe.folder / RESULT_NAME
    if trained is None or not result.is_file():
        return None
    written = json.loads((trained / RESULT).read_text(encoding="utf-8"))
    found = json.loads(result.read_text(encoding="utf-8"))
    pictures, report = (None if found[key] is None else Path(found[key]) for key in ("pictures", "report"))
    if pictures is None or not all(path.is_file() for path in (pictures, report) if path is not None):
        return None
    return Forgotten(
        what=in_words(recipe),
        prompts=recipe.prompts,
        instead=recipe.asked.instead,
        kept=recipe.kept_in_words,
        folder=recipe.folder,
        checkpoint=Path(written["checkpoint"]),
        patch=None if written["patch"] is None else Path(written["patch"]),
        pictures=pictures,
        report=report,
        scores=found["scores"],
        moved=found["moved"],
        weights=(written["weights_changed"], written["weights_total"]),
        base=recipe.train.ckpt_path,
        structure=recipe.train.model_config_path,
        seconds=seconds,
    )


def in_words(recipe: Recipe) -> str:
    """What is forgotten, see `concept_words`."""
    return concept_words(recipe.asked.kind, recipe.asked.names)


def _score_lines(scores: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "By a classifier that took no part in it, of the pictures that the written file draws:"
    yield "         before    after       n"
    for key in _SCORES:
        score = scores[key]
        before, after = (
            "      -" if score[moment] is None else f"{100 * score[moment]:5.1f} %"
            for moment in ("before", "after")
        )
        yield f"  {key:<4} {before}  {after}  {score['n']:>6}   {score['meaning']}"


def _moved_lines(moved: Mapping[str, Any]) -> Iterator[str]:
    counts = moved["n_pictures"]
    yield "How far its pictures moved, from the same prompt and noise (root mean square, pixels from -1 to 1):"
    yield f"  {moved['forgotten']:.3f}  prompts to forget, n = {counts['forgotten']}"
    yield f"  {moved['kept']:.3f}  prompts to keep, n = {counts['kept']}"
    yield f"  {moved['two_seeds_of_one_prompt_before']:.3f}  to compare with: two seeds of one prompt, before"
    yield "There is no classifier for this model: whether it is forgotten, the pictures must show."


def _following(found: Forgotten) -> Iterator[tuple[str, str]]:
    """What can be typed next: (what for, command)."""

    def typed(door: str, *words: object) -> str:
        own = resolve_path(found.structure) != resolve_path(SD_MODEL_CONFIG)
        structure = ["--model_config_path", found.structure] if own else []
        return f"{called(f'{_DOORS}.{door}')} {shlex.join([*map(str, words), *structure])}"

    bundled = resolve_path(found.structure) == resolve_path(EMOJI_MODEL_CONFIG)
    if bundled:
        how = ("--sample_steps", 20, "--guidance_scale", 3)
        yield (
            "To draw with it",
            typed("sample", "--ckpt_path", found.checkpoint, "--prompts", found.prompts[0], *how),
        )
    if found.checkpoint.is_file():
        if not bundled:
            yield (
                "A1111, ComfyUI and Forge take the file as it is, in their folder of checkpoints",
                quoted(found.checkpoint),
            )
        yield "For diffusers", typed("convert", found.checkpoint, found.folder / "diffusers")
        if found.patch is not None:
            original = found.folder / "original.safetensors"
            words = (found.checkpoint, original, "--patches", found.patch, "--remove", "true")
            yield "To undo it", typed("apply_patch", *words)
