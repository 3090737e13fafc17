"""What the keys of a concept mean for each data set: what goes together, and which rows they name in a folder.

Nothing here imports torch, so that a data set is checked before a model is loaded. What is sampled from the model is
planned by `mu.datasets.generated` and `mu.datasets.generated_prompts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mu.config import nearest
from mu.datasets import generated_prompts, generic, i2p, image_folder, unlearn_canvas
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    check_choice,
    check_folder_names,
    choose_substitute,
    concept_label,
    concept_names,
    next_kept,
)

DATASET_TYPES = ("unlearncanvas", "generated", "i2p", "generic", "folder")
Problem = tuple[tuple[str, ...], str]
"""The keys that are at odds, of which the first is named, and what is wrong."""

_ALLOWED_RETAIN_SETS = {
    "unlearncanvas": ("others", "seed_images", "generated"),
    "generated": ("others",),
    "i2p": ("seed_images", "others", "generated"),
    "generic": ("others", "seed_images", "generated"),
    "folder": ("others", "generated"),
}
"""Of each data set; the first is what null means."""
_KEYS = (
    "template_name",
    "substitute",
    "styles",
    "objects",
    "raw_dataset_dir",
    "retain_dataset_dir",
    "retain_set",
    "forget_prompts",
    "retain_prompts",
)


def retain_set_of(config: Any) -> str:
    """`retain_set`, or what null means."""
    return str(config.retain_set or _ALLOWED_RETAIN_SETS[config.dataset_type][0])


def samples_prompts(config: Any) -> bool:
    """Whether images of free prompts are sampled from the model."""
    if config.dataset_type == "generated":
        return config.forget_prompts is not None
    return retain_set_of(config) == "generated"


def retain_prompts_of(config: Any) -> tuple[str, ...]:
    """The prompts whose images are sampled to be retained. Raises DataError for an unknown category of I2P."""
    if config.retain_prompts is not None:
        return tuple(config.retain_prompts)
    if config.dataset_type != "i2p":
        return ()
    names = concept_names(config.template_name)
    return tuple(dict.fromkeys(i2p.substitute_for(name, config.substitute) for name in names))


def substitute_prompt_of(config: Any) -> str:
    """For images without styles and objects: `substitute`, or the only prompt that is retained."""
    if config.substitute is not None:
        return str(config.substitute)
    (prompt,) = config.retain_prompts
    return str(prompt)


def read_folder(config: Any) -> ForgetRetain:
    """The rows that a folder of images gives; nothing to retain where that is to be sampled.

    Raises:
        DataError: the folder cannot serve these keys; see the message.
    """
    retain_set = retain_set_of(config)
    retain_prompt = None if config.retain_prompts is None else config.retain_prompts[0]
    if config.dataset_type == "unlearncanvas":
        return unlearn_canvas.index(
            config.raw_dataset_dir,
            template=config.template,
            template_name=config.template_name,
            use_sample=config.use_sample,
            substitute=config.substitute,
            retain_set=retain_set,
        )
    if config.dataset_type == "folder":
        return image_folder.index(
            config.raw_dataset_dir,
            config.retain_dataset_dir if retain_set == "others" else None,
            concept=concept_label(config.template_name),
            substitute=substitute_prompt_of(config),
            forget_prompt=None if config.forget_prompts is None else config.forget_prompts[0],
            retain_prompt=retain_prompt,
        )
    read: Callable[..., ForgetRetain] = i2p.index if config.dataset_type == "i2p" else generic.index
    return read(
        config.raw_dataset_dir,
        template_name=config.template_name,
        use_sample=config.use_sample,
        substitute=config.substitute,
        retain_set=retain_set,
        retain_prompt=retain_prompt,
    )


def plan_prompts(config: Any, images: Path) -> ForgetRetain:
    """The rows of free prompts, with their images below `images`; nothing to forget where a folder gives that.

    Raises:
        DataError: prompts that cannot be, or a prompt that is to be forgotten and to be retained.
    """
    if config.dataset_type != "generated":
        rows = generated_prompts.prompt_rows(
            images,
            retain_prompts_of(config),
            config.retain_images_per_prompt,
            concept="retain",
            key="retain_prompts",
        )
        return ForgetRetain((), rows)
    return generated_prompts.plan_rows(
        images,
        forget_prompts=config.forget_prompts,
        retain_prompts=config.retain_prompts,
        concept=concept_label(config.template_name),
        substitute=substitute_prompt_of(config),
        images_per_prompt=config.images_per_prompt,
        retain_images_per_prompt=config.retain_images_per_prompt,
    )


def key_problems(config: Any) -> Iterator[Problem]:
    """What does not go together, as far as the keys alone tell."""
    kind = config.dataset_type
    if (kind == "i2p") != (config.template == "i2p"):
        yield (
            ("template", "dataset_type"),
            "i2p goes with dataset_type i2p, style and object with the others",
        )
        return
    allowed = _ALLOWED_RETAIN_SETS[kind]
    if retain_set_of(config) not in allowed:
        yield (
            ("retain_set", "dataset_type"),
            f"{config.retain_set} does not go with dataset_type {kind}; allowed are: {', '.join(allowed)}",
        )
        return
    misplaced = list(_misplaced(config))
    yield from misplaced
    if misplaced:
        return
    if kind == "generated" and config.forget_prompts is None:
        yield from _grid_problems(config)
    elif samples_prompts(config):
        yield from _as_problem(lambda: plan_prompts(config, Path()), "retain_prompts")


def _misplaced(config: Any) -> Iterator[Problem]:
    """Keys that are missing for this data set, or have no meaning in it."""
    kind, retain_set = config.dataset_type, retain_set_of(config)
    sampled = samples_prompts(config)
    forget, retain = config.forget_prompts, config.retain_prompts
    if kind != "generated" and config.raw_dataset_dir is None:
        yield ("raw_dataset_dir", "dataset_type"), f"dataset_type {kind} needs a folder of images"
    if forget is not None and kind not in ("generated", "folder"):
        yield (
            ("forget_prompts", "dataset_type"),
            f"dataset_type {kind} has its own prompts; leave the key out",
        )
    if forget is not None and kind == "folder" and len(forget) > 1:
        yield (
            ("forget_prompts", "dataset_type"),
            "folder: give one prompt for all images, or texts beside them",
        )
    for key in ("styles", "objects"):
        if getattr(config, key) is not None and (kind != "generated" or forget is not None):
            yield (
                (key, "dataset_type", "forget_prompts"),
                "only a grid of dataset_type generated has it, without forget_prompts; leave the key out",
            )
    if retain is None and sampled and kind != "i2p":
        why = "forget_prompts" if kind == "generated" else "retain_set generated"
        yield ("retain_prompts", "forget_prompts", "retain_set"), f"{why} needs prompts of what is kept"
    if retain is not None and not sampled:
        if kind != "folder" and (retain_set != "seed_images" or kind == "unlearncanvas"):
            yield (
                ("retain_prompts", "retain_set", "dataset_type"),
                f"not used by dataset_type {kind} with retain_set {retain_set}; set retain_set: generated, or "
                "leave the key out"
                if kind != "generated"
                else "goes with forget_prompts; give those too, or leave the key out",
            )
        elif len(retain) > 1:
            yield ("retain_prompts", "retain_set"), "give one prompt for all images, or texts beside them"
    if (kind == "folder" and retain_set == "others") != (config.retain_dataset_dir is not None):
        yield (
            ("retain_dataset_dir", "dataset_type", "retain_set"),
            "dataset_type folder needs a folder of images to retain, or retain_set generated"
            if config.retain_dataset_dir is None
            else "only dataset_type folder with retain_set others reads it; leave the key out",
        )
    whole = kind in ("generic", "folder") or (kind == "generated" and forget is not None)
    if whole and config.substitute is None and (kind == "generic" or retain is None or len(retain) != 1):
        yield (
            ("substitute", "dataset_type", "retain_prompts"),
            "say in a whole prompt what the forgotten prompts shall give instead"
            + ("" if kind == "generic" else " (it may be left out beside exactly one of retain_prompts)"),
        )


def _grid_problems(config: Any) -> Iterator[Problem]:
    """Names that the grid of sampled images does not have."""
    names: dict[str, tuple[str, ...]] = {
        "style": config.styles or STYLES,
        "object": config.objects or OBJECTS,
    }
    own, targets = names[config.template], concept_names(config.template_name)

    def check() -> None:
        check_folder_names("styles", names["style"])
        check_folder_names("objects", names["object"])
        for target in targets:
            check_choice("template_name", target, own)
        for target in targets:
            choose_substitute(
                config.substitute,
                template=config.template,
                target=targets,
                allowed=own,
                default=next_kept(target, own, targets),
            )

    yield from _as_problem(check, "template_name")


def folder_problems(config: Any) -> Iterator[Problem]:
    """Why a folder cannot serve these keys. Of UnlearnCanvas, whose images are many, as far as folders' names tell."""
    if next(key_problems(config), None) is not None:
        return  # said already; the folder cannot be read with such keys
    if config.dataset_type == "unlearncanvas":
        yield from _canvas_problems(config)
    elif config.dataset_type != "generated":
        yield from _as_problem(lambda: read_folder(config), "raw_dataset_dir")


def _canvas_problems(config: Any) -> Iterator[Problem]:
    root, template = Path(config.raw_dataset_dir), config.template
    if not root.is_dir():
        yield (
            ("raw_dataset_dir",),
            f"there is no folder {root}; `download_data sample quick_canvas` makes data/quick-canvas-dataset/sample",
        )
        return
    styles = [folder for folder in root.iterdir() if folder.is_dir()]
    classes = [inner for style in styles for inner in style.iterdir() if inner.is_dir()]
    folders = styles if template == "style" else classes
    names = sorted({folder.name for folder in folders if not folder.name.startswith(".")})
    if not classes:
        yield ("raw_dataset_dir",), unlearn_canvas.no_images(root)
        return
    targets = concept_names(config.template_name)
    unknown = [name for name in targets if name not in names]
    if unknown:
        listed = ", ".join(names) if len(names) <= 60 else f"{len(names)} others"
        yield (
            ("template_name", "template", "raw_dataset_dir"),
            f"there is no {template} {unknown[0]!r} in {root}; it has: {listed}.{nearest(unknown[0], names)}",
        )
    else:

        def check() -> None:
            unlearn_canvas.check_seed_images(
                retain_set_of(config),
                template=template,
                targets=targets,
                styles=[style.name for style in styles],
            )
            unlearn_canvas.choose_substitutes(
                config.substitute, template=template, targets=targets, names=names
            )

        yield from _as_problem(check, "raw_dataset_dir")


def _as_problem(check: Callable[[], object], key: str) -> Iterator[Problem]:
    """The DataError of a check, under the key that it begins with, or else under `key`."""
    try:
        check()
    except DataError as error:
        named, _, message = str(error).partition(": ")
        if named not in _KEYS:
            named, message = key, str(error)
        # With one of these already found wrong, the check did not see what was meant.
        yield (named, *(other for other in (*_KEYS, "template", "dataset_type") if other != named)), message
