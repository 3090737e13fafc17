"""What is asked, as configs of the stages that do it. Nothing here imports torch.

The bundled model has the recipes of the results table, `configs/emoji_canvas`; any other has SalUn's
published settings for Stable Diffusion (Fan et al. 2024), over images that it draws itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.uce.configs import UCEConfig
from mu.config import (
    Config,
    ConfigError,
    Entry,
    assemble,
    check_paths,
    entries_of,
    file_entries,
    keys_of,
    nearest,
    override,
)
from mu.config_file import PACKAGE_PREFIX, Text, read_list, resolve_path
from mu.config_keys import Key
from mu.config_names import METHOD_NAMES
from mu.datasets.canvas import canvas_prompt
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.index import concept_label
from mu.evaluation.config import EvaluateConfig
from mu.forgetting.config import KINDS, PROMPTS, Asked, ForgetConfig, asked_of
from mu.forgetting.kept import kept_prompts

C = TypeVar("C", bound=Config)

_IMAGES_IN_ALL = 80
_PASSES = {"style": 50, "object": 50, "prompt": 10}
"""Over 80 images in batches of 8 they are about as many steps, 500 and 100, as published for classes and for nudity."""
_ALPHA = {"style": 0.5, "object": 0.5, "prompt": 0.1}
_NO_PART_OF_THE_RESULT = frozenset(
    {
        *(
            "devices",
            "output_dir",
            "processed_dataset_dir",
            "mask_path",
            "ckpt_path",
            "base_ckpt_path",
            "resume",
        ),
        *("checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints"),
    }
)
"""Keys that may be others when the same command is given again. What lies at the paths is compared by itself."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The stages of a forgetting, each with its config."""

    asked: Asked
    method: str
    prompts: tuple[str, ...]
    """All that are forgotten."""
    kept: tuple[str, ...]
    """All that are to stay."""
    kept_in_words: str
    notes: tuple[str, ...]
    mask: MaskConfig | None
    """Of saliency unlearning alone."""
    train: TrainConfig | ESDConfig | UCEConfig
    scores: EvaluateConfig | None
    """Where a classifier knows what is forgotten."""
    folder: Path
    """Of the result. Other settings, or another model at `ckpt_path`, have another one."""


def recipe_of(config: ForgetConfig) -> Recipe:
    """The recipe of what is asked.

    Raises:
        ConfigError: `set` names no key, a value is wrong, the prompts of `keep` cannot be read, or a stage lacks a
            file.
    """
    asked = asked_of(config)
    method = METHOD_NAMES.get(config.method, config.method)
    on_grid = config.knows_names and asked.kind != "prompt"
    notes = list(asked.notes)
    if on_grid:
        prompts, kept = _grid(asked)
        kept_in_words = f"all other styles and objects of the bundled model, {len(kept)} prompts"
    else:
        prompts = tuple(
            prompt.replace("{concept}", name) for name in asked.names for prompt in PROMPTS[asked.kind]
        )
        kept, kept_in_words = kept_prompts(config, asked, prompts, notes)
    if method == "esd":
        notes.append("esd has no term for what is kept: that is only looked at afterwards")

    # 1. The stages, and the recipe of each: a packaged file, or the defaults of its class.
    trainings: dict[str, type[Config]] = {"esd": ESDConfig, "uce": UCEConfig}
    train = trainings.get(method, TrainConfig)
    classes: dict[str, type[Config]] = {"train": train}
    if train is TrainConfig:
        classes = {"mask": MaskConfig, **classes}
    if on_grid:
        classes["scores"] = EvaluateConfig
    recipes = {"mask": "mask", "train": "train" if train is TrainConfig else method, "scores": "evaluate"}
    kind = asked.kind if on_grid else "style"
    files = {name: f"emoji_canvas/{recipes[name]}_{kind}.yaml" for name in classes if config.knows_names}

    # 2. What each is told over that, and what `set` says.
    # One file for all stages, also where a folder of runs was given, whose newest may soon be another.
    model = str(config.checkpoint()) if resolve_path(config.ckpt_path).is_dir() else config.ckpt_path
    shared: dict[str, Any] = {
        "ckpt_path": model,
        "base_ckpt_path": model,
        "model_config_path": config.structure,
        "use_ema": config.use_ema,
        "devices": config.devices,
        "template": "object" if asked.kind == "prompt" else asked.kind,
        "template_name": _labels(asked),
        "processed_dataset_dir": config.processed_dataset_dir,
        "seed": config.seed,
        "sample_prompts": (),
    }
    if on_grid:
        # A substitute of null is the next of the list that is kept, for each of them.
        data: dict[str, Any] = {"substitute": None if config.instead is None else asked.instead[0]}
        if config.images is not None:
            data["images_per_prompt"] = config.images
        often = {"checkpoint_every_minutes": 0.5}  # its checkpoints are small
        own = {"mask": data, "train": data | often, "esd": often, "uce": data}
    else:
        own = _own_keys(config, asked, prompts, kept)
    entries, mistakes = _set(config.set, classes)
    stages: dict[str, Config] = {}
    for name, cls in classes.items():
        known = {key.name for key in keys_of(cls)}
        told = {**shared, **own.get(recipes[name], {})}
        mine = entries_of({key: value for key, value in told.items() if key in known})
        read = file_entries(files[name], mistakes) if name in files else ()
        try:
            stages[name] = assemble(cls, read, mine, entries[name])
        except ConfigError as error:
            mistakes += [f"{name}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise ConfigError(mistakes)

    # 3. The folder, whose name has a digest of all that decides the result.
    digest = _digest(config, asked, kept, method, stages)
    label = re.sub(r"[^\w.+-]+", "_", concept_label(_labels(asked)))
    folder = Path(config.output_dir) / f"{asked.kind}-{label}-{digest}"
    places = {
        "mask": folder / "mask",
        "train": folder / "train",
        "scores": Path(config.output_dir) / "scores",
    }
    placed = {name: override(stage, output_dir=str(places[name])) for name, stage in stages.items()}
    mask, trained, scores = (placed.get(name) for name in ("mask", "train", "scores"))
    assert mask is None or isinstance(mask, MaskConfig)
    assert isinstance(trained, (TrainConfig, ESDConfig, UCEConfig))
    assert scores is None or isinstance(scores, EvaluateConfig)
    if isinstance(trained, TrainConfig) and trained.masking != "saliency":
        mask = None

    # 4. What a stage lacks on the disk would else be told hours later; the mask is what is made.
    if isinstance(trained, TrainConfig) and mask is not None:
        placed["train"] = override(trained, masking="none")
    if lacking := [f"{name}: {problem}" for name in placed for problem in check_paths(placed[name])]:
        raise ConfigError(lacking)
    return Recipe(
        asked=asked,
        method=method,
        prompts=prompts,
        kept=kept,
        kept_in_words=kept_in_words,
        notes=tuple(notes),
        mask=mask,
        train=trained,
        scores=scores,
        folder=folder,
    )


def _own_keys(
    config: ForgetConfig, asked: Asked, prompts: Sequence[str], kept: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Stage or method -> its keys, where prompts are forgotten that no grid lists."""
    images = config.images or math.ceil(_IMAGES_IN_ALL / len(prompts))
    data: dict[str, Any] = {
        "dataset_type": "generated",
        "raw_dataset_dir": None,
        "image_size": None,
        "substitute": asked.instead[0],
        "forget_prompts": PROMPTS[asked.kind] if asked.kind != "prompt" else prompts,
        "retain_prompts": kept,
        "images_per_prompt": images,
        "retain_images_per_prompt": 1,
    }
    erased = {"prompts": PROMPTS[asked.kind]}
    if asked.kind == "prompt":
        erased = {"prompts": tuple(re.sub(r"[{}]", "", prompt) for prompt in prompts)}
    uce = {"prompts": PROMPTS[asked.kind], "substitute": asked.instead[0], "preserve_prompts": kept}
    if asked.kind == "prompt":
        uce["template_name"] = asked.names
    if config.knows_names:  # a free prompt of the bundled model, whose own recipe it takes
        return {"mask": data, "train": data, "esd": erased, "uce": uce}
    return {
        "mask": {**data, "draws_per_image": 5},
        "train": {
            **data,
            "epochs": _PASSES[asked.kind],
            "alpha": _ALPHA[asked.kind],
        },
        "esd": {**erased, "train_method": "xattn" if asked.kind == "style" else "noxattn"},
        "uce": uce,
    }


def _grid(asked: Asked) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts to forget, prompts to keep) of the bundled model's styles and objects."""
    every = [(style, object) for style in STYLES for object in OBJECTS]
    place = KINDS.index(asked.kind)
    forgotten = [pair for pair in every if pair[place] in asked.names]
    others = [pair for pair in every if pair[place] not in asked.names]
    return tuple(canvas_prompt(o, s) for s, o in forgotten), tuple(canvas_prompt(o, s) for s, o in others)


def _labels(asked: Asked) -> tuple[str, ...]:
    """The names as names of folders can be."""
    if asked.kind != "prompt":
        return tuple(name.replace(" ", "_") for name in asked.names)
    plain = (re.sub(r"[^\w,&'()+-]+", " ", name)[:60].strip().replace(" ", "_") for name in asked.names)
    return tuple(dict.fromkeys(label or "prompt" for label in plain))


def _set(
    given: Iterable[str], stages: Mapping[str, type[Config]]
) -> tuple[dict[str, list[Entry]], list[str]]:
    """What `set` says: stage -> its entries; and what is wrong with it."""
    entries: dict[str, list[Entry]] = {name: [] for name in stages}
    mistakes: list[str] = []
    known = {name: {key.name: key for key in keys_of(cls)} for name, cls in stages.items()}
    for text in _whole(given, known):
        name, equals, value = text.partition("=")
        stage, dot, key = name.strip().rpartition(".")
        if not equals or not key:
            mistakes.append(f"set: {text!r} is no setting; write train.lr=2e-5, or lr=2e-5")
        elif dot and stage not in stages:
            mistakes.append(
                f"set: {text!r}: there is no stage {stage!r} here; there are: {', '.join(stages)}"
            )
        else:
            found = [one for one in ([stage] if dot else stages) if key in known[one]]
            every = [each for one in ([stage] if dot else stages) for each in known[one]]
            if not found:
                mistakes.append(f"set: {text!r}: there is no such key.{nearest(key, every)}")
            for one in found:
                try:
                    listed = known[one][key].listed and value.lstrip().startswith("[")
                    read: object = read_list(value) if listed else Text(value)
                    entries[one].append((key, read, "--set"))
                except ValueError as error:
                    mistakes.append(f"set: {text!r}: {error}")
    return entries, mistakes


def _whole(given: Iterable[str], known: Mapping[str, Mapping[str, Key]]) -> list[str]:
    """The settings, with a list that was cut at its commas put together: scores.seeds=188,288."""
    settings: list[str] = []
    for text in given:
        name = settings[-1].partition("=")[0].strip().rpartition(".")[2] if settings else ""
        if "=" not in text and any(name in keys and keys[name].listed for keys in known.values()):
            settings[-1] += f",{text}"
        else:
            settings.append(text)
    return settings


def _digest(
    config: ForgetConfig, asked: Asked, kept: Sequence[str], method: str, stages: Mapping[str, Config]
) -> str:
    """Eight digits of a hash of all that decides the result; of the model, names, sizes and times of its files."""
    settings = {
        name: {key: value for key, value in dict(stage).items() if key not in _NO_PART_OF_THE_RESULT}
        for name, stage in stages.items()
    }
    checkpoint = config.checkpoint()
    files = sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]
    packaged = config.ckpt_path.startswith(PACKAGE_PREFIX)  # another installation has other times
    model = [
        (file.name, file.stat().st_size, 0 if packaged else file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    ]
    structure = resolve_path(config.structure).read_text(encoding="utf-8")
    whole = [method, asked.names, asked.instead, list(kept), settings, model, structure]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
