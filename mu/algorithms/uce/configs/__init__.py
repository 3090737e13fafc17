"""Settings of UCE: the config class, and ready-made configs. Importing this loads neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator

from mu.config import load_config, setting
from mu.datasets.index import next_kept
from mu.devices import DEVICES_PATTERN, device_names
from mu.unlearning.concept_prompts import PromptKeys
from mu.unlearning.config import OutputKeys
from mu.unlearning.find_checkpoint import Problem

MODULE = "mu.algorithms.uce.scripts.train"


class UCEConfig(OutputKeys, PromptKeys):
    """What is edited into what, and what is to stay."""

    template_name: str | tuple[str, ...] = setting(
        "Noto", "Name of the forgotten style or object; several are forgotten together.", kind="name"
    )
    devices: str = setting(
        "0",
        "CUDA device number such as 0, or cpu; without CUDA the run is on the CPU.",
        pattern=DEVICES_PATTERN,
    )
    substitute: str | None = setting(
        None,
        "What takes the concept's place in its prompts: another style or object, or any words (art, for the name of an "
        "artist). null: the next of styles or objects that is kept (after the last, the first).",
    )
    preserve_prompts: tuple[str, ...] | None = setting(
        None,
        "Prompts whose keys and values are to stay as they are; the empty prompt of guidance is always among them. "
        "null: with {style} or {object} in prompts, those of all other styles or objects. A YAML list, or one.",
        split=False,
        may_be_empty=True,
    )
    erase_scale: float = setting(1.0, "Weight of the prompts that are edited.", gt=0, le=1e6)
    preserve_scale: float = setting(1.0, "Weight of the prompts that are to stay.", ge=0, le=1e6)
    lamb: float = setting(
        100.0,
        "Weight of the original projections themselves, lambda in the paper: more of it changes less, of all prompts.",
        ge=1e-6,
        le=1e6,
    )
    output_dir: str = setting("outputs/uce", "The run's folder is made in it.", kind="path")

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt that is edited, what it is edited into), each prompt once."""
        found: dict[str, str] = {}
        for name in self.concepts:
            substitute = self.substitute
            if substitute is None:
                substitute = next_kept(name, self.known, self.concepts)
            assert substitute is not None  # see conflicts
            found |= zip(self.filled(name), self.filled(substitute), strict=True)
        return list(found.items())

    def preserved(self) -> list[str]:
        """Prompts that are to stay, without the empty one."""
        if self.preserve_prompts is not None:
            return list(self.preserve_prompts)
        if not any("{style}" in prompt or "{object}" in prompt for prompt in self.prompts):
            return []
        others = [name for name in self.known if name not in self.concepts]
        return list(dict.fromkeys(prompt for name in others for prompt in self.filled(name)))

    def conflicts(self) -> Iterator[Problem]:
        at_odds = list(super().conflicts())
        yield from at_odds
        for name in self.concepts if self.substitute is None else ():
            if name not in self.known or next_kept(name, self.known, self.concepts) is None:
                at_odds.append(
                    (
                        ("substitute", "template_name"),
                        f"{name!r} has no next {self.template} that could take its place; name a substitute",
                    )
                )
                yield at_odds[-1]
        if self.substitute in self.concepts:
            at_odds.append(
                (("substitute", "template_name"), f"{self.substitute!r} is itself to be forgotten")
            )
            yield at_odds[-1]
        if not at_odds and all(prompt == substitute for prompt, substitute in self.pairs()):
            yield (
                ("prompts", "substitute", "template_name"),
                "no prompt differs from its substitute's, so nothing would be edited; name the concept in them "
                "({concept}, {style} or {object}), and a substitute that is another",
            )
        if len(device_names(self.devices)) > 1:
            yield ("devices",), f"{self.devices} are several; this takes seconds, on one"


uce_emoji_canvas = load_config(UCEConfig, config_path="emoji_canvas/uce_style.yaml")
