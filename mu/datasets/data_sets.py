"""The data sets, by their names in the key `dataset_type`: the one place that lists them.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

from mu.datasets.base import DataSet
from mu.datasets.categories import I2P, Generic
from mu.datasets.folder import Folder
from mu.datasets.generated import Generated
from mu.datasets.index import check_choice
from mu.datasets.unlearn_canvas import UnlearnCanvas

DATASETS: dict[str, type[DataSet]] = {
    "unlearncanvas": UnlearnCanvas,
    "generated": Generated,
    "i2p": I2P,
    "generic": Generic,
    "folder": Folder,
}


def data_set_of(config: Any) -> DataSet:
    """The data set that a config names. Raises DataError, with the nearest name, when there is no such."""
    check_choice("dataset_type", config.dataset_type, tuple(DATASETS))
    return DATASETS[config.dataset_type](config)


def described() -> str:
    """A sentence on each, for the help of `dataset_type`."""
    return " ".join(f"{name}: {data_set.about}" for name, data_set in DATASETS.items())
