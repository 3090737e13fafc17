"""What is kept: the prompts that the user names, those of a file or folder, or prompts of everyday things."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mu.config import ConfigError, resolve_path
from mu.datasets.canvas import canvas_prompt
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.folder import captions
from mu.datasets.image_files import find_images
from mu.datasets.index import DataError, same_words
from mu.datasets.prompt_table import read_prompt_table
from mu.datasets.tables import read_text
from mu.forgetting.config import PROMPTS, Asked, ForgetConfig


def kept_prompts(
    config: ForgetConfig, asked: Asked, prompts: Sequence[str], notes: list[str]
) -> tuple[tuple[str, ...], str]:
    """The prompts to keep, and which they are in words.

    Args:
        prompts: all that are forgotten.
        notes: what is to be said of it is added.

    Raises:
        ConfigError: what `keep` names cannot be read, or is to be forgotten.
    """
    forgotten = {same_words(prompt) for prompt in prompts}
    found: list[str] = []
    words: list[str] = []
    if config.keep is not None:
        for item in config.keep:
            found += _prompts_in(item)
        words.append(f"{len(found)} prompts of yours")
    elif config.knows_names:
        every = [canvas_prompt(object, style) for style in STYLES for object in OBJECTS]
        found += [prompt for prompt in every if same_words(prompt) not in forgotten]
        words.append(f"{len(found)} prompts, of all other styles and objects of the bundled model")
    else:
        every = everyday_prompts()
        found += [prompt for prompt in every if not mentions(prompt, asked.names)]
        words.append(f"{len(found)} everyday prompts")
        if len(found) < len(every):
            left_out = ", ".join(repr(prompt) for prompt in every if prompt not in found)
            notes.append(
                f"of the everyday prompts, those that name what is forgotten are left out: {left_out}"
            )
    if config.neighbours is not None:
        if asked.kind == "prompt":
            raise ConfigError(["neighbours: a prompt has none; give whole prompts with keep"])
        near = [
            prompt.replace("{concept}", name) for name in config.neighbours for prompt in PROMPTS[asked.kind]
        ]
        found += near
        words.append(f"{len(near)} of its neighbours {', '.join(config.neighbours)}")
    kept = tuple({same_words(prompt): prompt for prompt in found}.values())
    if both := [prompt for prompt in kept if same_words(prompt) in forgotten]:
        raise ConfigError([f"keep: {both[0]!r} is one of the prompts to forget"])
    return kept, " and ".join(words)


def _prompts_in(item: str) -> list[str]:
    """What an item of `keep` names: one prompt, those of a file, or of a folder of images. Raises ConfigError."""
    path = _given_file(item)
    if path is None:
        return [item]
    try:
        if path.is_dir():
            images = find_images(path, path.resolve(), [], [])
            if not images:
                raise DataError(f"{path} has no images; give a folder of images with texts beside them")
            return list(dict.fromkeys(captions(path, images, prompt=None, key="keep").values()))
        if not path.is_file():
            raise DataError(f"there is no file {item}")
        if path.suffix.lower() == ".csv":
            return [case.prompt for case in read_prompt_table(path, use_row_settings=False).cases]
        lines = [" ".join(line.split()) for line in read_text(path).splitlines()]
    except DataError as error:
        raise ConfigError([f"keep: {error}"]) from error
    if not any(lines):
        raise ConfigError([f"keep: {path} has no prompt; write one a line"])
    return [line for line in lines if line]


def everyday_prompts() -> list[str]:
    """What is kept where the user does not say: prompts of everyday things, of many kinds."""
    text = resources.files("mu.forgetting").joinpath("everyday_prompts.txt").read_text(encoding="utf-8")
    return text.splitlines()


def mentions(prompt: str, names: Sequence[str]) -> bool:
    """Whether a prompt names one of these: in whole words, whatever their case, with or without an s."""
    return any(
        re.search(rf"\b{re.escape(re.sub(r's$', '', _bare(name)))}(?:s|es)?\b", prompt.casefold())
        for name in names
    )


def _given_file(text: str) -> Path | None:
    """The file or folder that an item of `keep` means; None: it is a prompt."""
    path = resolve_path(text)
    return path if path.suffix.lower() in (".txt", ".csv") or path.is_dir() else None


def _bare(name: str) -> str:
    """Without a leading article."""
    return re.sub(r"^(a|an|the)\s+", "", name.casefold().replace("_", " ").strip())
