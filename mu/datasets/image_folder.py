"""Any own images: a folder of those to forget, and another of those to retain.

Prompts are given, one for all images of a folder, or stand beside the images (see `mu.datasets.captions`).
"""

from __future__ import annotations

from pathlib import Path

from mu.datasets.captions import captions
from mu.datasets.image_files import SUFFIXES, check_folder, find_images, image_problems
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_apart,
    check_substitutes,
    check_whole_prompt,
    raise_problems,
)


def index(
    forget_root: Path | str,
    retain_root: Path | str | None,
    *,
    concept: str,
    substitute: str,
    forget_prompt: str | None = None,
    retain_prompt: str | None = None,
) -> ForgetRetain:
    """The images of two folders, with those in folders below them.

    Args:
        retain_root: None: nothing is retained from a folder.
        concept: what the images to forget show, in a word.
        substitute: the prompt whose prediction takes the place of the forgotten ones.
        forget_prompt, retain_prompt: the prompt of all images of the folder; None: it stands beside each.

    Raises:
        DataError: a folder is missing, has no images, or is a part of the other; images that cannot be used (all of
            them in one message); images without a prompt; a prompt that is to be forgotten and to be retained.
    """
    check_whole_prompt("substitute", substitute, (concept,))
    roots = {"raw_dataset_dir": Path(forget_root)}
    if retain_root is not None:
        roots["retain_dataset_dir"] = Path(retain_root)
    for key, root in roots.items():
        check_folder(key, root, advice="Any folder of images will do.")
    _check_separate(list(roots.values()))

    images: dict[str, list[Path]] = {}
    problems: list[str] = []
    for key, root in roots.items():
        links: list[str] = []
        images[key] = find_images(root, root.resolve(), links)
        problems += links
        if not images[key] and not links:
            raise DataError(f"{key}: {root} holds no images ({', '.join(SUFFIXES)}).")
    problems += image_problems((image for found in images.values() for image in found), others=problems)
    raise_problems(
        problems,
        what="files cannot be used",
        advice="Replace or delete them; copy the files that links lead to.",
    )
    forget_texts = captions(
        roots["raw_dataset_dir"], images["raw_dataset_dir"], prompt=forget_prompt, key="forget_prompts"
    )
    forget = [
        Row(
            image,
            f"forget/{image.relative_to(forget_root).as_posix()}",
            text,
            style="",
            object="",
            concept=concept,
            substitute_prompt=substitute,
        )
        for image, text in forget_texts.items()
    ]
    retain: list[Row] = []
    if retain_root is not None:
        texts = captions(
            Path(retain_root), images["retain_dataset_dir"], prompt=retain_prompt, key="retain_prompts"
        )
        retain = [
            Row(image, f"retain/{image.relative_to(retain_root).as_posix()}", text, "", "", concept="retain")
            for image, text in texts.items()
        ]
    check_substitutes(forget)
    rows = ForgetRetain(tuple(forget), tuple(retain))
    check_apart(rows)
    return rows


def _check_separate(roots: list[Path]) -> None:
    """A folder within the other would be forgotten (retained) with it."""
    if len(roots) < 2:
        return
    forget, retain = (root.resolve() for root in roots)
    if forget.is_relative_to(retain) or retain.is_relative_to(forget):
        raise DataError(
            f"retain_dataset_dir: {roots[1]} and raw_dataset_dir {roots[0]} must not be the same folder, nor one "
            "within the other."
        )
