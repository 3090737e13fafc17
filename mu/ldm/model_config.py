"""Read a CompVis model YAML into one frozen dataclass per network.

`target` entries are looked up in a fixed table and never imported. An option that would change the network in a way
that is not built here is refused by name instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from mu.errors import MuError
from mu.ldm.params import (
    AutoencoderParams,
    LatentDiffusionParams,
    OpenClipParams,
    TextEncoderParams,
    UNetParams,
    structure_problems,
)

UNCONDITIONAL = "__is_unconditional__"
PARAMETERIZATIONS = ("eps", "v")

# Last part of `target` -> role. The package in front (`ldm.…`, `stable_diffusion.ldm.…`) differs between forks.
_TARGETS = {
    "model": {"LatentDiffusion"},
    "unet_config": {"UNetModel"},
    "first_stage_config": {"AutoencoderKL"},
    "cond_stage_config": {"FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder"},
}


# Last part of a target -> what such a model is.
_OTHER_MODELS = {
    "LatentInpaintDiffusion": "an inpainting model",
    "LatentFinetuneDiffusion": "a model that is given another image beside the prompt",
    "LatentDepth2ImageDiffusion": "a depth model",
    "LatentUpscaleDiffusion": "an upscaler",
    "LatentUpscaleFinetuneDiffusion": "an upscaler",
    "ImageEmbeddingConditionedLatentDiffusion": "a model that is conditioned on images (unCLIP)",
    "DiffusionEngine": "a model of Stability AI's `sgm`, such as SDXL",
    "ControlLDM": "a ControlNet",
    "VQModelInterface": "a model with a vector-quantised autoencoder",
}
_READ_HERE = (
    "read are Stable Diffusion v1 and v2 and text-to-image models of their structure; for those leave "
    "model_config_path out, or give sd_v2_base.yaml or sd_v2_v.yaml"
)


class ModelConfigError(MuError, ValueError):
    """A model YAML is missing, malformed, or asks for something that is not built here."""

    exit_code = 2


# Options that may stand in a YAML without changing the network or its use here.
_HARMLESS = {
    "model": {
        *("first_stage_key", "cond_stage_key", "channels", "cond_stage_trainable", "num_timesteps_cond"),
        *("log_every_t", "monitor", "use_ema", "scheduler_config", "unet_trainable", "finetune_keys"),
        *("ckpt_path", "ignore_keys", "load_only_unet", "loss_type", "v_posterior", "l_simple_weight"),
        *("original_elbo_weight", "clip_denoised", "concat_mode"),
    },
    "unet_config": {"use_checkpoint", "legacy", "use_fp16", "use_bf16"},
    "first_stage_config": {"monitor", "lossconfig", "ckpt_path", "ignore_keys", "image_key"},
    "ddconfig": set(),
    "cond_stage_config": {"version", "device", "freeze"},
    "FrozenOpenCLIPEmbedder": {"version", "device", "freeze"},
}
# Options that are accepted at this value alone; of several in a tuple, the first is the default.
_FIXED: dict[str, dict[str, Any]] = {
    "model": {
        # concat and hybrid hand the UNet more channels, adm a class
        "conditioning_key": ("crossattn", None),
        "beta_schedule": "linear",
        "scale_by_std": False,
        "given_betas": None,
        "learn_logvar": False,
    },
    "unet_config": {
        "dims": 2,
        "use_spatial_transformer": True,
        "conv_resample": True,
        "num_classes": None,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "n_embed": None,
        "use_new_attention_order": False,
        "num_heads_upsample": -1,
    },
    "first_stage_config": {"colorize_nlabels": None},
    "ddconfig": {
        "double_z": True,
        "resamp_with_conv": True,
        "use_linear_attn": False,
        "attn_type": ("vanilla", "vanilla-xformers"),
    },
    "cond_stage_config": {"layer": "last", "layer_idx": None},
    "FrozenOpenCLIPEmbedder": {"arch": "ViT-H-14"},
}

P = TypeVar("P")


def load_model_config(path: str | Path) -> LatentDiffusionParams:
    """Read a CompVis model YAML.

    Raises:
        ModelConfigError: the file is missing or not YAML, a target is unknown, an option is missing, of a wrong type or
            not supported.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ModelConfigError(f"model_config_path: there is no file {path}; give the model's CompVis YAML")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ModelConfigError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ModelConfigError(
            f"{path}: a model YAML begins with `model:`, with `target` and `params` below it"
        )
    return parse_model_config(content["model"], source=str(path))


def parse_model_config(model: Mapping[str, Any], *, source: str = "model config") -> LatentDiffusionParams:
    """The content of `model:` as params. Raises ModelConfigError, see `load_model_config`."""
    params = _section(model, "model", source)
    unet = _section(params.pop("unet_config", None), "unet_config", source)
    first_stage = _section(params.pop("first_stage_config", None), "first_stage_config", source)
    cond_stage = params.pop("cond_stage_config", None)

    ddconfig = first_stage.pop("ddconfig", None)
    if not isinstance(ddconfig, Mapping):
        raise ModelConfigError(f"{source}: first_stage_config.params.ddconfig is missing")
    ddconfig = _without_harmless(dict(ddconfig), "ddconfig", source)

    unet_params = _unet_params(unet, source)
    text = None if cond_stage == UNCONDITIONAL else _text_params(cond_stage, source)
    result = _build(
        LatentDiffusionParams,
        {
            **params,
            "unet": unet_params,
            "first_stage": _build(
                AutoencoderParams, {**first_stage, **ddconfig}, "first_stage_config", source
            ),
            "cond_stage": text,
        },
        "model",
        source,
    )
    problems = structure_problems(result)
    if result.parameterization not in PARAMETERIZATIONS:
        problems.append(
            f"parameterization is {result.parameterization!r}; allowed: {', '.join(PARAMETERIZATIONS)}"
        )
    if problems:
        raise ModelConfigError(f"{source}: this model cannot be run: {'; '.join(problems)}")
    return result


def _unet_params(options: dict[str, Any], source: str) -> UNetParams:
    context_dim = options.get("context_dim")
    if isinstance(context_dim, (list, tuple)):
        if not context_dim or any(width != context_dim[0] for width in context_dim):
            raise ModelConfigError(
                f"{source}: context_dim {context_dim} differs between blocks, which is not built here"
            )
        options["context_dim"] = context_dim[0]
    return _build(UNetParams, options, "unet_config", source)


def _text_params(node: Any, source: str) -> TextEncoderParams | OpenClipParams:
    name = "cond_stage_config"
    if isinstance(node, Mapping) and str(node.get("target")).endswith("FrozenOpenCLIPEmbedder"):
        options = _section(node, name, source, options="FrozenOpenCLIPEmbedder")
        return _build(OpenClipParams, options, name, source)
    return _build(TextEncoderParams, _section(node, name, source), name, source)


def _section(node: Any, name: str, source: str, *, options: str | None = None) -> dict[str, Any]:
    """`params` of a `target` / `params` node, after checking its target; harmless options removed.

    `options` names the table of harmless and fixed options, where it is not the section's own.
    """
    if not isinstance(node, Mapping) or "target" not in node:
        given = "" if node is None or isinstance(node, Mapping) else f" ({node!r} is not built here)"
        raise ModelConfigError(f"{source}: {name} is missing, or has no `target`{given}")
    target = str(node["target"])
    known = sorted(_TARGETS[name])
    last = target.rsplit(".", 1)[-1]
    if last in _OTHER_MODELS:
        raise ModelConfigError(
            f"{source}: {name}.target {target!r} is {_OTHER_MODELS[last]}, which cannot be run here; {_READ_HERE}"
        )
    if last not in known:
        raise ModelConfigError(f"{source}: {name}.target {target!r} is not known; known: {', '.join(known)}")
    params = node.get("params") or {}
    if not isinstance(params, Mapping):
        raise ModelConfigError(f"{source}: {name}.params must be a mapping")
    return _without_harmless(dict(params), options or name, source)


def _without_harmless(options: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    for key, value in _FIXED[name].items():
        allowed = value if isinstance(value, tuple) else (value,)
        given = options.pop(key, allowed[0])
        if not any(type(given) is type(one) and given == one for one in allowed):
            raise ModelConfigError(
                f"{source}: {name}: {key} = {given!r} is not built here; supported: "
                f"{' or '.join(map(repr, allowed))}"
            )
    return {key: value for key, value in options.items() if key not in _HARMLESS[name]}


def _build(cls: type[P], options: dict[str, Any], name: str, source: str) -> P:
    """A params dataclass from options, each checked against the type of its field."""
    kinds = {field.name: str(field.type) for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in set(options) - set(kinds))
    if unknown:
        raise ModelConfigError(f"{source}: {name} has options that are not known here: {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for key, value in options.items():
        kind = kinds[key]
        if kind.startswith("tuple"):
            value = tuple(value) if isinstance(value, list) else value
            right = isinstance(value, tuple) and all(type(item) is int for item in value)
        elif kind == "bool":
            right = isinstance(value, bool)
        elif kind == "float":
            value = _number(value)
            right = isinstance(value, float)
        elif kind.startswith("int"):
            right = (isinstance(value, int) and not isinstance(value, bool)) or (
                value is None and "None" in kind
            )
        elif kind == "str":
            right = isinstance(value, str)
        else:
            right = value is None or is_dataclass(value)
        if not right:
            raise ModelConfigError(f"{source}: {name}.{key} = {value!r} is not of type {kind}")
        values[key] = value
    missing = [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]  # type: ignore[arg-type]
    if missing:
        raise ModelConfigError(f"{source}: {name} lacks {', '.join(missing)}")
    return cls(**values)


def _number(value: Any) -> Any:
    """YAML reads `1e-4` as a string: take it as the number it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return value
    return value
