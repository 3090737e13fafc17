"""Where data sets, models and classifiers come from, and the folders they belong in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MIRROR_VARIABLE = "UNLEARN_DIFF_MIRROR"
"""Environment variable: a URL or folder that holds `<default folder>.zip` of every source."""
OTHER_SOURCE = "Another source can be given with --url, a link or a file on this machine."
CHECKPOINT_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub; `file` is the one archive that is wanted, None means all files."""

    repo: str
    repo_type: str
    file: str | None = None

    @property
    def text(self) -> str:
        place = f"{self.repo_type}s/{self.repo}" if self.repo_type != "model" else self.repo
        return f"hub:{place}{f'/{self.file}' if self.file else ''}"


@dataclass(frozen=True)
class Drive:
    """A public folder of Google Drive."""

    folder: str

    @property
    def text(self) -> str:
        return f"drive:{self.folder}"


@dataclass(frozen=True)
class Source:
    """One thing that can be fetched.

    `layout` is a regular expression that some file's path below `folder` matches: the folders that an archive
    puts around its content are taken off until one does. `single` is where a checkpoint that comes as a plain
    file goes; None where only archives make sense.
    """

    name: str
    folder: Path
    origin: Hub | Drive
    layout: str
    single: str | None = None

    def fits(self, path: str) -> bool:
        """Whether `path`, relative to the folder, is one of the files that belong there."""
        return re.fullmatch(self.layout, path, flags=re.I) is not None

    @property
    def mirror_name(self) -> str:
        return f"{self.folder.as_posix()}.zip"


SIZES = ("sample", "full")
DATA_ALIASES = {"unlearn_canvas": "quick_canvas"}
"""Other names of data sets."""
_CANVAS = r"[^/]+/[^/]+/[^/]+\.(jpe?g|png|webp)"
_I2P = r"images/[^/]+/[^/]+\.(jpe?g|png|webp)|prompts/[^/]+\.csv"
_WEIGHTS = r"[^/]+\.(ckpt|pth|pt|safetensors)"
_MODELS = "nebulaanish/unlearn_models"

_DATA = (
    Source(
        "sample quick_canvas",
        Path("data/quick-canvas-dataset/sample"),
        Hub("dipeshlav/sample-quick-unlearn-canvas", "dataset", "sample-quick-unlearn-canvas.zip"),
        _CANVAS,
    ),
    Source(
        "full quick_canvas",
        Path("data/quick-canvas-dataset/full"),
        Hub("nebulaanish/quick-canvas-benchmark", "dataset"),
        _CANVAS,
    ),
    Source(
        "sample i2p",
        Path("data/i2p-dataset/sample"),
        Hub("dipeshlav/sample_i2p_dataset", "dataset", "sample.zip"),
        _I2P,
    ),
    Source("full i2p", Path("data/i2p-dataset/full"), Hub("nebulaanish/i2p-dataset", "dataset"), _I2P),
)
DATA = {tuple(source.name.split()): source for source in _DATA}
"""(size, data set) -> source."""

_ALL_MODELS = (
    Source(
        "compvis",
        Path("models/compvis"),
        Hub(_MODELS, "model", "compvis.zip"),
        rf"style50/{_WEIGHTS}",
        single="style50/compvis{suffix}",
    ),
    Source("diffuser", Path("models/diffuser"), Hub(_MODELS, "model", "diffuser.zip"), r"style50/.+"),
    Source(
        "classifier",
        Path("models/classifier_ckpt_path"),
        Drive("1AoazlvDgWgc3bAyHDpqlafqltmn4vm61"),
        _WEIGHTS,
        single="{stem}{suffix}",
    ),
)
MODELS = {source.name: source for source in _ALL_MODELS}
"""Model -> source."""
