"""I2P and tables like it: rows of prompts with categories, whose images lie in folders of their categories.

A row with several labels belongs to each of them. It is one row nevertheless, with one image, which is looked for
under the forgotten categories first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mu.config_names import nearest
from mu.datasets.base import DataSet, Problem
from mu.datasets.canvas import SEED_STYLE
from mu.datasets.folder import captions
from mu.datasets.image_files import check_folder, entries, find_images, image_problems, is_image, not_read
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_whole_prompt,
    passed_over,
    raise_problems,
    same_name,
    same_words,
)
from mu.datasets.prompt_table import (
    CASE_NUMBERS,
    PromptRow,
    categories_of,
    plain_number,
    read_category_table,
)

Stems = Mapping[tuple[int, str], str]
"""(a row's place in the table, one of its categories) -> its image's name there, without the suffix."""
Prompts = tuple[PromptRow, ...]
SUBSTITUTES: Mapping[str, str] = MappingProxyType(
    {
        "hate": "a photo of people greeting each other",
        "harassment": "a photo of friends talking",
        "violence": "a photo of people in a park",
        "self-harm": "a photo of a healthy person",
        "sexual": "a photo of a person wearing clothes",
        "shocking": "a photo of a calm landscape",
        "illegal activity": "a photo of people at work",
    }
)
"""Category of I2P -> what its prompts shall give instead. That of "sexual" is of SalUn's authors (Fan et al., 2024);
the others are chosen in its manner."""


class CategoryTable(DataSet):
    """What both kinds share; each says which table is read, and how images are named."""

    captioned = ("seed_images",)

    def table(self, root: Path) -> tuple[Path, Prompts, list[str]]:
        """The file, its rows, and notes on what else is there. Raises DataError."""
        raise NotImplementedError

    def stems(self, prompts: Prompts, folders: Mapping[str, Path]) -> Stems:
        """How the images of the rows are named in the folders by category."""
        raise NotImplementedError

    def substitute_for(self, category: str) -> str:
        """The prompt whose prediction takes the place of a category's. Raises DataError."""
        del category
        return str(self.config.substitute)

    def no_missing_images(self) -> Iterator[Problem]:
        yield from ()

    def read(self) -> ForgetRetain:
        """The rows of the forgotten categories, and what is retained beside them.

        With `retain_set` "seed_images", these are the images below `images/Seed_Images` (with `retain_prompts`, or the
        texts beside them, or else the first substitute prompt); with "others", the rows with none of the forgotten
        labels and none of their prompts.

        Raises:
            DataError: a category is not in the table, folders or images are missing, or images cannot be used.
        """
        root, targets, retain_set = Path(self.config.raw_dataset_dir), self.targets, self.retain_set

        # 1. The table.
        table, prompts, more_notes = self.table(root)
        known = categories_of(prompts)
        for target in targets:
            if target not in known:
                raise DataError(
                    f"template_name: there is no category {target!r} in {table}; it has: {', '.join(sorted(known))}."
                    f"{nearest(target, known)}"
                )
        substitutes = {target: self.substitute_for(target) for target in targets}
        for substitute in substitutes.values():
            check_whole_prompt("substitute", substitute, targets)

        # 2. The folders of its categories, and the images in them.
        check_folder(
            "raw_dataset_dir", root / "images", advice="Its images lie at images/<category>/<number>.jpg."
        )
        problems: list[str] = []
        inside = root.resolve()
        entries(root, inside, problems)  # for links among the folders themselves
        folders = _folders(root, known, inside, problems)
        found = {category: entries(folder, inside, problems) for category, folder in folders.items()}
        others = [path for paths in found.values() for path in paths if not is_image(path)]
        images = {category: _by_stem(paths) for category, paths in found.items()}
        names = self.stems(prompts, folders)

        # 3. Each row with its image.
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
            files = (images.get(category, {}).get(names[place, category]) for category in order)
            file = next((path for path in files if path is not None), None)
            if file is None:
                without_image.append(f"{root / 'images' / order[0] / names[place, order[0]]}.jpg")
                continue
            stands_in = substitutes[own[0]] if own else None
            relative = file.relative_to(root).as_posix()
            (forget if own else retain).append(
                Row(file, relative, row.prompt, "", "", concept=order[0], substitute_prompt=stands_in)
            )

        # 4. What is no row.
        notes = passed_over(
            [f"line {row.line}" for row in prompts if not row.prompt], f"rows of {table} without a prompt"
        )
        if self.config.missing_images == "error":
            problems += [f"{path}: missing" for path in without_image]
        else:
            notes += passed_over(without_image, f"rows of {table} without an image (missing_images: skip)")
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
            retain = self._seed_rows(root, substitutes[targets[0]], problems, others, notes)
        notes += not_read(root, others)
        problems += image_problems((row.image for row in (*forget, *retain)), others=problems)
        raise_problems(
            problems,
            what=f"files of {root} are missing or cannot be used",
            advice="Replace them or delete their rows; missing_images: skip passes over rows that have no image.",
        )
        if not forget:
            place = next(place for place, row in enumerate(prompts) if targets[0] in row.categories)
            raise DataError(
                f"template_name: no row of {table} with the category {targets[0]!r} has an image; the first is looked "
                f"for at {root / 'images' / targets[0] / names[place, targets[0]]}.jpg."
            )
        if not retain and retain_set != "generated":
            raise DataError(
                f"retain_set: {retain_set} gives no image to retain in {root}; "
                "generated samples images of retain_prompts from the model."
            )
        return ForgetRetain(tuple(forget), tuple(retain), (*notes, *more_notes))

    def _seed_rows(
        self, root: Path, default: str, problems: list[str], others: list[Path], notes: list[str]
    ) -> list[Row]:
        """The images to retain below Seed_Images; without any text beside them, their prompt is `default`."""
        folder = root / "images" / SEED_STYLE
        check_folder(
            "retain_set",
            folder,
            advice="Images to retain lie in it; or set retain_set: generated, and they are sampled from the model.",
        )
        images = find_images(folder, root.resolve(), problems, others)
        given = self.config.retain_prompts
        prompt = None if given is None else given[0]
        texts = captions(folder, images, prompt=prompt, key="retain_prompts", default=default, notes=notes)
        return [
            Row(image, image.relative_to(root).as_posix(), texts[image], "", "", concept=SEED_STYLE)
            for image in images
        ]


class I2P(CategoryTable):
    """Inappropriate image prompts: the table is `prompts/i2p.csv`, and images lie at `images/<category>/<index>.jpg`.

    `<index>` is the table's column `case_number`, else `image_id`, else its unnamed first column, else the row's place
    from 0. Source: Schramowski et al., Safe Latent Diffusion, CVPR 2023 (arXiv 2211.05105).
    """

    about = "prompts/i2p.csv and images/<category>/<index>.jpg."
    templates = ("i2p",)
    retain_sets = ("seed_images", "others", "generated")

    def table(self, root: Path) -> tuple[Path, Prompts, list[str]]:
        check_folder("raw_dataset_dir", root, advice="Download it with `download_data sample i2p`.")
        table = root / "prompts/i2p.csv"
        if not table.is_file():
            raise DataError(
                f"raw_dataset_dir: there is no prompts/i2p.csv in {root}; `download_data sample i2p` makes such a "
                "folder."
            )
        if table.is_symlink():
            raise DataError(f"raw_dataset_dir: {table} is a link; copy the file that it leads to")
        return table, read_category_table(table), []

    def stems(self, prompts: Prompts, folders: Mapping[str, Path]) -> Stems:
        del folders
        return {
            (place, category): str(place) if row.number is None else row.number
            for place, row in enumerate(prompts)
            for category in row.categories
        }

    def substitute_for(self, category: str) -> str:
        if self.config.substitute is not None:
            return str(self.config.substitute)
        if category not in SUBSTITUTES:
            raise DataError(
                f"substitute: {category!r} is none of I2P's categories ({', '.join(SUBSTITUTES)}); "
                "say in a prompt what its prompts shall give instead."
            )
        return SUBSTITUTES[category]

    def retain_prompts_problems(self) -> Iterator[Problem]:
        if self.config.retain_prompts is not None:  # null: the substitutes
            yield from super().retain_prompts_problems()

    def retained_prompts(self) -> tuple[str, ...]:
        given = super().retained_prompts()
        return given or tuple(dict.fromkeys(map(self.substitute_for, self.targets)))


class Generic(CategoryTable):
    """Any prompts with categories: the first `prompts/*.csv`, and `images/<category>/<running number>.jpg`.

    The running number counts a category's rows in the table's order: from 0 where the folder has a `0.jpg` (or
    `000.jpg`), else from 1. Where the table has a column `case_number` (or `image_id`), that number names the image
    instead.
    """

    about = "prompts/<any>.csv (prompt,categories) and images/<category>/<number>.jpg."
    retain_sets = ("others", "seed_images", "generated")

    def key_problems(self) -> Iterator[Problem]:
        yield from super().key_problems()
        if self.config.substitute is None:
            message = "say in a whole prompt what the forgotten prompts shall give instead"
            yield ("substitute", "dataset_type", "retain_prompts"), message

    def table(self, root: Path) -> tuple[Path, Prompts, list[str]]:
        advice = (
            "It holds prompts/<any name>.csv (prompt,categories) and images/<category>/<running number>.jpg."
        )
        check_folder("raw_dataset_dir", root, advice=advice)
        links: list[str] = []
        found = entries(root / "prompts", root.resolve(), links) if (root / "prompts").is_dir() else []
        tables = [path for path in found if path.suffix.lower() == ".csv" and path.is_file()]
        raise_problems(
            links, what=f"entries of {root / 'prompts'} are links", advice="Copy what they lead to."
        )
        if not tables:
            raise DataError(f"raw_dataset_dir: there is no prompts/*.csv in {root}. {advice}")
        more = passed_over([str(path) for path in tables[1:]], f"tables beside {tables[0]}")
        return tables[0], read_category_table(tables[0], numbers=CASE_NUMBERS), more

    def stems(self, prompts: Prompts, folders: Mapping[str, Path]) -> Stems:
        count = {
            category: 0
            if any(is_image(path) and plain_number(path.stem) == "0" for path in folder.iterdir())
            else 1
            for category, folder in folders.items()
        }
        named: dict[tuple[int, str], str] = {}
        for place, row in enumerate(prompts):
            for category in row.categories:
                number = count.get(category, 1)
                named[place, category] = str(number) if row.number is None else row.number
                count[category] = number + 1
        return named


def _folders(root: Path, known: Sequence[str], inside: Path, problems: list[str]) -> dict[str, Path]:
    """Category -> its folder, whose name may write it with other capitals, blanks, dashes or underscores."""
    found = [path for path in entries(root / "images", inside, problems) if path.is_dir()]
    folders: dict[str, Path] = {}
    for category in known:
        fitting = [path for path in found if same_name(path.name, category)]
        exact = [path for path in fitting if path.name == category]
        if fitting:
            folders[category] = (exact or fitting)[0]
    return folders


def _by_stem(found: Sequence[Path]) -> dict[str, Path]:
    """The images by name, also as the plain number that it may be; of several the first."""
    images = [path for path in reversed(found) if is_image(path)]
    return {plain_number(path.stem): path for path in images} | {path.stem: path for path in images}
