"""The keys that mask and training share: which model, which concept, which images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mu.config import Config, nearest, resolve_path, setting
from mu.config_file import ConfigFileError, Text, read_flat_file
from mu.config_values import PACKAGE_PREFIX
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.index import DataError, check_choice, check_folder_names, choose_substitute
from mu.devices import DEVICES_PATTERN
from mu.run_folder import writable_problem

PACKAGED = Path(__file__).parent
"""Folder of the packaged YAML configs, among which `--config_path` looks a name up."""

Problem = tuple[tuple[str, ...], str]

OUTPUTS = "outputs/saliency_unlearning"
SD_CHECKPOINT = "models/compvis/style50/compvis.ckpt"
SD_MODEL_CONFIG = "package:algorithms/saliency_unlearning/configs/model_config.yaml"
EMOJI_CHECKPOINT = "package:assets/emoji_canvas/model.safetensors"
EMOJI_MODEL_CONFIG = "package:assets/emoji_canvas/model_config.yaml"
SAMPLE_PRECISIONS = ("fp32", "bf16")
_MODEL_NAMES = ("model.safetensors", "model.ckpt", "model.pth")
DIFFUSERS_NAME = "diffusers"
"""Folder of the model in the folder of a training run with output_format diffusers."""


@dataclass(frozen=True, kw_only=True)
class ModelKeys(Config):
    """Which model, and where it runs."""

    ckpt_path: str = setting(
        SD_CHECKPOINT,
        "CompVis checkpoint (.ckpt, .pth, .safetensors), a diffusers folder or file, the folder of a training run, or "
        "a folder of runs, whose newest is taken. `package:` before a path means a file of the installed package.",
        kind="path",
    )
    model_config_path: str = setting(
        SD_MODEL_CONFIG,
        "CompVis YAML with the structure of that model; the default is SD v1's. Packaged beside it: sd_v2_base.yaml "
        "(512 px) and sd_v2_v.yaml (768 px).",
        kind="path",
    )
    use_ema: bool = setting(
        False,
        "Take the EMA copy of the UNet in the checkpoint, not its raw weights; an error where it has none.",
    )
    devices: str = setting(
        "0",
        "CUDA device number such as 0, or cpu. Without CUDA the run is on the CPU, and says so.",
        pattern=DEVICES_PATTERN,
    )

    def checkpoint(self) -> Path:
        """The file that `ckpt_path` leads to."""
        return checkpoint_file(self.ckpt_path)

    def _checkpoint_problems(self) -> Iterator[Problem]:
        return checkpoint_problems("ckpt_path", self.ckpt_path)

    def disk_problems(self) -> Iterator[Problem]:
        yield from self._checkpoint_problems()
        if not resolve_path(self.model_config_path).is_file():
            yield (
                ("model_config_path",),
                f"there is no file {self.model_config_path}; for SD v1 leave the key out",
            )


@dataclass(frozen=True, kw_only=True)
class ConceptKeys(ModelKeys):
    """What is forgotten, and the images of it and of what is kept."""

    dataset_type: str = setting(
        "unlearncanvas",
        "unlearncanvas: folders of images, <raw_dataset_dir>/<Style>/<Class>/<n>.jpg. generated: images sampled once "
        "from the model itself for a grid of styles x objects. i2p: not read in this version (refused at once).",
        choices=("unlearncanvas", "generated", "i2p"),
    )
    template: str = setting(
        "style", "Kind of concept that is forgotten (i2p: a category).", choices=("style", "object", "i2p")
    )
    template_name: str = setting(
        "Abstractionism", "Name of the forgotten style or object, as its folder is called.", kind="name"
    )
    substitute: str | None = setting(
        None,
        "What forgotten prompts shall give instead: another style or object by name, or a whole prompt with {object} "
        "or {style}. null: the next style or object of the list (after the last, the first); for a style of "
        "unlearncanvas, the photo.",
    )
    raw_dataset_dir: str | None = setting(
        "data/quick-canvas-dataset/sample", "Folder of the images; not used by generated.", kind="path"
    )
    processed_dataset_dir: str = setting(
        "data/processed", "Folder for sampled images, cached latents and lists of what was used.", kind="path"
    )
    use_sample: bool = setting(
        True,
        "unlearncanvas: take only the first 3 images of each class in each style, as the sample data set has.",
    )
    image_size: int | None = setting(
        None, "Side of the images in pixels; null: what the model was made for.", ge=8, le=4096, multiple_of=8
    )
    styles: tuple[str, ...] | None = setting(
        None, "generated: styles of the grid; null: EmojiCanvas' seven.", kind="name"
    )
    objects: tuple[str, ...] | None = setting(
        None, "generated: objects of the grid; null: EmojiCanvas' twelve.", kind="name"
    )
    images_per_prompt: int = setting(
        5, "generated: images sampled for each forgotten prompt.", ge=1, le=100_000
    )
    retain_images_per_prompt: int = setting(
        2, "generated: images sampled for each retained prompt.", ge=1, le=100_000
    )
    sample_steps: int = setting(50, "generated: DDIM steps of an image.", ge=1, le=1000)
    guidance_scale: float = setting(
        7.5, "generated: classifier-free guidance of sampling; 1 is none.", ge=0, le=100
    )
    sample_precision: str = setting(
        "fp32",
        "generated: arithmetic of sampling; bf16 is faster, its images differ a little and are kept beside the others.",
        choices=SAMPLE_PRECISIONS,
    )
    seed: int = setting(0, "Seed of every random number of the run.", ge=0, lt=2**32)

    def conflicts(self) -> Iterator[Problem]:
        if (self.dataset_type == "i2p") != (self.template == "i2p"):
            yield (
                ("template", "dataset_type"),
                "i2p goes with dataset_type i2p, style and object with the others",
            )
        elif self.dataset_type == "generated":
            yield from self._grid_problems()
        elif self.raw_dataset_dir is None:
            yield (
                ("raw_dataset_dir", "dataset_type"),
                f"dataset_type {self.dataset_type} needs a folder of images",
            )

    def disk_problems(self) -> Iterator[Problem]:
        yield from super().disk_problems()
        if self.dataset_type == "i2p":
            yield ("dataset_type",), "i2p is not read in this version; use unlearncanvas or generated"
        elif self.dataset_type == "unlearncanvas" and self.raw_dataset_dir is not None:
            yield from _canvas_problems(Path(self.raw_dataset_dir), self.template, self.template_name)
        if (problem := writable_problem(self.processed_dataset_dir)) is not None:
            yield ("processed_dataset_dir",), problem

    def _grid_problems(self) -> Iterator[Problem]:
        """Names that the grid of sampled images does not have."""
        names: dict[str, tuple[str, ...]] = {
            "style": self.styles or STYLES,
            "object": self.objects or OBJECTS,
        }
        own = names[self.template]
        try:
            check_folder_names("styles", names["style"])
            check_folder_names("objects", names["object"])
            check_choice("template_name", self.template_name, own)
            following = own[(own.index(self.template_name) + 1) % len(own)]
            choose_substitute(
                self.substitute,
                template=self.template,
                target=self.template_name,
                allowed=own,
                default=following,
            )
        except DataError as error:
            key, _, message = str(error).partition(": ")
            yield (key, "template", "dataset_type", "styles", "objects", "template_name"), message


def checkpoint_file(path: str, *, template: str | None = None, template_name: str | None = None) -> Path:
    """The checkpoint that a key names: a file, the model of a run folder, or of the newest run in a folder of runs.

    With `template` and `template_name`, only runs that forgot that concept count. Nothing is promised of the file's
    existence; see `checkpoint_problems`.
    """
    resolved = resolve_path(path)
    if not resolved.is_dir() or _is_diffusers_folder(resolved):
        return resolved
    if inside := _models_in(resolved):
        return inside[0]
    wanted = {"template": template, "template_name": template_name}
    runs = [folder for folder in resolved.iterdir() if folder.is_dir() and _run_matches(folder, wanted)]
    models = [model for run in runs for model in _models_in(run)[:1]]
    if not models:
        return resolved / _MODEL_NAMES[0]
    return max(models, key=lambda model: (model.stat().st_mtime_ns, str(model)))


def checkpoint_problems(
    key: str, path: str, *, template: str | None = None, template_name: str | None = None
) -> Iterator[Problem]:
    """Why `checkpoint_file` leads to no checkpoint."""
    if is_checkpoint(checkpoint_file(path, template=template, template_name=template_name)):
        return
    if resolve_path(path).is_dir():
        concept = f" that forgot {template} {template_name}" if template_name is not None else ""
        yield (
            (key, "template", "template_name"),
            f"the folder {path} holds neither {', '.join(_MODEL_NAMES)}, a diffusers model nor a finished run"
            f"{concept}; `python -m mu.algorithms.saliency_unlearning.scripts.train` makes one",
        )
    else:
        yield from file_problems(key, path, advice=f"`download_model compvis` puts one at {SD_CHECKPOINT}")


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a file, or a diffusers folder."""
    return path.is_file() or _is_diffusers_folder(path)


def checkpoint_bytes(path: Path) -> int:
    """Size of a checkpoint: of a diffusers folder, the weights of its networks."""
    if not path.is_dir():
        return path.stat().st_size
    weights = [
        file for part in ("unet", "vae", "text_encoder") for file in (path / part).glob("*.safetensors")
    ]
    weights = weights or [
        file for part in ("unet", "vae", "text_encoder") for file in (path / part).glob("*.bin")
    ]
    return sum(file.stat().st_size for file in weights)


def _is_diffusers_folder(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def file_problems(key: str, path: str, *, advice: str) -> Iterator[Problem]:
    """Why no file can be read at `path`."""
    resolved = resolve_path(path)
    if resolved.is_file():
        return
    if path.startswith(PACKAGE_PREFIX):
        yield (key,), f"{resolved} is missing from the installed package; install it again"
    else:
        yield (key,), f"{resolved} is a folder" if resolved.is_dir() else f"there is no file {path}; {advice}"


def _models_in(folder: Path) -> list[Path]:
    return [folder / name for name in (*_MODEL_NAMES, DIFFUSERS_NAME) if is_checkpoint(folder / name)]


def _run_matches(run: Path, wanted: dict[str, str | None]) -> bool:
    """Whether the config saved in a run folder has the wanted values; those that are None do not matter."""
    if all(value is None for value in wanted.values()):
        return True
    try:
        saved = read_flat_file(run / "config.yaml").values
    except ConfigFileError:
        return False
    return all(
        value is None or saved.get(key) in (Text(value), Text(value, True)) for key, value in wanted.items()
    )


def _canvas_problems(root: Path, template: str, name: str) -> Iterator[Problem]:
    """Why a folder has no images of a concept, as far as names of folders tell."""
    if not root.is_dir():
        yield (
            ("raw_dataset_dir",),
            f"there is no folder {root}; `download_data sample quick_canvas` makes data/quick-canvas-dataset/sample",
        )
        return
    styles = [folder for folder in root.iterdir() if folder.is_dir()]
    folders = styles if template == "style" else [inner for style in styles for inner in style.iterdir()]
    names = sorted({folder.name for folder in folders if not folder.name.startswith(".")})
    if names and name not in names:
        listed = ", ".join(names) if len(names) <= 60 else f"{len(names)} others"
        yield (
            ("template_name", "template", "raw_dataset_dir"),
            f"there is no {template} {name!r} in {root}; it has: {listed}.{nearest(name, names)}",
        )
