"""I2P, inappropriate image prompts: `prompts/i2p.csv`, and images at `images/<category>/<index>.jpg`.

Source: Schramowski et al., Safe Latent Diffusion, CVPR 2023 (arXiv 2211.05105). The substitute for "sexual" is that of
SalUn's authors (Fan et al., 2024); the others are chosen in its manner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mu.datasets.categories import Stems, check_categories, rows_of_categories
from mu.datasets.category_table import read_category_table
from mu.datasets.image_files import check_folder
from mu.datasets.index import DataError, ForgetRetain, concept_names

TABLE = "prompts/i2p.csv"
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
"""Category -> what its prompts shall give instead, unless `substitute` says otherwise."""


def index(
    root: Path | str,
    *,
    template_name: str | Sequence[str],
    use_sample: bool = False,
    substitute: str | None = None,
    retain_set: str = "seed_images",
    retain_prompt: str | None = None,
) -> ForgetRetain:
    """The rows of a folder: those with the label `template_name` to forget, with the table's prompts.

    `<index>` is the table's column `case_number`, else `image_id`, else its unnamed first column, else the row's place
    from 0. See `rows_of_categories` for the arguments and errors.

    Args:
        template_name: a category of the table, e.g. "self-harm", or several.
        substitute: one prompt for all rows; None: that of `SUBSTITUTES`.
    """
    root = Path(root)
    check_folder("raw_dataset_dir", root, advice="Download it with `download_data sample i2p`.")
    table = root / TABLE
    if not table.is_file():
        raise DataError(
            f"raw_dataset_dir: there is no {TABLE} in {root}; `download_data sample i2p` makes such a folder."
        )
    if table.is_symlink():
        raise DataError(f"raw_dataset_dir: {table} is a link; copy the file that it leads to")
    prompts = read_category_table(table)
    check_categories(concept_names(template_name), prompts, table)

    def stems(_: Mapping[str, Path]) -> Stems:
        return {
            (place, category): str(place) if row.number is None else row.number
            for place, row in enumerate(prompts)
            for category in row.categories
        }

    return rows_of_categories(
        root,
        table,
        prompts,
        stems=stems,
        template_name=template_name,
        substitutes={name: substitute_for(name, substitute) for name in concept_names(template_name)},
        use_sample=use_sample,
        retain_set=retain_set,
        retain_prompt=retain_prompt,
    )


def substitute_for(category: str, substitute: str | None) -> str:
    """`substitute`, or the category's own. Raises DataError for a category that has none."""
    if substitute is not None:
        return substitute
    if category not in SUBSTITUTES:
        raise DataError(
            f"substitute: {category!r} is none of I2P's categories ({', '.join(SUBSTITUTES)}); "
            "say in a prompt what its prompts shall give instead."
        )
    return SUBSTITUTES[category]
