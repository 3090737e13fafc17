"""Which checkpoint a key means: a file, a diffusers folder, or the model in a folder of runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mu.config import resolve_path
from mu.config_file import PACKAGE_PREFIX, ConfigFileError, Value, read_flat_file
from mu.datasets.base import Problem as Problem
from mu.datasets.index import concept_label, concept_names

PATCH_NAME = "model.patch.safetensors"
"""Name of the patch in the folder of a training run."""
SD_CHECKPOINT = "models/compvis/style50/compvis.ckpt"
_MODEL_NAMES = ("model.safetensors", "model.ckpt", "model.pth")

DIFFUSERS_NAME = "diffusers"
"""Folder of the model in the folder of a training run with output_format diffusers."""


def checkpoint_file(
    path: str, *, template: str | None = None, template_name: str | Sequence[str] | None = None
) -> Path:
    """The checkpoint that a key names: a file, the model of a run folder, or of the newest run in a folder of runs.

    With `template` and `template_name`, only runs that forgot just that concept, or those together, count. Nothing is
    promised of the file's existence; see `checkpoint_problems`.
    """
    resolved = resolve_path(path)
    if not os.path.isdir(resolved) or _is_diffusers_folder(resolved):
        return resolved
    if inside := _models_in(resolved):
        return inside[0]
    runs = [
        folder
        for folder in resolved.glob("*")  # of a folder that may not be read, nothing
        if os.path.isdir(folder) and _run_matches(folder, template, template_name)
    ]
    models = [model for run in runs for model in _models_in(run)[:1]]
    if not models:
        return resolved / _MODEL_NAMES[0]
    return max(models, key=lambda model: (model.stat().st_mtime_ns, str(model)))


def checkpoint_problems(
    key: str, path: str, *, template: str | None = None, template_name: str | Sequence[str] | None = None
) -> Iterator[Problem]:
    """Why `checkpoint_file` leads to no checkpoint."""
    if is_checkpoint(checkpoint_file(path, template=template, template_name=template_name)):
        return
    if (told := _other_folder(resolve_path(path))) is not None:
        yield (key,), f"the folder {path} is {told}"
    elif os.path.isdir(resolve_path(path)):
        concept = (
            f" that forgot {template} {concept_label(template_name)}" if template_name is not None else ""
        )
        yield (
            (key, "template", "template_name"),
            f"the folder {path} holds neither {', '.join(_MODEL_NAMES)}, a diffusers model nor a finished run"
            f"{concept}; `python -m mu.algorithms.saliency_unlearning.scripts.train` makes one",
        )
    else:
        yield from file_problems(key, path, advice=f"`download_model compvis` puts one at {SD_CHECKPOINT}")


def model_config_problems(path: str) -> Iterator[Problem]:
    """Why the key `model_config_path` leads to no YAML of a model."""
    if not resolve_path(path).is_file():
        yield ("model_config_path",), f"there is no file {path}; for SD v1 leave the key out"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a file, or a diffusers folder."""
    return os.path.isfile(path) or _is_diffusers_folder(path)


def model_config_of_run(checkpoint: Path) -> str | None:
    """`model_config_path` of the run that wrote a checkpoint, by the config.yaml beside it; None without one."""
    try:
        saved = read_flat_file(checkpoint.parent / "config.yaml").values.get("model_config_path")
    except ConfigFileError:
        return None
    return None if saved is None or isinstance(saved, list) or saved.is_null else str(saved)


def checkpoint_bytes(path: Path) -> int:
    """Size of a checkpoint: of a diffusers folder, the weights of its networks."""
    if not os.path.isdir(path):
        return path.stat().st_size
    weights = [
        file for part in ("unet", "vae", "text_encoder") for file in (path / part).glob("*.safetensors")
    ]
    weights = weights or [
        file for part in ("unet", "vae", "text_encoder") for file in (path / part).glob("*.bin")
    ]
    return sum(file.stat().st_size for file in weights)


def _is_diffusers_folder(path: Path) -> bool:
    return os.path.isfile(path / "model_index.json")


def _other_folder(path: Path) -> str | None:
    """What a folder of another program is, with advice; None for what is not known."""
    if (
        os.path.isdir(path)
        and _is_diffusers_folder(path.absolute().parent)
        and os.path.isfile(path / "config.json")
    ):
        return f"one network of a diffusers model; give the folder above it, {path.absolute().parent}"
    if os.path.isfile(path / "adapter_config.json") or os.path.isfile(
        path / "pytorch_lora_weights.safetensors"
    ):
        return (
            "a LoRA, small changes to a model and not the model; merge it into its base first (diffusers: "
            "pipe.load_lora_weights(...), pipe.fuse_lora(), pipe.save_pretrained(...)) and give the merged model"
        )
    try:
        network = json.loads((path / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return (
        f"a {network} alone, one network of a diffusers model; give a whole diffusers folder, with model_index.json"
        + (
            ", or complete the file in it: unlearn_diff convert FILE whole.safetensors --base_ckpt_path MODEL"
            if network == "UNet2DConditionModel"
            else ""
        )
    )


def file_problems(key: str, path: str, *, advice: str) -> Iterator[Problem]:
    """Why no file can be read at `path`."""
    resolved = resolve_path(path)
    if os.path.isfile(resolved):
        return
    if path.startswith(PACKAGE_PREFIX):
        yield (key,), f"{resolved} is missing from the installed package; install it again"
    else:
        yield (key,), f"{absence(resolved, path)}; {advice}"


def absence(resolved: Path, path: str) -> str:
    """What is at the path of a file that cannot be read: a folder, a link to nowhere, something else, or nothing."""
    if os.path.isdir(resolved):
        return f"{resolved} is a folder, not a file"
    if os.path.islink(resolved) and not os.path.exists(resolved):
        return f"{path} is a link to {os.readlink(resolved)}, which is not there"
    return f"there is no file {path}"


def _models_in(folder: Path) -> list[Path]:
    return [folder / name for name in (*_MODEL_NAMES, DIFFUSERS_NAME) if is_checkpoint(folder / name)]


def _run_matches(run: Path, template: str | None, template_name: str | Sequence[str] | None) -> bool:
    if template is None and template_name is None:
        return True
    try:
        saved = read_flat_file(run / "config.yaml").values
    except ConfigFileError:
        return False
    return (template is None or _words(saved.get("template")) == {template}) and (
        template_name is None or _words(saved.get("template_name")) == set(concept_names(template_name))
    )


def _words(value: Value | None) -> set[str]:
    if value is None:
        return set()
    return {str(text) for text in (value if isinstance(value, list) else [value])}
