"""What came of it, in plain words."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mu.config import resolve_path
from mu.unlearning.config import EMOJI_MODEL_CONFIG, SD_MODEL_CONFIG

_SCORES = ("UA", "own", "IRA", "CRA")


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
        return "\n".join(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts, and paths as texts."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def _lines(found: Forgotten) -> Iterator[str]:
    instead = " or ".join(dict.fromkeys(name.replace("_", " ") for name in found.instead))
    yield f"Forgotten  {found.what}. Asked for it, the model now gives {instead}."
    yield f"Kept       {found.kept}."
    changed, total = found.weights
    yield f"Changed    {changed:,} of {total:,} weights; all others are the same to the bit."
    yield ""
    yield from _score_lines(found.scores) if found.scores is not None else _moved_lines(found.moved or {})
    yield ""
    yield f"Model      {found.checkpoint}"
    if found.patch is not None:
        yield f"Patch      {found.patch}"
    yield f"Pictures   {found.pictures}"
    if found.report is not None:
        yield f"Report     {found.report}"
    yield ""
    yield from _use_lines(found)


def _score_lines(scores: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "What a classifier that took no part in it sees in the pictures that the written file draws:"
    for key in _SCORES:
        score = scores[key]
        if score["after"] is None:
            continue
        before = f" (before {100 * score['before']:.1f} %)" if score.get("before") is not None else ""
        yield f"  {key:<4}{100 * score['after']:5.1f} %{before:<18} n = {score['n']:<4} {score['meaning']}"


def _moved_lines(moved: Mapping[str, Any]) -> Iterator[str]:
    counts = moved["n_pictures"]
    yield "How far its pictures moved, from the same prompt and noise (root mean square, pixels from -1 to 1):"
    yield f"  {moved['forgotten']:.3f}  prompts to forget, n = {counts['forgotten']}"
    yield f"  {moved['kept']:.3f}  prompts to keep, n = {counts['kept']}"
    yield f"  {moved['two_seeds_of_one_prompt_before']:.3f}  to compare with: two seeds of one prompt, before"
    yield "There is no classifier for this model: whether it is forgotten, the pictures must show."


def _use_lines(found: Forgotten) -> Iterator[str]:
    model = shlex.quote(str(found.checkpoint))
    own = resolve_path(found.structure) != resolve_path(SD_MODEL_CONFIG)
    structure = f" --model_config_path {shlex.quote(found.structure)}" if own else ""
    if resolve_path(found.structure) == resolve_path(EMOJI_MODEL_CONFIG):
        prompt = shlex.quote(found.prompts[0])
        yield f"Draw       unlearn_diff sample --ckpt_path {model}{structure} \\"
        yield f"             --prompts {prompt} --sample_steps 20 --guidance_scale 3"
    elif found.checkpoint.is_file():
        yield "Use it     A1111, ComfyUI, Forge: the file as it is, in their folder of checkpoints"
    if found.checkpoint.is_file():
        yield f"diffusers  unlearn_diff convert {model} my_model{structure}"
    if found.patch is not None:
        yield f"Undo       unlearn_diff patch {model} original.safetensors --patches {shlex.quote(str(found.patch))} \\"
        yield f"             --remove true{structure}"
