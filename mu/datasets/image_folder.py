"""Any own images: a folder of those to forget, and another of those to retain.

Prompts are given, one for all images of a folder, or stand beside the images (see `mu.datasets.captions`).
"""

from __future__ import annotations

from pathlib import Path

from mu.datasets.captions import captions
from mu.datasets.image_files import check_folder, find_images, image_problems, no_images, not_read
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
    notes: list[str] = []
    for key, root in roots.items():
        links: list[str] = []
        others: list[Path] = []
        images[key] = find_images(root, root.resolve(), links, others)
        problems += links
        if not images[key] and not links:
            raise DataError(no_images(key, root, others))
        notes += not_read(root, others)
    problems += image_problems((image for found in images.values() for image in found), others=problems)
    raise_problems(
        problems,
        what="files cannot be used",
        advice="Replace or delete them; copy the files that links lead to.",
    )
    texts: dict[Path, str] = {}
    wrong: list[DataError] = []
    prompts = {
        "raw_dataset_dir": ("forget_prompts", forget_prompt),
        "retain_dataset_dir": ("retain_prompts", retain_prompt),
    }
    for name, root in roots.items():
        key, prompt = prompts[name]
        try:
            texts |= captions(root, images[name], prompt=prompt, key=key, notes=notes)
        except DataError as error:
            wrong.append(error)
    if wrong:
        raise DataError("\n".join(map(str, wrong)))
    forget = [
        Row(
            image,
            f"forget/{image.relative_to(forget_root).as_posix()}",
            texts[image],
            style="",
            object="",
            concept=concept,
            substitute_prompt=substitute,
        )
        for image in images["raw_dataset_dir"]
    ]
    retain = [
        Row(
            image,
            f"retain/{image.relative_to(roots['retain_dataset_dir']).as_posix()}",
            texts[image],
            "",
            "",
            concept="retain",
        )
        for image in images.get("retain_dataset_dir", ())
    ]
    check_substitutes(forget)
    rows = ForgetRetain(tuple(forget), tuple(retain), tuple(notes))
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
