"""What is asked: the keys of `forget`, and what they mean. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.config import Config, nearest, resolve_path, setting
from mu.config_names import METHOD_NAMES
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.index import next_kept, same_name
from mu.devices import DEVICES_PATTERN, devices_problem
from mu.run_folder import writable_problem
from mu.unlearning.config import EMOJI_CHECKPOINT, EMOJI_MODEL_CONFIG, SD_MODEL_CONFIG
from mu.unlearning.find_checkpoint import (
    Problem,
    checkpoint_file,
    checkpoint_problems,
    model_config_of_run,
)

KINDS = ("style", "object", "prompt")
METHODS = ("saliency_unlearning", "esd", "uce")
INSTEAD = {"style": "photography", "object": "a landscape", "prompt": "a photo of a landscape"}
"""Kind -> what is given instead, where the user does not say, by a model whose names are not known."""
PROMPTS = {
    "style": (
        "a painting in the style of {concept}",
        "a landscape in the style of {concept}",
        "a portrait in the style of {concept}",
        "a city street in the style of {concept}",
        "a bowl of fruit in the style of {concept}",
        "an animal in the style of {concept}",
        "a house, {concept} style",
        "a tree, {concept} style",
    ),
    "object": (
        "{concept}",
        "a photo of {concept}",
        "a painting of {concept}",
        "a drawing of {concept}",
        "a close-up photo of {concept}",
        "a photo of {concept} at night",
        "{concept} in a city",
        "{concept} in the countryside",
    ),
    "prompt": ("{concept}",),
}
"""Kind -> the prompts in which a concept is forgotten, in a model whose names are not known."""
_WORDS_OF_A_PROMPT = 4
_KIND_RULE = (
    "a text with the word style is a style (the word is taken off), one of four words or more a prompt, any other an "
    "object"
)


class ForgetConfig(Config):
    """What a model is to forget, what it is to give instead, and what it is to keep."""

    what: tuple[str, ...] = setting(
        (),
        "What to forget, as one says it: a style, an object or a whole prompt; several of one kind together.",
        split=False,
        may_be_empty=True,
    )
    kind: str | None = setting(
        None,
        "What it is. null: of the bundled model it is looked up, by name; of any other, "
        f"{_KIND_RULE}. What was taken is said.",
        choices=KINDS,
    )
    instead: str | None = setting(
        None,
        "Words that take its place in its prompts: what is given instead. null: of the bundled model the next style or "
        f"object of its list; else {INSTEAD['style']!r} for a style, {INSTEAD['object']!r} for an object, and for a "
        f"prompt {INSTEAD['prompt']!r}.",
    )
    keep: tuple[str, ...] | None = setting(
        None,
        "What must stay: prompts; or the path of a text file (one a line), of a .csv with a column prompt, or of a "
        "folder of images with texts beside them. null: 64 everyday prompts that come with the package, without those "
        "that name what is forgotten. Of the bundled model, all its other styles and objects are kept.",
        split=False,
    )
    neighbours: tuple[str, ...] | None = setting(
        None,
        "Names of the same kind, near to it, that must stay as well: Monet, where Van Gogh is forgotten.",
    )
    ckpt_path: str = setting(
        EMOJI_CHECKPOINT,
        "The model: a CompVis checkpoint (.ckpt, .pth, .safetensors), a diffusers folder, or the folder of a run. The "
        "default is the small model that comes with the package.",
        kind="path",
    )
    model_config_path: str | None = setting(
        None,
        "CompVis YAML with the structure of that model; null: the bundled model's for it, that of the run which made "
        "the checkpoint, else Stable Diffusion 1's.",
        kind="path",
    )
    use_ema: bool = setting(False, "Take the EMA copy of the UNet in the checkpoint, not its raw weights.")
    method: str = setting(
        "saliency_unlearning",
        "How: saliency_unlearning (or salun) finds the weights that matter and trains them; esd trains without images; "
        "uce edits keys and values in seconds.",
        choices=(*METHODS, *METHOD_NAMES),
    )
    images: int | None = setting(
        None,
        "Images drawn for each forgotten prompt, to learn from. null: 5 of a style and 6 of an object of the bundled "
        "model; else as many as make about 80 in all.",
        ge=1,
        le=100_000,
    )
    seed: int = setting(0, "Seed of every random number of mask and training.", ge=0, lt=2**32)
    devices: str = setting(
        "0",
        "CUDA device number such as 0, or cpu; several with commas share the work. Without CUDA it is the CPU.",
        pattern=DEVICES_PATTERN,
    )
    set: tuple[str, ...] = setting(
        (),
        "Any key of the stages, as train.lr=2e-5 or mask.threshold=0.3; without mask., train. or scores. it is set "
        "wherever there is such a key: sample_steps=30. docs/keys.md lists them.",
        may_be_empty=True,
    )
    timing: bool | None = setting(
        None,
        "Time one step of each kind before anything begins, and say how long all of it will take. null: yes, but for "
        "--dry_run of a model as large as Stable Diffusion on a CPU, where the steps alone take minutes.",
    )
    processed_dataset_dir: str = setting(
        "data/processed", "Folder of drawn images and cached latents, shared by all runs.", kind="path"
    )
    output_dir: str = setting(
        "outputs/forget",
        "The result's folder is made in it; the same command finds it again, and goes on there.",
        kind="path",
    )

    @property
    def structure(self) -> str:
        """`model_config_path`, or what null means."""
        if self.model_config_path is not None:
            return self.model_config_path
        if self.ckpt_path == EMOJI_CHECKPOINT:
            return EMOJI_MODEL_CONFIG
        return model_config_of_run(self.checkpoint()) or SD_MODEL_CONFIG

    def checkpoint(self) -> Path:
        """The file or diffusers folder that `ckpt_path` leads to."""
        return checkpoint_file(self.ckpt_path)

    @property
    def knows_names(self) -> bool:
        """Whether the model is EmojiCanvas', the bundled one or what became of it: its styles and objects are known."""
        return resolve_path(self.structure) == resolve_path(EMOJI_MODEL_CONFIG)

    @classmethod
    def of_another(cls, name: str) -> str | None:
        # Late, as only a mistake needs them.
        from mu.algorithms.esd.configs import ESDConfig
        from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
        from mu.algorithms.uce.configs import UCEConfig
        from mu.config import keys_of
        from mu.evaluation.config import EvaluateConfig

        stages = (MaskConfig, TrainConfig, ESDConfig, UCEConfig, EvaluateConfig)
        if not any(name == key.name for stage in stages for key in keys_of(stage)):
            return None
        return f"It is a key of the stages; write --set {name}=VALUE."

    def conflicts(self) -> Iterator[Problem]:
        if not self.what:
            yield ("what",), 'say what is to be forgotten, as in: unlearn_diff forget "Noto"'
            return
        kinds = [_kind_of(text, self) for text in self.what]
        problems = [problem for problem in kinds if problem not in KINDS]
        if problems:
            yield ("what", "kind"), "; ".join(problems)
        elif len(found := dict.fromkeys(kinds)) > 1:
            each = ", ".join(f"{text} ({kind})" for text, kind in zip(self.what, kinds, strict=True))
            yield (
                ("what", "kind"),
                f"{each}: only things of one kind are forgotten together; forget the {' and the '.join(found)} one "
                "after the other, the second with --ckpt_path of what the first made, or say --kind",
            )
        elif (kind := kinds[0]) != "prompt" and self.knows_names:
            yield from self._grid_problems(kind)
        elif self.instead is None and self.knows_names:
            yield (
                ("instead", "kind", "what"),
                "say in a whole prompt what the bundled model is to give instead",
            )
        elif self.instead is not None and any(same_name(self.instead, text) for text in self.what):
            yield ("instead", "what"), f"{self.instead!r} is itself to be forgotten"

    def _grid_problems(self, kind: str) -> Iterator[Problem]:
        """What is at odds where styles or objects of the bundled model are forgotten."""
        for key in ("keep", "neighbours"):
            if getattr(self, key) is not None:
                yield (
                    (key, "what"),
                    "all other styles and objects of the bundled model are kept; leave the key out",
                )
        known, names = _known(kind), [_known_name(text, _known(kind)) for text in self.what]
        if self.instead is None:
            if next_kept(str(names[0]), known, [str(name) for name in names]) is None:
                yield (
                    ("instead", "what"),
                    f"these are all its {kind}s; say what to give instead in a whole prompt",
                )
            return
        other = _known_name(self.instead, known)
        if other in names:
            yield ("instead", "what"), f"{self.instead!r} is itself to be forgotten"
        elif other is None and not re.search(r"[\s{]", self.instead):
            yield (
                ("instead", "what"),
                f"{self.instead!r} is no {kind} of the bundled model, which has: {', '.join(known)}; nor a whole "
                f"prompt, which has a blank.{nearest(self.instead, known)}",
            )

    def disk_problems(self) -> Iterator[Problem]:
        yield from checkpoint_problems("ckpt_path", self.ckpt_path)
        if not resolve_path(self.structure).is_file():
            yield ("model_config_path",), f"there is no file {self.structure}"
        if (problem := devices_problem(self.devices)) is not None:
            yield ("devices",), problem
        for key in ("output_dir", "processed_dataset_dir"):
            if (problem := writable_problem(getattr(self, key))) is not None:
                yield (key,), problem


@dataclass(frozen=True)
class Asked:
    """What is forgotten, in words that were understood."""

    kind: str
    names: tuple[str, ...]
    """As prompts say them."""
    instead: tuple[str, ...]
    """What each of them becomes."""
    notes: tuple[str, ...]
    """What was taken for what, where the user did not say."""


def asked_of(config: ForgetConfig) -> Asked:
    """What a checked config asks for."""
    kind, notes = _kind_of(config.what[0], config), []
    if config.knows_names and kind != "prompt":
        known = _known(kind)
        names = [str(_known_name(text, known)) for text in config.what]
        if config.instead is not None:
            instead = [_known_name(config.instead, known) or config.instead] * len(names)
        else:
            instead = [str(next_kept(name, known, names)) for name in names]
            notes.append(f"instead: the next {kind} of the bundled model; --instead names another")
        return Asked(kind, tuple(names), tuple(instead), tuple(notes))
    names = [_without_style(text) if kind == "style" else text for text in config.what]
    if config.kind is None:
        others = " or ".join(f"--kind {other}" for other in KINDS if other != kind)
        notes.append(
            f"taken for {'an' if kind == 'object' else 'a'} {kind} by its words; {others} says otherwise"
        )
    if config.instead is None:
        notes.append(f"instead: what stands in for any {kind}; --instead says something else")
    return Asked(kind, tuple(names), (config.instead or INSTEAD[kind],) * len(names), tuple(notes))


def _kind_of(text: str, config: ForgetConfig) -> str:
    """One of `KINDS`; or, in words, why it cannot be told."""
    if not config.knows_names or config.kind == "prompt":
        return config.kind or _kind_by_rule(text)
    kinds = [config.kind] if config.kind is not None else ["style", "object"]
    for kind in kinds:
        if _known_name(text, _known(kind)) is not None:
            return kind
    known = [name for kind in kinds for name in _known(kind)]
    listed = "; ".join(f"{kind}s: {', '.join(_known(kind))}" for kind in kinds)
    return (
        f"{text!r} is not what the bundled model knows, {listed}.{nearest(text, known)} (--kind prompt forgets a "
        "prompt word for word; --ckpt_path names another model)"
    )


def _kind_by_rule(text: str) -> str:
    """By the words alone, see the help of `kind`."""
    words = text.casefold().split()
    if "style" in words:
        return "style"
    return "prompt" if len(words) >= _WORDS_OF_A_PROMPT else "object"


def _without_style(text: str) -> str:
    """`Van Gogh style`, `the style of Van Gogh`, `in the style of Van Gogh` -> `Van Gogh`."""
    name = re.sub(r"^(in\s+)?(the\s+)?style\s+of\s+|\s+style$", "", text.strip(), flags=re.I).strip()
    return name or text


def _known(kind: str) -> Sequence[str]:
    return STYLES if kind == "style" else OBJECTS


def _known_name(text: str, known: Sequence[str]) -> str | None:
    """The name as the model has it, whatever its capitals and blanks; None: there is none."""
    return next((name for name in known if same_name(name, _without_style(text))), None)
