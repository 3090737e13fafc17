"""What a file of tensors or a diffusers folder is: a kind that is read, or something else, with advice. By tables.

| kind | what it is |
|---|---|
| CompVis checkpoint | one file with `model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*` |
| diffusers folder | `model_index.json` and a folder for each network |
| diffusers checkpoint | one file with `unet.*`, `vae.*`, `text_encoder.*` in diffusers' names |
| UNet in diffusers' names | one file with `down_blocks.*`, perhaps after `unet.`; whole, or only what was trained |
| UNet in CompVis' names | one file with `input_blocks.*`, without `model.diffusion_model.` before them |

The last two, and a CompVis checkpoint without its VAE or text encoder, are parts of a model: a base completes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.ema import has_ema
from mu.ldm.params import other_inputs
from mu.ldm.tensor_file import CheckpointError

COMPVIS, FOLDER, FILE = "CompVis checkpoint", "diffusers folder", "diffusers checkpoint"
UNET_ALONE, UNET_BARE = "UNet in diffusers' names", "UNet in CompVis' names"
UNKNOWN = "file of tensors of no known kind"

READ_HERE = (
    "read are Stable Diffusion v1 and v2 (CompVis files, diffusers folders) and text-to-image models of their "
    "structure; no model YAML makes another one readable"
)
_WHOLE = "give the whole checkpoint that it belongs to, a CompVis file or a diffusers folder"
_SOURCE = "take the text-to-image model that it was made from"
_MASK = "give it to mask_path of training; ckpt_path is the checkpoint that it was made from"
_STEERS = "it steers a model and is none; give the Stable Diffusion that it steers"

# Beginnings of the names of tensors.
_DIFFUSERS_UNET = (
    *("down_blocks.", "mid_block.", "up_blocks."),
    *("time_embedding.", "conv_in.", "conv_norm_out.", "conv_out."),
)
_COMPVIS_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")
_UNET = (UNET_PREFIX, "unet.", "down_blocks.", "input_blocks.", "mid_block.", "up_blocks.")
_VAE = (
    *("first_stage_model.", "vae.", "quant_conv."),
    *("encoder.down.", "encoder.down_blocks.", "decoder.up"),
)
_TEXT = (
    *("cond_stage_model.", "text_encoder.", "text_model.", "embeddings.token_embedding."),
    *("transformer.text_model.", "transformer.resblocks.", "token_embedding."),
)


# ---- what is read


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """What a checkpoint is, as far as its names, shapes and types tell."""

    kind: str
    text_encoder: str | None
    """CLIP (SD v1), OpenCLIP (SD v2), or None."""
    context_dim: int | None
    """Width of the prompt embeddings that its UNet takes: 768 in SD v1, 1024 in SD v2."""
    unet_weights: int
    """Number of the UNet's raw weights."""
    dtypes: tuple[str, ...]
    """Types of the tensors, such as float16; the most frequent one first."""
    ema: bool
    """Whether there is an EMA copy of the UNet."""

    def __str__(self) -> str:
        parts = [f"UNet of {self.unet_weights:,} weights"]
        if self.context_dim is not None:
            parts.append(f"prompts {self.context_dim} wide")
        parts.append(f"text encoder {self.text_encoder or 'none'}")
        parts.append("with EMA weights" if self.ema else "no EMA weights")
        return f"{self.kind}: {', '.join(parts)}; {', '.join(self.dtypes)}"


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """The kind of a file, by the names of its tensors."""
    names = _File(tensors, {})
    if names.start(UNET_PREFIX):
        return COMPVIS
    if names.start("vae.", "text_encoder."):
        return FILE
    if tensors and all(name.removeprefix("unet.").startswith(_DIFFUSERS_UNET) for name in tensors):
        return UNET_ALONE
    return UNET_BARE if names.all_start(*_COMPVIS_UNET) else UNKNOWN


def described(kind: str, tensors: Mapping[str, Tensor]) -> CheckpointDescription:
    """The description of a checkpoint of a kind.

    Args:
        tensors: under the file's own names; those of a folder under `unet.`, `vae.`, `text_encoder.`.
    """
    alone = kind in (UNET_ALONE, UNET_BARE)
    unet = [key for key in tensors if alone or key.startswith((UNET_PREFIX, "unet."))]
    widths = [tensors[key].shape[-1] for key in unet if key.endswith("attn2.to_k.weight")]
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return CheckpointDescription(
        kind=kind,
        text_encoder=_text_encoder(tensors),
        context_dim=widths[0] if widths else None,
        unet_weights=sum(tensors[key].numel() for key in unet),
        dtypes=tuple(sorted(counts, key=lambda name: -counts[name])),
        ema=has_ema(tensors),
    )


def _text_encoder(tensors: Mapping[str, Tensor]) -> str | None:
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        return "OpenCLIP"
    for key, tensor in tensors.items():
        if key.startswith(("cond_stage_model.", "text_encoder.")) and key.endswith(
            "position_embedding.weight"
        ):
            # transformers' names are the same for both: only the width tells
            wide = key.startswith("text_encoder.") and tensor.shape[-1] == 1024
            return "OpenCLIP" if wide else "CLIP"
    return None


# ---- what is not


@dataclass(frozen=True, kw_only=True)
class OtherKind:
    """A kind of file that is not read as a checkpoint."""

    name: str
    """With its article: "a LoRA"."""
    advice: str


def other_kind(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OtherKind | None:
    """What a file is that is neither a checkpoint of Stable Diffusion's kind nor a part of one that can be completed.

    Args:
        tensors: those of the file; they may be on the meta device.
        metadata: that of the file.

    Returns:
        None for what may be read, and for what is not known.
    """
    if inputs := _other_inputs_of(tensors):
        advice = f"its UNet is given another image beside the prompt; {_SOURCE}. {READ_HERE}"
        return OtherKind(name=inputs, advice=advice)
    file = _File(tensors, metadata)
    for name, is_one, advice in _OTHER_FILES:
        if is_one(file):
            return OtherKind(name=name, advice=advice)
    return None


def refuse_other_kinds(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, source: str | Path
) -> None:
    """Raises CheckpointError where a file is known to be something else, and says what and what to do."""
    if (other := other_kind(tensors, metadata)) is not None:
        raise CheckpointError(f"{source} is {other.name}, not a checkpoint that is read here: {other.advice}")


def other_pipeline(index: Mapping[str, Any]) -> OtherKind | None:
    """What the pipeline of a diffusers folder is, by its `model_index.json`; None where its networks are read here."""
    pipeline = str(index.get("_class_name", ""))
    for part, name in _OTHER_PIPELINES.items():
        if part in pipeline:
            advice = _SOURCE if name.startswith("a model") else READ_HERE
            return OtherKind(name=f"{name} ({pipeline})", advice=advice)
    for component, wanted in _NETWORKS.items():
        given = index.get(component)
        network = given[1] if isinstance(given, (list, tuple)) and len(given) == 2 else None
        if network is not None and network != wanted:
            return OtherKind(
                name=f"a {pipeline or 'pipeline'} whose {component} is a {network}",
                advice=f"needed is a {wanted}; {READ_HERE}",
            )
    if "unet" not in index and "_class_name" in index:
        return OtherKind(name=f"a {pipeline}, which has no UNet", advice=READ_HERE)
    return None


class _File:
    """The names and metadata of a file, asked about in the table below."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.tensors, self.metadata = tensors, metadata

    def start(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.tensors)

    def contain(self, *parts: str) -> bool:
        return any(part in name for name in self.tensors for part in parts)

    def all_start(self, *prefixes: str) -> bool:
        return bool(self.tensors) and all(name.startswith(prefixes) for name in self.tensors)


def _other_inputs_of(tensors: Mapping[str, Tensor]) -> str:
    """What a UNet is that is given more channels than it returns; "" for a text-to-image model's."""
    for first, last in (
        (f"{UNET_PREFIX}input_blocks.0.0.weight", f"{UNET_PREFIX}out.2.weight"),
        ("input_blocks.0.0.weight", "out.2.weight"),
        ("unet.conv_in.weight", "unet.conv_out.weight"),
        ("conv_in.weight", "conv_out.weight"),
    ):
        if first in tensors and last in tensors and tensors[first].ndim == tensors[last].ndim == 4:
            given, returned = tensors[first].shape[1], tensors[last].shape[0]
            return other_inputs(given - returned, returned)
    return ""


def _is_embedding(file: _File) -> bool:
    """A few vectors as wide as prompt embeddings, under the words that they stand for."""
    return 0 < len(file.tensors) <= 8 and all(
        "." not in name and 0 < tensor.ndim <= 2 and tensor.shape[-1] in (768, 1024, 1280)
        for name, tensor in file.tensors.items()
    )


def _is_mask(file: _File) -> bool:
    """Names of a UNet's weights alone, and under them nothing but zeros and ones, or no floats at all."""
    tensors = file.tensors
    if not tensors or not all(name.removeprefix(UNET_PREFIX).startswith(_COMPVIS_UNET) for name in tensors):
        return False
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        return True
    kernels = [tensor for tensor in tensors.values() if tensor.ndim > 1 and not tensor.is_meta][:4]
    return bool(kernels) and all(bool(((kernel == 0) | (kernel == 1)).all()) for kernel in kernels)


# Name, whether a file is one, and what to do. The first that fits is taken: parts of models come last.
_OTHER_FILES: tuple[tuple[str, Callable[[_File], bool], str], ...] = (
    ("a mask of this package", lambda f: "mask_format" in f.metadata, _MASK),
    (
        "a patch of this package",
        lambda f: "patch_format" in f.metadata,
        "apply it to the checkpoint that it was made from: unlearn_diff patch CHECKPOINT OUTPUT --patches PATCH",
    ),
    ("a mask, as SalUn's authors write it", _is_mask, _MASK),
    (
        "the state of a training run",
        lambda f: "run_state" in f.metadata,
        "give the folder of the run to --resume, or its model.safetensors as checkpoint",
    ),
    (
        "a LoRA",
        lambda f: (
            f.start("lora_unet_", "lora_te", "lycoris_")
            or f.contain(".lora_down.", ".lora_up.", "lora.down.", "lora.up.", ".lora_A", ".lora_B")
            or f.contain(".hada_w1", ".lokr_w1", ".oft_blocks")
        ),
        "it holds small changes to a model and not the model; merge it into its base first (diffusers: "
        "pipe.load_lora_weights(...), pipe.fuse_lora(), pipe.save_pretrained(...); kohya: merge_lora.py) and give the "
        "merged model",
    ),
    (
        "a textual-inversion embedding",
        lambda f: f.start("string_to_param.") or _is_embedding(f),
        "it holds new words for a model and not the model; give the checkpoint that it is used with",
    ),
    (
        "a ControlNet",
        lambda f: f.start("control_model.", "controlnet_", "zero_convs.", "input_hint_block."),
        _STEERS,
    ),
    ("an IP-Adapter", lambda f: f.start("image_proj.", "ip_adapter."), _STEERS),
    ("Flux", lambda f: f.contain("double_blocks.", "single_transformer_blocks."), READ_HERE),
    (
        "Stable Diffusion 3",
        lambda f: (
            f.contain("joint_blocks.") or (f.start("transformer_blocks.") and f.contain(".add_q_proj."))
        ),
        READ_HERE,
    ),
    (
        "a diffusion transformer",
        lambda f: f.start("transformer_blocks.", "transformer.transformer_blocks."),
        READ_HERE,
    ),
    (
        "SDXL",
        lambda f: f.start(
            *("conditioner.embedders.", f"{UNET_PREFIX}label_emb.", "label_emb.", "text_encoder_2."),
            *("add_embedding.", "unet.add_embedding."),
        ),
        READ_HERE,
    ),
    (
        "an image classifier",
        lambda f: (
            (f.start("head.") and f.contain("attn.qkv.")) or f.all_start("fc.", "layer", "conv1.", "bn1.")
        ),
        "give it to the keys of evaluate (classifier_path), and the checkpoint of the model here",
    ),
    (
        "a T5 text encoder alone",
        lambda f: f.start("encoder.block.0.", "decoder.block.0."),
        f"it belongs to SD 3, Flux and others; {READ_HERE}",
    ),
    ("a whole CLIP, with its image encoder", lambda f: f.start("vision_model.", "visual."), _WHOLE),
    (
        "a checkpoint without its UNet",
        lambda f: f.start(*_VAE) and f.start(*_TEXT) and not f.start(*_UNET),
        _WHOLE,
    ),
    ("an autoencoder (VAE) alone", lambda f: f.start(*_VAE) and not f.start(*_UNET), _WHOLE),
    ("a text encoder alone", lambda f: f.start(*_TEXT) and not f.start(*_UNET), _WHOLE),
)
# A part of a pipeline's class -> what it is. What has a UNet that is given more than latents begins with "a model".
_OTHER_PIPELINES = {
    "XL": "SDXL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "Inpaint": "a model for inpainting",
    "Pix2Pix": "a model that edits images (InstructPix2Pix)",
    "Depth2Img": "a model that is given depths",
    "Upscale": "a model that enlarges images",
    "ImageVariation": "a model that is conditioned on images",
    "UnCLIP": "a model that is conditioned on images",
}
_NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
