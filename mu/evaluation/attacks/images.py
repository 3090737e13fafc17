"""The images that an attack learns from: drawn by the base of the concept's own prompts, or a user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mu.config import resolve_path
from mu.datasets.canvas import canvas_prompt, style_words
from mu.datasets.generated_images import GeneratedImages
from mu.datasets.index import Row
from mu.datasets.latents import LatentCache
from mu.evaluation.asked_images import any_images, folder_images, has_concepts
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.classifiers import Classifier
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.unlearning.batches import EncodedRows


def concept_rows(
    config: AttackConfig, seeds: Sequence[int], folder: Path, *, called: str | None = None
) -> list[Row]:
    """A row for each prompt of the concept and each seed, as `GeneratedImages` keeps them in a folder.

    Args:
        called: another name for the concept, in the prompts alone.
    """
    rows = []
    for style, object in config.cells():
        words = {config.template: called or config.template_name, config.other: object}
        if config.template == "object":
            words["style"] = style
        prompt = canvas_prompt(words["object"], words["style"])
        for seed in seeds:
            relative = f"{style}/{object}/{seed}.png"
            rows.append(Row(folder / relative, relative, prompt, style, object, style))
    return rows


def drawn_targets(config: AttackConfig, images: GeneratedImages) -> list[Row]:
    """The target images that the base draws, sampled where they are missing."""
    rows = concept_rows(config, config.target_seeds, images.path)
    images.sample_missing(rows, batch_size=config.batch_size, of="to learn from")
    return rows


def given_targets(config: AttackConfig, classifier: Classifier) -> list[Row]:
    """The user's own images: with the prompts of their folders, or all with a prompt that names the concept alone.

    Raises DataError for a folder without images of the concept, or with files that cannot be read.
    """
    assert config.target_images_dir is not None
    key, folder = "target_images_dir", resolve_path(config.target_images_dir)
    styles, objects, own = classifier.styles, classifier.objects, (config.template_name,)
    if has_concepts(folder, styles, objects):
        found = folder_images(
            key,
            folder,
            styles=styles,
            objects=objects,
            chosen_styles=own if config.template == "style" else None,
            chosen_objects=own if config.template == "object" else None,
        )
        return [
            Row(one.path, f"{one.style}/{one.object}/{one.path.name}", one.prompt, one.style, one.object, one.style)
            for one in found
        ]  # fmt: skip
    style, object = (config.template_name, "") if config.template == "style" else ("", config.template_name)
    prompt = f"An image in {style_words(style)} style." if style else f"A {object.replace('_', ' ')} image."
    return [
        Row(image.path, image.path.relative_to(folder).as_posix(), prompt, style, object, style)
        for image in any_images(key, folder)
    ]


def encoded(rows: Sequence[Row], model: LatentDiffusion, folder: Path) -> EncodedRows:
    """Their latents, kept below `folder`."""
    cache = LatentCache(model, folder / "latents", image_size=model.image_size)
    mean, logvar = cache.moments(rows)
    slots = {place: place for place in range(len(rows))}
    return EncodedRows(tuple(rows), slots, mean, logvar, {}, model.scale_factor)


def digest_of(rows: Sequence[Row]) -> str:
    """Of names, prompts and bytes of images."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.key}\n".encode())
        digest.update(hashlib.sha256(row.image.read_bytes()).digest())
    return digest.hexdigest()
