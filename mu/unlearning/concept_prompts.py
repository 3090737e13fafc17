"""The prompts of a concept, for methods that need no images of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mu.config import setting
from mu.datasets.base import Problem
from mu.datasets.canvas import style_words
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.unlearning.config import ConceptKeys


class PromptKeys(ConceptKeys):
    """Which prompts of the concept a method is given."""

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

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        for prompt in self.prompts:
            try:
                prompt.format(concept="x", style="x", object="x")
            except (LookupError, ValueError):
                yield ("prompts",), f"{prompt!r}: only {{concept}}, {{style}} and {{object}} are filled in"

    def concept_prompts(self) -> list[str]:
        """All prompts of the concepts that are forgotten, each once."""
        found = [prompt for name in self.concepts for prompt in self.prompts_of(name)]
        return list(dict.fromkeys(found))

    def prompts_of(self, name: str) -> list[str]:
        """The prompts with another concept of the same kind, such as a substitute, in the concept's place."""
        styles: Sequence[str] = self.styles or STYLES
        objects: Sequence[str] = self.objects or OBJECTS
        if self.template == "style":
            styles = [name]
        elif self.template == "object":
            objects = [name]
        return list(
            dict.fromkeys(
                prompt.format(
                    concept=style_words(name), style=style_words(style), object=object.replace("_", " ")
                )
                for prompt in self.prompts
                for style in styles
                for object in objects
            )
        )
