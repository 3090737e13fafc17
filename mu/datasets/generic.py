"""Any prompts with categories: the first `prompts/*.csv`, and images at `images/<category>/<running number>.jpg`.

The running number counts a category's rows in the table's order: from 0 where the folder has a `0.jpg` (or
`000.jpg`), else from 1.
Where the table has a column `case_number` (or `image_id`), that number names the image instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mu.datasets.categories import Stems, rows_of_categories
from mu.datasets.category_table import CASE_NUMBERS, plain_number, read_category_table
from mu.datasets.image_files import check_folder, entries, is_image
from mu.datasets.index import DataError, ForgetRetain, concept_names, passed_over, raise_problems


def index(
    root: Path | str,
    *,
    template_name: str | Sequence[str],
    substitute: str,
    use_sample: bool = False,
    retain_set: str = "others",
    retain_prompt: str | None = None,
) -> ForgetRetain:
    """The rows of a folder: those of the category `template_name` to forget.

    `rows_of_categories` describes the other arguments and the errors.

    Args:
        template_name: a category of the table, or several.
        substitute: the prompt whose prediction takes the place of the forgotten ones.
    """
    root = Path(root)
    advice = "It holds prompts/<any name>.csv (prompt,categories) and images/<category>/<running number>.jpg."
    check_folder("raw_dataset_dir", root, advice=advice)
    links: list[str] = []
    found = entries(root / "prompts", root.resolve(), links) if (root / "prompts").is_dir() else []
    tables = [path for path in found if path.suffix.lower() == ".csv" and path.is_file()]
    raise_problems(links, what=f"entries of {root / 'prompts'} are links", advice="Copy what they lead to.")
    if not tables:
        raise DataError(f"raw_dataset_dir: there is no prompts/*.csv in {root}. {advice}")
    table = tables[0]
    prompts = read_category_table(table, numbers=CASE_NUMBERS)

    def stems(folders: Mapping[str, Path]) -> Stems:
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

    rows = rows_of_categories(
        root,
        table,
        prompts,
        stems=stems,
        template_name=template_name,
        substitutes=dict.fromkeys(concept_names(template_name), substitute),
        use_sample=use_sample,
        retain_set=retain_set,
        retain_prompt=retain_prompt,
    )
    more = passed_over([str(path) for path in tables[1:]], f"tables beside {table}")
    return replace(rows, notes=(*rows.notes, *more))
