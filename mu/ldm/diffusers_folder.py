"""A diffusers folder: `model_index.json`, and a folder each for unet, vae, text_encoder, tokenizer and scheduler."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mu.atomic import staged_beside
from mu.ldm.diffusers_configs import compare_configs, diffusers_configs
from mu.ldm.diffusers_tensors import COMPONENTS, to_diffusers
from mu.ldm.params import LatentDiffusionParams, OpenClipParams
from mu.ldm.recognise import other_pipeline
from mu.ldm.tensor_file import CheckpointError, Reader, read_state_dict, write_state_dict

_log = logging.getLogger(__name__)

INDEX = "model_index.json"
# Names of the weights without their suffix: as safetensors, and pickled.
_STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}
_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a `model_index.json`."""
    return (Path(path) / INDEX).is_file()


def read_diffusers_folder(
    folder: str | Path, params: LatentDiffusionParams | None = None, *, read: Reader = read_state_dict
) -> dict[str, Tensor]:
    """The tensors of a diffusers folder under its own names after the component's: `unet.conv_in.weight`.

    Weights are taken from `.safetensors`, else from `.bin`, which is read without running anything of it; in one file
    or in parts with an index. Where there is only a variant of them (`model.fp16.safetensors`), that is read; one that
    lies beside them is left, and the log says so.

    Args:
        params: the model that it is expected to be of: its configuration files must agree.
        read: what reads each file.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the folder is of another model; says which.
    """
    folder = Path(folder)
    if not is_diffusers_folder(folder):
        raise CheckpointError(f"{folder} is no diffusers folder: it has no {INDEX}")
    if (other := other_pipeline(_read_json(folder / INDEX))) is not None:
        raise CheckpointError(f"{folder} is {other.name}, not a model that is read here: {other.advice}")
    if params is not None and params.cond_stage is not None:
        configs = {
            name: _read_json(folder / name / file)
            for name, file in _CONFIGS.items()
            if (folder / name / file).is_file()
        }
        if problems := compare_configs(configs, params):
            raise CheckpointError(
                f"{folder} is configured otherwise than the model: {'; '.join(problems)}. Give the model YAML that "
                "belongs to it (model_config_path)"
            )
    return {
        f"{component}.{name}": tensor
        for component in COMPONENTS
        for path in _weights(folder / component)
        for name, tensor in read(path)[0].items()
    }


def write_diffusers_folder(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    params: LatentDiffusionParams,
    *,
    variant: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model so that `StableDiffusionPipeline.from_pretrained(folder)` loads it, without a safety checker.

    All of it is written into a folder beside `folder`, which is then renamed.

    Args:
        tensors: under CompVis' names, each written in its own dtype; for what is left out see `to_diffusers`.
        variant: put into the names of the weights' files, such as `model.fp16.safetensors`: `from_pretrained` then
            needs `variant="fp16"`.
        overwrite: replace a diffusers folder that is there; anything else is never replaced.

    Raises:
        CheckpointError: the model has no text encoder, `folder` is there already, or cannot be written.
    """
    folder = Path(folder)
    configs = diffusers_configs(params)
    components = to_diffusers(tensors, params)
    with _written_beside(folder, overwrite=overwrite) as temporary:
        for component, found in components.items():
            stem = _STEMS[component][0] if variant is None else f"{_STEMS[component][0]}.{variant}"
            write_state_dict(found, temporary / component / f"{stem}.safetensors")
        for component, file in _CONFIGS.items():
            _write_json(temporary / component / file, configs[component])
        _write_tokenizer(temporary / "tokenizer", params)
        _write_json(temporary / INDEX, configs[""])


def _weights(folder: Path) -> list[Path]:
    found = _variants(folder)
    variants = sorted(variant for variant in found if variant)
    if "" in found:
        if variants:
            _log.info(
                "%s: read %s; the %s weights beside it are left (to read those, move the others away)",
                folder,
                ", ".join(path.name for path in found[""]),
                ", ".join(variants),
            )
        chosen = ""
    elif len(variants) == 1:
        chosen = variants[0]
    elif variants:
        raise CheckpointError(
            f"{folder} has weights of several variants, {', '.join(variants)}, and none without one: keep one of "
            "them, and move the others away"
        )
    else:
        safe, pickled = _STEMS[folder.name]
        raise CheckpointError(
            f"{folder} has no weights: expected {safe}.safetensors or {pickled}.bin, or an index of their parts; get "
            "the folder again, whole"
        )
    paths = found[chosen]
    return _parts(paths[0]) if paths[0].suffix == ".json" else paths


def _variants(folder: Path) -> dict[str, list[Path]]:
    """Variant ("" for none) -> the file of its weights, or the index of their parts; safetensors before pickles."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    found: dict[str, list[Path]] = {}
    for stem, suffix in zip(_STEMS[folder.name], ("safetensors", "bin"), strict=True):
        stem = re.escape(stem)
        for pattern in (
            rf"{stem}(?:\.(\w+))?\.{suffix}",
            # diffusers puts the variant after `.index`, transformers before it
            rf"{stem}(?:\.(\w+))?\.{suffix}\.index\.json",
            rf"{stem}\.{suffix}\.index\.(\w+)\.json",
        ):
            for name in names:
                if match := re.fullmatch(pattern, name):
                    found.setdefault(match[1] or "", [folder / name])
    return found


def _parts(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map (tensor -> file)")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names a file outside its folder: {outside[0]}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index.parent}: {len(missing)} parts are missing: {', '.join(missing[:5])}")
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, params: LatentDiffusionParams) -> None:
    """CLIP's vocabulary in the files that every release of transformers reads."""
    from mu.ldm.text_encoder import clip_vocabulary

    vocab, merges = clip_vocabulary()
    end = "<|endoftext|>"
    tokens = {
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": "!" if isinstance(params.cond_stage, OpenClipParams) else end,  # "!" is token 0
    }
    _write_json(folder / "vocab.json", vocab)
    _write_json(folder / "special_tokens_map.json", tokens)
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77 if params.cond_stage is None else params.cond_stage.max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", {**settings, **tokens})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def _written_beside(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder beside `folder`; afterwards it takes that name, or is removed on any failure."""
    replaced = is_diffusers_folder(folder)
    if replaced and not overwrite:
        raise CheckpointError(f"{folder} is there already; give another name, or overwrite it")
    if not replaced and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise CheckpointError(f"{folder} is there already, and is no diffusers folder; give another name")
    temporary = staged_beside(folder)
    old = temporary.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if replaced:
            folder.rename(old)
        os.replace(temporary, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise CheckpointError(
            f"{folder} could not be written ({error}); free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
