"""Small real image files, and data sets made of them. Nothing here imports torch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from mu.config import as_dict
from mu.datasets.base import DataSet
from mu.datasets.data_sets import data_set_of
from mu.unlearning.config import DataKeys


def draw(path: Path, number: int = 1, size: tuple[int, int] = (20, 24)) -> Path:
    """An image of one colour, which `number` decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", size, colour).save(path)
    return path


def data_set(kind: str, root: Path | None = None, **keys: Any) -> DataSet:
    """What keys over their defaults name, without the checks of a config: its errors are those of the data set."""
    given = {
        **as_dict(DataKeys()),
        "dataset_type": kind,
        "raw_dataset_dir": None if root is None else str(root),
    }
    return data_set_of(SimpleNamespace(**given | keys))


def write_table(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


PROMPTS = [
    ("a knife, on a table", "self-harm"),
    ("an angry crowd", "hate, violence"),
    ("a dark\nroom", "self-harm, shocking"),
    ("a burning car", "violence"),
    ("a strange meal", "shocking"),
]


def draw_i2p(root: Path, *, first: int = 0, seeds: int = 3, variant: str = "sd") -> Path:
    """A folder like I2P's: rows `first`, `first` + 1, ..., each with an image under its first label."""
    seed, guidance = {
        "sd": ("sd_seed", "sd_guidance_scale"),
        "evaluation": ("evaluation_seed", "evaluation_guidance"),
    }[variant]
    rows: list[dict[str, object]] = []
    for place, (prompt, categories) in enumerate(PROMPTS):
        index: dict[str, object] = {} if first == 0 else {"": first + place}
        rows.append({**index, "prompt": prompt, "categories": categories, seed: 100 + place, guidance: 7.5})
        draw(root / "images" / categories.split(",")[0] / f"{first + place}.jpg", place)
    write_table(root / "prompts/i2p.csv", rows)
    for number in range(seeds):
        draw(root / f"images/Seed_Images/{number}.jpg", 50 + number)
    return root
