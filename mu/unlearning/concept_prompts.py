"""The prompts of a concept, for methods that need no images of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import Formatter

from mu.config import nearest, setting
from mu.datasets.base import Problem
from mu.datasets.canvas import style_words
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.unlearning.config import ConceptKeys

_FIELDS = ("concept", "style", "object")


class PromptKeys(ConceptKeys):
    """Which prompts of the concept a method is given."""

    template: str = setting(
        "style", "Kind of concept that is forgotten: style or object.", choices=("style", "object")
    )
    template_name: str | tuple[str, ...] = setting(
        "Abstractionism",
        "Name of the forgotten style or object; several are forgotten together.",
        kind="name",
    )
    prompts: tuple[str, ...] = setting(
        ("{concept}",),
        "Prompts of the concept, in which {concept} is its name. One with {style} and {object} stands for many: the "
        "concept's own name with each of the others in styles or objects. A YAML list, or one.",
        split=False,
    )
    styles: tuple[str, ...] | None = setting(
        None, "Styles that {style} stands for; null: EmojiCanvas' seven.", kind="name"
    )
    objects: tuple[str, ...] | None = setting(
        None, "Objects that {object} stands for; null: EmojiCanvas' twelve.", kind="name"
    )

    @property
    def known(self) -> Sequence[str]:
        """Names of the concept's kind that the prompts can have."""
        return (self.styles or STYLES) if self.template == "style" else (self.objects or OBJECTS)

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        wrong = [prompt for prompt in self.prompts if not _is_fillable(prompt)]
        for prompt in wrong:
            yield ("prompts",), f"{prompt!r}: only {{concept}}, {{style}} and {{object}} are filled in"
        if not wrong and any(f"{{{self.template}}}" in prompt for prompt in self.prompts):
            for name in self.concepts:
                if name not in self.known:
                    yield (
                        ("template_name", "prompts", "styles", "objects"),
                        f"{name!r} is none of the {self.template}s that the prompts are filled with: "
                        f"{', '.join(self.known)}.{nearest(name, self.known)}",
                    )

    def concept_prompts(self) -> list[str]:
        """All prompts of the concepts that are forgotten, each once."""
        return list(dict.fromkeys(prompt for name in self.concepts for prompt in self.filled(name)))

    def filled(self, name: str) -> list[str]:
        """The prompts with a concept of the same kind, such as a substitute, in the concept's place.

        As many for each name, in the same order; the same prompt may stand there twice.
        """
        styles = [name] if self.template == "style" else self.styles or STYLES
        objects = [name] if self.template == "object" else self.objects or OBJECTS
        return [
            prompt.format(
                concept=style_words(name), style=style_words(style), object=object.replace("_", " ")
            )
            for prompt in self.prompts
            for style in styles
            for object in objects
        ]


def _is_fillable(prompt: str) -> bool:
    """Whether nothing but the three fields is to be filled in."""
    try:
        return all(
            field is None or (field in _FIELDS and not spec and conversion is None)
            for _, field, spec, conversion in Formatter().parse(prompt)
        )
    except ValueError:  # a brace alone
        return False
