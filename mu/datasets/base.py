"""What a data set is: the rules of its keys, its disk check, its rows, and whether images are sampled for it.

A new one is a subclass of `DataSet` in a file of its own and a line in `mu.datasets.data_sets`; docs/developing.md has
the steps. Nothing here imports torch, so that a data set is checked before a model is loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_apart,
    check_substitutes,
    check_whole_prompt,
    concept_names,
)

TRAINING_SEED_BASE = 1_000_000
"""The first seed of images that a model is unlearned on; seeds below are left to evaluation."""
RETAIN_SETS = ("others", "seed_images", "generated")
SAMPLED_PROMPTS: Mapping[str, str] = {"subfolder": "generated_prompts", "prompt": "{prompt}"}
"""Where images of free prompts lie, and how their manifest says that each has a prompt of its own."""
Problem = tuple[tuple[str, ...], str]
"""The keys that are at odds, of which the first is named, and what is wrong."""

WITHOUT_IMAGES = (
    "without images of your own, set dataset_type: generated, with forget_prompts and retain_prompts: the model draws "
    "them"
)
"""What to do where a folder of images is missing."""
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
"""With which the message of a DataError may begin."""


class DataSet:
    """One kind of data set, under the keys of one config.

    A subclass says which keys it takes (the class attributes, and `key_problems` where they do not suffice) and reads
    its rows (`read`).

    Args:
        config: a `mu.unlearning.config.DataKeys`.

    Attributes:
        about: its line in the help of `dataset_type`.
        templates: the values of `template` that go with it.
        retain_sets: those of `retain_set`; the first is what null means.
        captioned: of these, the ones whose images take one prompt for all from `retain_prompts`.
        kind: its name, `dataset_type`.
        targets: the names of what is forgotten.
        retain_set: of this config.
    """

    about: ClassVar[str]
    templates: ClassVar[tuple[str, ...]] = ("style", "object")
    retain_sets: ClassVar[tuple[str, ...]] = ("others", "generated")
    captioned: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config
        self.kind = str(config.dataset_type)
        self.targets = concept_names(config.template_name)
        self.retain_set = str(config.retain_set or self.retain_sets[0])

    # What others ask.

    def conflicts(self) -> Iterator[Problem]:
        """What does not go together, as far as the keys alone tell."""
        if self.config.template not in self.templates:
            message = "i2p goes with dataset_type i2p, style and object with the others"
            yield ("template", "dataset_type"), message
            return
        if self.retain_set not in self.retain_sets:
            allowed = ", ".join(self.retain_sets)
            message = f"{self.retain_set} does not go with dataset_type {self.kind}; allowed are: {allowed}"
            yield ("retain_set", "dataset_type"), message
            return
        problems = list(self.key_problems())
        yield from problems
        if not problems and self.sampled is not None:
            yield from as_problem(lambda: self._checked(self.sampled_rows(Path())), "retain_prompts")

    def disk_problems(self) -> Iterator[Problem]:
        """Why what is on disk cannot serve these keys; nothing where they are at odds among themselves."""
        if next(self.conflicts(), None) is None:
            yield from self.folder_problems()

    @property
    def sampled(self) -> Mapping[str, str] | None:
        """How images are sampled from the model: `subfolder` and `prompt` of GeneratedImages; None: none are."""
        return SAMPLED_PROMPTS if self.retain_set == "generated" else None

    def rows(self, sampled: Path | None) -> ForgetRetain:
        """All rows to forget and to retain.

        Args:
            sampled: the folder of images sampled from the model, which need not be there; None: there are none.

        Raises:
            DataError: the data set cannot serve this config; see the message.
        """
        planned = ForgetRetain((), ()) if sampled is None else self.sampled_rows(sampled)
        found = self.read()
        return self._checked(
            ForgetRetain(
                (*found.forget, *planned.forget),
                (*found.retain, *planned.retain),
                (*found.notes, *planned.notes),
            )
        )

    def _checked(self, rows: ForgetRetain) -> ForgetRetain:
        """The same rows, once no prompt or image of them is of both parts."""
        check_substitutes(rows.forget, key=self.substitute_key)
        check_apart(rows)
        return rows

    def cache_name(self, sampled: Path | None) -> str:
        """The folder, in those of latents and of lists, of what was made of these rows; `sampled` as in `rows`."""
        del sampled  # free prompts name their images themselves
        return self.kind

    # What a subclass says.

    @property
    def substitute_key(self) -> str:
        """The key that substitute prompts come from."""
        return "substitute"

    def read(self) -> ForgetRetain:
        """The rows whose images lie on disk; none to retain where these are sampled. Raises DataError.

        That no prompt or image is both to be forgotten and to be kept is checked afterwards, see `rows`.
        """
        raise NotImplementedError

    def folder_problems(self) -> Iterator[Problem]:
        """`disk_problems` of keys without conflicts."""
        yield from as_problem(lambda: self.rows(None), "raw_dataset_dir")

    def key_problems(self) -> Iterator[Problem]:
        """Keys that are missing, or have no meaning here: those of a folder whose images to forget have prompts."""
        if self.config.raw_dataset_dir is None:
            message = f"dataset_type {self.kind} needs a folder of images; {WITHOUT_IMAGES}"
            yield ("raw_dataset_dir", "dataset_type"), message
        own = f"dataset_type {self.kind} has its own prompts; leave the key out"
        yield from self.unused(own, "forget_prompts", "dataset_type")
        yield from self.no_grid()
        yield from self.retain_prompts_problems()
        yield from self.no_retain_folder()
        yield from self.no_missing_images()

    def sampled_rows(self, images: Path) -> ForgetRetain:
        """The rows whose images are sampled from the model, and lie below `images`. Raises DataError."""
        return ForgetRetain((), self.sampled_to_retain(images))

    def retained_prompts(self) -> tuple[str, ...]:
        """The prompts whose images are sampled to be retained. Raises DataError."""
        return tuple(self.config.retain_prompts or ())

    # What subclasses share.

    def unused(self, message: str, key: str, *others: str) -> Iterator[Problem]:
        """A problem if `key` is given."""
        if getattr(self.config, key) is not None:
            yield (key, *others), message

    def no_grid(self) -> Iterator[Problem]:
        """`styles` and `objects` are not given."""
        message = "only a grid of dataset_type generated has it, without forget_prompts; leave the key out"
        for key in ("styles", "objects"):
            yield from self.unused(message, key, "dataset_type", "forget_prompts")

    def no_retain_folder(self) -> Iterator[Problem]:
        """`retain_dataset_dir` is not given."""
        message = "only dataset_type folder with retain_set others reads it; leave the key out"
        yield from self.unused(message, "retain_dataset_dir", "dataset_type", "retain_set")

    def no_missing_images(self) -> Iterator[Problem]:
        """`missing_images` is not given."""
        message = "only tables of prompts, of i2p and generic, have rows without images; leave the key out"
        yield from self.unused(message, "missing_images", "dataset_type")

    def retain_prompts_problems(self) -> Iterator[Problem]:
        """`retain_prompts` names what is sampled, or one prompt of all images where these take one."""
        prompts = self.config.retain_prompts
        if self.retain_set == "generated":
            if prompts is None:
                message = "retain_set generated needs prompts of what is kept"
                yield ("retain_prompts", "forget_prompts", "retain_set"), message
        elif self.retain_set not in self.captioned:
            message = (
                f"not used by dataset_type {self.kind} with retain_set {self.retain_set}; set retain_set: generated, "
                "or leave the key out"
            )
            yield from self.unused(message, "retain_prompts", "retain_set", "dataset_type")
        elif prompts is not None and len(prompts) > 1:
            yield ("retain_prompts", "retain_set"), "give one prompt for all images, or texts beside them"

    def sampled_to_retain(self, images: Path) -> tuple[Row, ...]:
        """The rows of the retained prompts, whose images are sampled."""
        count = self.config.retain_images_per_prompt
        return prompt_rows(images, self.retained_prompts(), count, concept="retain", key="retain_prompts")


def as_problem(check: Callable[[], object], key: str) -> Iterator[Problem]:
    """The DataError of a check, under the key that it begins with, or else under `key`."""
    try:
        check()
    except DataError as error:
        named, _, message = str(error).partition(": ")
        if named not in _KEYS:
            named, message = key, str(error)
        # With one of these already found wrong, the check did not see what was meant.
        yield (named, *(other for other in (*_KEYS, "template", "dataset_type") if other != named)), message


def prompt_rows(
    images: Path,
    prompts: Sequence[str],
    count: int,
    *,
    concept: str,
    key: str,
    substitute: str | None = None,
) -> tuple[Row, ...]:
    """Rows of images that are sampled for free prompts, at `<images>/<prompt>-<hash>/<seed>.png`.

    Args:
        count: images of each prompt, with the seeds TRAINING_SEED_BASE, TRAINING_SEED_BASE + 1, ...
        key: the config's key that gives the prompts, for messages.

    Raises:
        DataError: a prompt is blank or has a placeholder.
    """
    rows = []
    for prompt in prompts:
        check_whole_prompt(key, prompt)
        words = re.sub(r"[^a-z0-9]+", "-", prompt.casefold()).strip("-")[:40].strip("-")
        folder = f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}".lstrip("-")
        for number in range(count):
            relative = f"{folder}/{TRAINING_SEED_BASE + number}.png"
            rows.append(Row(images / relative, relative, prompt, "", prompt, concept, substitute))
    return tuple(rows)
