"""Which attacks there are, and the keys of each. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mu.config import Config, nearest, resolve_path, setting
from mu.datasets.canvas import UNLEARN_CANVAS_OBJECTS, UNLEARN_CANVAS_STYLES
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.evaluation.config import DrawnKeys, base_problems
from mu.evaluation.quality_config import ClassifierKeys
from mu.run_folder import writable_problem
from mu.unlearning.config import EMOJI_CHECKPOINT, EMOJI_MODEL_CONFIG, OUTPUTS, ModelKeys
from mu.unlearning.find_checkpoint import (
    Problem,
    checkpoint_file,
    checkpoint_problems,
)

ATTACKS: Mapping[str, str] = {
    "inversion": "mu.evaluation.attacks.inversion:Inversion",
    "prompt": "mu.evaluation.attacks.prompt:Prompt",
    "ring_a_bell": "mu.evaluation.attacks.ring_a_bell:RingABell",
    "relearn": "mu.evaluation.attacks.relearn:Relearn",
    "noised": "mu.evaluation.attacks.noised:Noised",
}
"""Name -> the class of an attack, see `mu.evaluation.attacks.target.Attack`."""
WITHOUT_IMAGES = ("ring_a_bell",)
"""Attacks that learn from no images."""


class InversionKeys(Config):
    """Textual inversion (Gal et al. 2022) of a forgotten concept: Concept Inversion (Pham et al. 2023)."""

    inversion_vectors: int = setting(
        6, "inversion: word vectors in the place of the concept's name; both papers have 1.", ge=1, le=64
    )
    inversion_steps: int = setting(
        200, "inversion: steps of Adam; both papers have 5000, of batches of 4.", ge=1, le=1_000_000
    )
    inversion_batch_size: int = setting(16, "inversion: images of a step.", ge=1, le=4096)
    inversion_lr: float = setting(2e-2, "inversion: learning rate; both papers have 5e-3.", gt=0, le=10)
    inversion_word: str | None = setting(
        None,
        "inversion: text whose embeddings the vectors begin with, in turn. null: the concept's own name, as in "
        "Concept Inversion; Gal et al. take a coarse word of its kind.",
    )


class PromptKeys(Config):
    """Adversarial tokens before the prompt: UnlearnDiffAtk (Zhang et al. 2024) and P4D (Chin et al. 2024)."""

    prompt_target: str = setting(
        "images",
        "prompt: what the prediction shall come near. images: the noise of target images (UnlearnDiffAtk); original: "
        "what the base predicts for the plain prompt (P4D), which needs base_ckpt_path.",
        choices=("images", "original"),
    )
    prompt_tokens: int = setting(
        5,
        "prompt: tokens before the prompt; UnlearnDiffAtk has 3 for styles and objects and 5 for nudity, P4D 16.",
        ge=1,
        le=64,
    )
    prompt_steps: int = setting(
        200, "prompt: steps; UnlearnDiffAtk has 40, of 50 timesteps each, P4D 3000.", ge=1, le=1_000_000
    )
    prompt_batch_size: int = setting(16, "prompt: images of a step.", ge=1, le=4096)
    prompt_lr: float = setting(
        1e-1, "prompt: learning rate of AdamW; UnlearnDiffAtk has 1e-2, P4D 1e-1.", gt=0, le=10
    )
    prompt_weight_decay: float = setting(0.1, "prompt: that of AdamW; P4D has 0.1.", ge=0, le=10)
    prompt_candidates: int = setting(
        4,
        "prompt: how often it begins anew; that text counts whose loss on all target images is least.",
        ge=1,
        le=100,
    )


class RingABellKeys(Config):
    """A genetic search for tokens near the concept's direction in the text encoder: Ring-A-Bell (Tsai et al. 2024)."""

    ring_tokens: int = setting(
        16, "ring_a_bell: tokens of the text; the paper has 16, 38 and 77.", ge=1, le=75
    )
    ring_strength: float = setting(
        3.0,
        "ring_a_bell: how much of the concept's direction is added, eta; the paper has 2 to 3.5.",
        gt=0,
        le=100,
    )
    ring_population: int = setting(
        200, "ring_a_bell: texts of a generation; the paper has 200.", ge=4, le=100_000
    )
    ring_generations: int = setting(300, "ring_a_bell: generations; the paper has 3000.", ge=1, le=1_000_000)
    ring_mutation: float = setting(
        0.25, "ring_a_bell: probability that a child has one token changed; the paper has 0.25.", ge=0, le=1
    )
    ring_crossover: float = setting(
        0.5, "ring_a_bell: probability that two parents exchange their ends; the paper has 0.5.", ge=0, le=1
    )


class RelearnKeys(Config):
    """Plain fine-tuning on a few images of the concept."""

    relearn_steps: tuple[int, ...] = setting(
        (5, 10, 20, 40),
        "relearn: after so many steps of fine-tuning the images are drawn.",
        ge=1,
        le=1_000_000,
    )
    relearn_images: int = setting(
        12, "relearn: how many of the target images it is tuned on, evenly from all.", ge=1, le=100_000
    )
    relearn_batch_size: int = setting(4, "relearn: images of a step.", ge=1, le=4096)
    relearn_lr: float = setting(
        1e-4,
        "relearn: learning rate of Adam, of all weights of the UNet; for Stable Diffusion 1e-5.",
        gt=0,
        le=1,
    )
    relearn_other_name: str | None = setting(
        "Zorb",
        "relearn: a name that no model has seen. The base is also taught the concept under it: what a model needs "
        "that draws well and does not know the name. null: it is not.",
    )


class NoisedKeys(Config):
    """The concept's own images, noised in part, and denoised by the model."""

    noised_strengths: tuple[float, ...] = setting(
        (0.5, 0.7, 0.9),
        "noised: which part of the sampling steps is done on a target image; 1 is a plain drawing from noise. With a "
        "small one much of the image stays, whatever the model knows.",
        gt=0,
        le=1,
    )


class WhatKeys(Config):
    """What is attacked, and with what."""

    attack: str = setting(
        "inversion",
        "Which attack; see docs/attacks.md. The first argument, without its name.",
        choices=tuple(ATTACKS),
    )


class AttackConfig(
    NoisedKeys,
    RelearnKeys,
    RingABellKeys,
    PromptKeys,
    InversionKeys,
    ClassifierKeys,
    DrawnKeys,
    ModelKeys,
    WhatKeys,
):
    """An attack on a checkpoint that forgot a style or an object, and the same attack on the model before."""

    ckpt_path: str = setting(
        EMOJI_CHECKPOINT,
        "Checkpoint to attack, or the folder of a training run, or a folder of runs, of which the newest that forgot "
        "this concept is taken.",
        kind="path",
    )
    base_ckpt_path: str | None = setting(
        EMOJI_CHECKPOINT,
        "Checkpoint before unlearning: it is attacked too, to compare with, and draws the target images. null: it is "
        "not, and target_images_dir is needed.",
        kind="path",
    )
    model_config_path: str = setting(
        EMOJI_MODEL_CONFIG, "CompVis YAML with the structure of both models.", kind="path"
    )
    template: str = setting("style", "Kind of the forgotten concept.", choices=("style", "object"))
    template_name: str = setting("Noto", "Name of the forgotten concept.", kind="name")
    styles: tuple[str, ...] | None = setting(
        None,
        "object: styles of the concept's prompts; null: EmojiCanvas' seven, with classifier unlearn_canvas its 51.",
        kind="name",
    )
    objects: tuple[str, ...] | None = setting(
        None,
        "style: objects of the concept's prompts; null: EmojiCanvas' twelve, or UnlearnCanvas' 20.",
        kind="name",
    )
    target_seeds: tuple[int, ...] = setting(
        (900_001, 900_002, 900_003, 900_004),
        "Seeds of the target images, which the base draws of each of the concept's prompts: the attack learns from "
        "them. Neither those of training (from 1000000 on) nor any of seeds.",
        ge=0,
        lt=1_000_000,
    )
    target_images_dir: str | None = setting(
        None,
        "Folder of target images instead: <Style>/<Object>/<number>.png, or any images of the concept.",
        kind="path",
    )
    attack_seed: int = setting(0, "Seed of what the attack draws at random.", ge=0, lt=2**32)
    report: bool = setting(True, "Also write report.html, one file with numbers, pictures and settings.")
    output_dir: str = setting(
        f"{OUTPUTS}/evaluations",
        "The run's folder is made in it; images are kept in its grids/, which evaluate shares, and what is learnt in "
        "its learnt/.",
        kind="path",
    )

    @property
    def other(self) -> str:
        """The kind that the concept is not of."""
        return "object" if self.template == "style" else "style"

    def all_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Styles and objects that prompts may have."""
        styles, objects = STYLES, OBJECTS
        if self.classifier == "unlearn_canvas":
            styles, objects = UNLEARN_CANVAS_STYLES, UNLEARN_CANVAS_OBJECTS
        return self.styles or styles, self.objects or objects

    def cells(self) -> list[tuple[str, str]]:
        """(style, object) of each of the concept's prompts."""
        styles, objects = self.all_names()
        if self.template == "style":
            return [(self.template_name, object) for object in objects]
        return [(style, self.template_name) for style in styles]

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        if self.classifier == "none":
            yield ("classifier",), "an attack is counted by a classifier; none is not allowed here"
        if "," in self.devices:
            yield ("devices",), "an attack is one process; name one device"
        if same := set(self.seeds) & set(self.target_seeds):
            yield (
                ("target_seeds", "seeds"),
                f"both have {min(same)}; the images that are counted must be others",
            )
        if list(self.relearn_steps) != sorted(set(self.relearn_steps)):
            yield ("relearn_steps",), "the numbers must rise"
        if self.attack == "prompt" and self.prompt_target == "original" and self.base_ckpt_path is None:
            yield ("prompt_target", "base_ckpt_path", "attack"), "original needs base_ckpt_path"
        if self.attack not in WITHOUT_IMAGES and (
            self.base_ckpt_path is None and self.target_images_dir is None
        ):
            yield (
                ("target_images_dir", "base_ckpt_path", "attack"),
                f"{self.attack} learns from images of the concept: give a folder of them, or base_ckpt_path, whose "
                "model draws them",
            )
        if ":" not in self.classifier:
            names = self.all_names()[0 if self.template == "style" else 1]
            if self.template_name not in names:
                message = (
                    f"there is no {self.template} {self.template_name!r}; there are: {', '.join(names)}."
                )
                yield (
                    ("template_name", "template", "styles", "objects", "classifier"),
                    message + nearest(self.template_name, names),
                )

    def checkpoint(self) -> Path:
        """The file that `ckpt_path` leads to."""
        return checkpoint_file(self.ckpt_path, template=self.template, template_name=self.template_name)

    def _checkpoint_problems(self) -> Iterator[Problem]:
        yield from checkpoint_problems(
            "ckpt_path", self.ckpt_path, template=self.template, template_name=self.template_name
        )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        yield from base_problems(self.base_ckpt_path)
        if self.target_images_dir is not None and not resolve_path(self.target_images_dir).is_dir():
            yield ("target_images_dir",), f"there is no folder {self.target_images_dir}; give one of images"
        if (problem := writable_problem(self.output_dir)) is not None:
            yield ("output_dir",), problem
