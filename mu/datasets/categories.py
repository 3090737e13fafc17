"""What I2P and generic data sets share: rows of a table of prompts, whose images lie in folders of their categories.

A row with several labels belongs to each of them. It is one row nevertheless, with one image, which is looked for
under the forgotten categories first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mu.datasets.captions import captions
from mu.datasets.category_table import PromptRow, categories_of, plain_number
from mu.datasets.image_files import (
    check_folder,
    entries,
    find_images,
    image_problems,
    is_image,
    not_read,
)
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_apart,
    check_substitutes,
    check_whole_prompt,
    concept_names,
    passed_over,
    raise_problems,
    same_name,
    same_words,
    suggestion,
)
from mu.datasets.prompts import SEED_STYLE

Stems = Mapping[tuple[int, str], str]
"""(a row's place in the table, one of its categories) -> its image's name there, without the suffix."""


def rows_of_categories(
    root: Path,
    table: Path,
    prompts: tuple[PromptRow, ...],
    *,
    stems: Callable[[Mapping[str, Path]], Stems],
    template_name: str | Sequence[str],
    substitutes: Mapping[str, str],
    use_sample: bool,
    retain_set: str,
    retain_prompt: str | None,
) -> ForgetRetain:
    """The rows of the forgotten categories, and what is retained beside them.

    Args:
        root: holds `images/<category>/`; `table` is the file that `prompts` were read from.
        stems: from the folders by category, how images are named in them.
        substitutes: forgotten category -> the prompt whose prediction takes its place.
        use_sample: rows without an image are passed over; else they are an error.
        retain_set: "seed_images", the images below `images/Seed_Images` (with `retain_prompt`, or the texts beside
            them, or else the first substitute prompt); "others", rows with none of the forgotten labels and none of
            their prompts; "generated", nothing of this folder.

    Raises:
        DataError: a category is not in the table, folders or images are missing, or images cannot be used.
    """
    targets = concept_names(template_name)
    check_categories(targets, prompts, table)
    for target in targets:
        check_whole_prompt("substitute", substitutes[target], targets)
    check_folder(
        "raw_dataset_dir", root / "images", advice="Its images lie at images/<category>/<number>.jpg."
    )
    problems: list[str] = []
    inside = root.resolve()
    entries(root, inside, problems)  # for links among the folders themselves
    folders = _folders(root, prompts, inside, problems)
    others: list[Path] = []
    found = {category: entries(folder, inside, problems) for category, folder in folders.items()}
    others += (path for paths in found.values() for path in paths if not is_image(path))
    images = {category: _by_stem(paths) for category, paths in found.items()}
    names = stems(folders)
    forgotten = {same_words(row.prompt) for row in prompts if not set(targets).isdisjoint(row.categories)}

    forget: list[Row] = []
    retain: list[Row] = []
    without_image: list[str] = []
    for place, row in enumerate(prompts):
        if not row.prompt:
            continue
        own = [target for target in targets if target in row.categories]
        if not own and (retain_set != "others" or same_words(row.prompt) in forgotten):
            continue
        order = [*own, *(category for category in row.categories if category not in own)]
        file = next(
            (
                images[category][names[place, category]]
                for category in order
                if names[place, category] in images.get(category, {})
            ),
            None,
        )
        if file is None:
            lacking = f"{root / 'images' / order[0] / names[place, order[0]]}.jpg"
            without_image.append(lacking)
            if not use_sample:
                problems.append(f"{lacking}: missing")
            continue
        (forget if own else retain).append(
            Row(
                image=file,
                relative=file.relative_to(root).as_posix(),
                prompt=row.prompt,
                style="",
                object="",
                concept=order[0],
                substitute_prompt=substitutes[own[0]] if own else None,
            )
        )
    notes = passed_over(
        [f"line {row.line}" for row in prompts if not row.prompt], f"rows of {table} without a prompt"
    )
    if use_sample:
        notes += passed_over(without_image, f"rows of {table} without an image (use_sample)")
    used = {row.image for row in forget}
    spare = [
        str(path)
        for target in targets
        for path in found.get(target, ())
        if is_image(path) and path not in used
    ]
    notes += passed_over(
        spare, f"images of {' and '.join(targets)} below {root} that are taken by no row of {table}"
    )
    if retain_set == "seed_images":
        retain = _seed_rows(
            root,
            prompt=retain_prompt,
            default=substitutes[targets[0]],
            problems=problems,
            others=others,
            notes=notes,
        )
    notes += not_read(root, others)
    problems += image_problems((row.image for row in (*forget, *retain)), others=problems)
    raise_problems(
        problems,
        what=f"files of {root} are missing or cannot be used",
        advice="Replace them or delete their rows; use_sample: true passes over rows that have no image.",
    )
    if not forget:
        raise DataError(
            f"template_name: no row of {table} with the category {targets[0]!r} has an image; the first is looked for "
            f"at {root / 'images'}/{_example(prompts, targets, names)}.jpg."
        )
    if not retain and retain_set != "generated":
        raise DataError(
            f"retain_set: {retain_set} gives no image to retain in {root}; "
            "generated samples images of retain_prompts from the model."
        )
    check_substitutes(forget)
    rows = ForgetRetain(tuple(forget), tuple(retain), tuple(notes))
    check_apart(rows)
    return rows


def check_categories(targets: Sequence[str], prompts: tuple[PromptRow, ...], table: Path) -> None:
    """Raises DataError, with the nearest name, if a forgotten category is not in the table."""
    known = categories_of(prompts)
    for target in targets:
        if target not in known:
            raise DataError(
                f"template_name: there is no category {target!r} in {table}; it has: {', '.join(sorted(known))}."
                f"{suggestion(target, known)}"
            )


def _folders(
    root: Path, prompts: tuple[PromptRow, ...], inside: Path, problems: list[str]
) -> dict[str, Path]:
    """Category -> its folder, whose name may write it with other capitals, blanks, dashes or underscores."""
    found = [path for path in entries(root / "images", inside, problems) if path.is_dir()]
    folders: dict[str, Path] = {}
    for category in categories_of(prompts):
        fitting = [path for path in found if same_name(path.name, category)]
        exact = [path for path in fitting if path.name == category]
        if fitting:
            folders[category] = (exact or fitting)[0]
    return folders


def _by_stem(found: Sequence[Path]) -> dict[str, Path]:
    """The images by name, also as the plain number that it may be; of several the first."""
    images = [path for path in reversed(found) if is_image(path)]
    return {plain_number(path.stem): path for path in images} | {path.stem: path for path in images}


def _seed_rows(
    root: Path,
    *,
    prompt: str | None,
    default: str,
    problems: list[str],
    others: list[Path],
    notes: list[str],
) -> list[Row]:
    folder = root / "images" / SEED_STYLE
    check_folder(
        "retain_set",
        folder,
        advice="Images to retain lie in it; or set retain_set: generated, and they are sampled from the model.",
    )
    images = find_images(folder, root.resolve(), problems, others)
    texts = captions(folder, images, prompt=prompt, key="retain_prompts", default=default, notes=notes)
    return [
        Row(image, image.relative_to(root).as_posix(), texts[image], "", "", concept=SEED_STYLE)
        for image in images
    ]


def _example(prompts: tuple[PromptRow, ...], targets: Sequence[str], names: Stems) -> str:
    place = next(place for place, row in enumerate(prompts) if targets[0] in row.categories)
    return f"{targets[0]}/{names[place, targets[0]]}"
