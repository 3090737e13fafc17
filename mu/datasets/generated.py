"""A data set sampled from the model itself, as SalUn's authors made theirs for nudity; no images are needed.

Either a grid of styles x objects, at `<folder>/generated/<model>-<settings>/<Style>/<Object>/<seed>.png`, or free
prompts, at `<folder>/generated_prompts/<model>-<settings>/<prompt>-<hash>/<seed>.png`. `mu.datasets.generated_images`
samples what is missing, and keeps it for every run that asks for the same. Nothing here imports torch.

The seeds are TRAINING_SEED_BASE, TRAINING_SEED_BASE + 1, ...: evaluation, whose seeds are small numbers (188, 288
and so on), never sees an image from which a model was unlearned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mu.datasets import emoji_canvas
from mu.datasets.base import SAMPLED_PROMPTS, TRAINING_SEED_BASE, DataSet, Problem, prompt_rows
from mu.datasets.canvas import CANVAS_TEMPLATE, canvas_row, style_words
from mu.datasets.index import (
    ForgetRetain,
    Row,
    check_choice,
    check_folder_names,
    check_substitutes,
    check_whole_prompt,
    choose_substitute,
    concept_label,
    concept_names,
    next_kept,
)

CONCEPT = "{concept}"
"""In forget_prompts it stands for each name of template_name, and in their substitutes for `substitute`."""


class Generated(DataSet):
    about = (
        "images sampled once from the model itself, for a grid of styles x objects or for forget_prompts and "
        "retain_prompts."
    )
    retain_sets = ("others",)

    @property
    def sampled(self) -> Mapping[str, str]:
        if self.config.forget_prompts is not None:
            return SAMPLED_PROMPTS
        return {"subfolder": "generated", "prompt": CANVAS_TEMPLATE}

    @property
    def substitute_key(self) -> str:
        return super().substitute_key if self.config.forget_prompts is None else substitute_key(self)

    def key_problems(self) -> Iterator[Problem]:
        config = self.config
        if config.forget_prompts is None:
            message = "goes with forget_prompts; give those too, or leave the key out"
            yield from self.unused(message, "retain_prompts", "retain_set", "dataset_type")
        else:
            yield from self.no_grid()
            if config.retain_prompts is None:
                message = "forget_prompts needs prompts of what is kept"
                yield ("retain_prompts", "forget_prompts", "retain_set"), message
            yield from substitute_problems(self)
        yield from self.no_retain_folder()
        yield from self.no_missing_images()

    def folder_problems(self) -> Iterator[Problem]:
        yield from ()  # nothing of it need be there

    def read(self) -> ForgetRetain:
        return ForgetRetain((), ())

    def cache_name(self, sampled: Path | None) -> str:
        # Two models' images of one style and seed have the same names; the folder tells them apart.
        return self.kind if sampled is None else f"{sampled.parent.name}-{sampled.name}"

    def sampled_rows(self, images: Path) -> ForgetRetain:
        config = self.config
        if config.forget_prompts is None:
            return plan_rows(
                images,
                styles=tuple(config.styles or emoji_canvas.STYLES),
                objects=tuple(config.objects or emoji_canvas.OBJECTS),
                template=config.template,
                template_name=config.template_name,
                images_per_prompt=config.images_per_prompt,
                retain_images_per_prompt=config.retain_images_per_prompt,
                substitute=config.substitute,
            )
        concept, substitute = concept_label(config.template_name), substitute_prompt(self)
        check_whole_prompt(substitute_key(self), substitute, (concept,))
        forget = [
            row
            for prompt in config.forget_prompts
            for name in (self.targets if CONCEPT in prompt else ("",))
            for row in prompt_rows(
                images,
                [prompt.replace(CONCEPT, style_words(name))],
                config.images_per_prompt,
                concept=concept,
                substitute=prompt.replace(CONCEPT, substitute) if CONCEPT in prompt else substitute,
                key="forget_prompts",
            )
        ]
        return ForgetRetain(tuple(forget), self.sampled_to_retain(images))


def substitute_prompt(data_set: DataSet) -> str:
    """For images without styles and objects: `substitute`, or the only prompt that is retained."""
    if data_set.config.substitute is not None:
        return str(data_set.config.substitute)
    (prompt,) = data_set.config.retain_prompts
    return str(prompt)


def substitute_key(data_set: DataSet) -> str:
    """The key that `substitute_prompt` comes from."""
    return "retain_prompts" if data_set.config.substitute is None else "substitute"


def substitute_problems(data_set: DataSet) -> Iterator[Problem]:
    """`substitute_prompt` has what it needs."""
    retained = data_set.config.retain_prompts
    if data_set.config.substitute is None and (retained is None or len(retained) != 1):
        message = (
            "say in a whole prompt what the forgotten prompts shall give instead "
            "(it may be left out beside exactly one of retain_prompts)"
        )
        yield ("substitute", "dataset_type", "retain_prompts"), message


def plan_rows(
    images: Path,
    *,
    styles: Sequence[str],
    objects: Sequence[str],
    template: str,
    template_name: str | Sequence[str],
    images_per_prompt: int,
    retain_images_per_prompt: int,
    substitute: str | None = None,
) -> ForgetRetain:
    """The rows of the grid styles x objects, whether their images exist or not.

    Args:
        images: see `GeneratedImages.path`.
        template: what is forgotten, "style" or "object"; `template_name` names it, or several of them. Their prompts
            with every object (or in every style) are forgotten, all other prompts of the grid are retained.
        images_per_prompt, retain_images_per_prompt: images of a prompt to forget, and of one to retain.
        substitute: what stands in for a forgotten concept: another style (or object), or a whole prompt with
            `{object}` (or `{style}`). By default the next one in its list that is kept, the first after the last.

    Raises:
        DataError: names that cannot be; see the message.
    """
    check_folder_names("styles", styles)
    check_folder_names("objects", objects)
    names = styles if template == "style" else objects
    targets = concept_names(template_name)
    for target in targets:
        check_choice("template_name", target, names)
    stand_ins = {
        target: choose_substitute(
            substitute,
            template=template,
            target=targets,
            allowed=names,
            default=next_kept(target, names, targets),
        )
        for target in targets
    }
    forget: list[Row] = []
    retain: list[Row] = []
    for style in styles:
        for object in objects:
            forgotten = (style if template == "style" else object) in stand_ins
            for number in range(images_per_prompt if forgotten else retain_images_per_prompt):
                path = images / style / object / f"{TRAINING_SEED_BASE + number}.png"
                row = canvas_row(path, style, object, template=template, stand_ins=stand_ins)
                (forget if forgotten else retain).append(row)
    check_substitutes(forget)
    return ForgetRetain(tuple(forget), tuple(retain))
