"""The configuration files of a diffusers folder, from a model's params; and those of a folder compared with them.

Names and shapes of tensors do not tell how many heads an attention has, what the UNet predicts or how latents are
scaled: a folder that says otherwise than the model YAML would load, and give wrong images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mu.ldm.params import (
    END_TOKEN,
    NORM_GROUPS,
    START_TOKEN,
    VOCAB_SIZE,
    AutoencoderParams,
    LatentDiffusionParams,
    OpenClipParams,
    UNetParams,
)
from mu.ldm.tensor_file import CheckpointError

Config = dict[str, Any]

# Written into the files: newer releases convert configs of older ones, which these need not.
DIFFUSERS_VERSION = "0.32.0"

# What is compared with a folder -> the value where its file does not say, and the key of the model YAML.
_UNSAID = object()
_COMPARED: dict[str, dict[str, tuple[Any, str]]] = {
    "unet": {
        "attention_head_dim": (8, "num_heads or num_head_channels"),
        "use_linear_projection": (False, "use_linear_in_transformer"),
        "cross_attention_dim": (_UNSAID, "context_dim"),
        "block_out_channels": (_UNSAID, "model_channels and channel_mult"),
        "layers_per_block": (2, "num_res_blocks"),
        "act_fn": ("silu", ""),
        "norm_num_groups": (32, ""),
        "norm_eps": (1e-5, ""),
        "flip_sin_to_cos": (True, ""),
        "freq_shift": (0, ""),
        "center_input_sample": (False, ""),
    },
    "vae": {
        "scaling_factor": (0.18215, "scale_factor"),
        "latent_channels": (_UNSAID, "z_channels"),
        "act_fn": ("silu", ""),
        "norm_num_groups": (32, ""),
    },
    "text_encoder": {
        "hidden_act": ("quick_gelu", "hidden_act"),
        "num_attention_heads": (_UNSAID, "num_attention_heads"),
        "num_hidden_layers": (_UNSAID, "num_hidden_layers"),
        "hidden_size": (_UNSAID, "hidden_size"),
    },
    "scheduler": {
        "prediction_type": ("epsilon", "parameterization"),
        "num_train_timesteps": (1000, "timesteps"),
        "beta_start": (_UNSAID, "linear_start"),
        "beta_end": (_UNSAID, "linear_end"),
        "beta_schedule": (_UNSAID, ""),
    },
}


def diffusers_configs(params: LatentDiffusionParams) -> dict[str, Config]:
    """Folder (unet, vae, text_encoder, scheduler; "" for model_index.json) -> the content of its configuration file.

    Raises:
        CheckpointError: StableDiffusionPipeline has no such model: without text encoder, with a first stage whose
            embed_dim is not its z_channels, ...
    """
    if params.cond_stage is None or params.unet.context_dim is None:
        raise CheckpointError(
            "a model without text encoder cannot be written as a diffusers folder: StableDiffusionPipeline needs one"
        )
    if params.first_stage.embed_dim != params.first_stage.z_channels:
        raise CheckpointError(
            f"embed_dim is {params.first_stage.embed_dim} and z_channels {params.first_stage.z_channels}: diffusers' "
            "AutoencoderKL knows only one number for both"
        )
    side = params.latent_side
    return {
        "": _model_index(),
        "unet": _unet(params.unet, side),
        "vae": _vae(params.first_stage, side, params.scale_factor),
        "text_encoder": _text_encoder(params),
        "scheduler": _scheduler(params),
    }


def compare_configs(found: Mapping[str, Config], params: LatentDiffusionParams) -> list[str]:
    """What the configuration files of a folder say otherwise than the model's params; one sentence each."""
    expected = diffusers_configs(params)
    problems = []
    for folder, keys in _COMPARED.items():
        if folder not in found:
            continue
        for key, (default, yaml_key) in keys.items():
            theirs = found[folder].get(key, default)
            if theirs is _UNSAID or theirs is None:
                continue
            ours = expected[folder][key]
            if _plain(theirs, ours) != _plain(ours, ours):
                hint = f" ({yaml_key})" if yaml_key else ", and nothing else is built here"
                problems.append(f"{folder}: {key} is {theirs!r}, by the model YAML {ours!r}{hint}")
    return problems


def _plain(value: Any, like: Any) -> Any:
    """A value such that one number for all levels equals a list of it."""
    if isinstance(like, list) and not isinstance(value, (list, tuple)):
        return [value] * len(like)
    return list(value) if isinstance(value, (list, tuple)) else value


def _model_index() -> Config:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet(params: UNetParams, side: int) -> Config:
    widths = [mult * params.model_channels for mult in params.channel_mult]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        # diffusers means the number of heads, and keeps the wrong name for the sake of older files
        "attention_head_dim": [params.heads_of(width)[0] for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": params.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in params.attends],
        "downsample_padding": 1,
        "dropout": params.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": params.in_channels,
        "layers_per_block": params.num_res_blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": NORM_GROUPS,
        "out_channels": params.out_channels,
        "sample_size": side,
        "transformer_layers_per_block": params.transformer_depth,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(params.attends)],
        "use_linear_projection": params.use_linear_in_transformer,
    }


def _vae(params: AutoencoderParams, side: int, scale_factor: float) -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": [mult * params.ch for mult in params.ch_mult],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in params.attends],
        "in_channels": params.in_channels,
        "latent_channels": params.z_channels,
        "layers_per_block": params.num_res_blocks,
        "norm_num_groups": NORM_GROUPS,
        "out_channels": params.out_ch,
        "sample_size": side * params.factor,
        "scaling_factor": scale_factor,
        "up_block_types": [
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(params.attends)
        ],
    }


def _text_encoder(params: LatentDiffusionParams) -> Config:
    text = params.cond_stage
    assert text is not None
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "hidden_act": "gelu" if isinstance(text, OpenClipParams) else text.hidden_act,
        "hidden_size": text.hidden_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": text.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": text.num_attention_heads,
        # The last layers of OpenCLIP are left out where they are not run.
        "num_hidden_layers": text.layers_run,
        "pad_token_id": 0 if isinstance(text, OpenClipParams) else END_TOKEN,
        "projection_dim": text.hidden_size,
        # Of the weights in memory, unless the caller says otherwise: diffusers' own networks are loaded into fp32, and
        # transformers would take the type of the file, which does not go together where that is fp16.
        "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE,
    }


def _scheduler(params: LatentDiffusionParams) -> Config:
    """DDIM with the timesteps, and the last step, of `mu.ldm.sampler`."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": params.linear_end,
        "beta_schedule": "scaled_linear",
        "beta_start": params.linear_start,
        "clip_sample": False,
        "num_train_timesteps": params.timesteps,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[params.parameterization],
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }
