"""What a file of tensors or a diffusers folder is when it is no whole Stable Diffusion: one table, with advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mu.ldm.structure import other_inputs

READ_HERE = (
    "read are Stable Diffusion v1 and v2 (CompVis files, diffusers folders) and text-to-image models of their "
    "structure; no model YAML makes another one readable"
)
_WHOLE = "give the whole checkpoint that it belongs to, a CompVis file or a diffusers folder"
_SOURCE = "take the text-to-image model that it was made from"


@dataclass(frozen=True, kw_only=True)
class OtherKind:
    """A kind of file that is not read as a checkpoint."""

    name: str
    """With its article: "a LoRA"."""
    advice: str


class _Names:
    """The names of a file's tensors, asked about in the recognisers below."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.tensors, self.metadata = tensors, metadata

    def start(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.tensors)

    def contain(self, *parts: str) -> bool:
        return any(part in name for name in self.tensors for part in parts)

    def all_start(self, *prefixes: str) -> bool:
        return bool(self.tensors) and all(name.startswith(prefixes) for name in self.tensors)


Recogniser = tuple[str, Callable[[_Names], bool], str]
_UNET = ("model.diffusion_model.", "unet.", "down_blocks.", "input_blocks.", "mid_block.", "up_blocks.")
_VAE = (
    "first_stage_model.",
    "vae.",
    "encoder.down.",
    "encoder.down_blocks.",
    "decoder.up",
    "quant_conv.",
)
_TEXT = (
    "cond_stage_model.",
    "text_encoder.",
    "text_model.",
    "embeddings.token_embedding.",
    "transformer.text_model.",
    "transformer.resblocks.",
    "token_embedding.",
)
_MASK = "give it to mask_path of training; ckpt_path is the checkpoint that it was made from"

# Name, whether a file is one, and what to do. The first that fits is taken: parts of models come last.
_KINDS: tuple[Recogniser, ...] = (
    ("a mask of this package", lambda n: "mask_format" in n.metadata, _MASK),
    (
        "a patch of this package",
        lambda n: "patch_format" in n.metadata,
        "apply it to the checkpoint that it was made from: apply_patch CHECKPOINT OUTPUT --patches PATCH",
    ),
    ("a mask, as SalUn's authors write it", lambda n: _is_mask(n.tensors), _MASK),
    (
        "the state of a training run",
        lambda n: "run_state" in n.metadata,
        "give the folder of the run to --resume, or its model.safetensors as checkpoint",
    ),
    (
        "a LoRA",
        lambda n: (
            n.start("lora_unet_", "lora_te", "lycoris_")
            or n.contain(
                ".lora_down.",
                ".lora_up.",
                ".lora_A.",
                ".lora_B.",
                "lora.down.",
                "lora.up.",
                ".hada_w1",
                ".lokr_w1",
            )
            or n.contain(".oft_blocks", ".lora_A", ".lora_B")
        ),
        "it holds small changes to a model and not the model; merge it into its base first (diffusers: "
        "pipe.load_lora_weights(...), pipe.fuse_lora(), pipe.save_pretrained(...); kohya: merge_lora.py) and give the "
        "merged model",
    ),
    (
        "a textual-inversion embedding",
        lambda n: n.start("string_to_param.") or _is_embedding(n.tensors),
        "it holds new words for a model and not the model; give the checkpoint that it is used with",
    ),
    (
        "a ControlNet",
        lambda n: n.start("control_model.", "controlnet_", "zero_convs.", "input_hint_block."),
        "it steers a model and is none; give the Stable Diffusion that it steers",
    ),
    (
        "an IP-Adapter",
        lambda n: n.start("image_proj.", "ip_adapter."),
        "it steers a model and is none; give the Stable Diffusion that it steers",
    ),
    ("Flux", lambda n: n.contain("double_blocks.", "single_transformer_blocks."), READ_HERE),
    (
        "Stable Diffusion 3",
        lambda n: (
            n.contain("joint_blocks.") or (n.start("transformer_blocks.") and n.contain(".add_q_proj."))
        ),
        READ_HERE,
    ),
    (
        "a diffusion transformer",
        lambda n: n.start("transformer_blocks.", "transformer.transformer_blocks."),
        READ_HERE,
    ),
    (
        "SDXL",
        lambda n: (
            not _other_inputs_of(n.tensors)
            and n.start(
                *(
                    "conditioner.embedders.",
                    "model.diffusion_model.label_emb.",
                    "label_emb.",
                    "text_encoder_2.",
                ),
                *("add_embedding.", "unet.add_embedding."),
            )
        ),
        READ_HERE,
    ),
    (
        "an image classifier",
        lambda n: (
            (n.start("head.") and n.contain("attn.qkv.")) or n.all_start("fc.", "layer", "conv1.", "bn1.")
        ),
        "give it to the keys of evaluate (classifier_path), and the checkpoint of the model here",
    ),
    (
        "a T5 text encoder alone",
        lambda n: n.start("encoder.block.0.", "decoder.block.0."),
        "it belongs to SD 3, Flux and others; " + READ_HERE,
    ),
    ("a whole CLIP, with its image encoder", lambda n: n.start("vision_model.", "visual."), _WHOLE),
    ("a checkpoint without its UNet", lambda n: _only(n, _VAE + _TEXT, both=True), _WHOLE),
    ("an autoencoder (VAE) alone", lambda n: _only(n, _VAE), _WHOLE),
    ("a text encoder alone", lambda n: _only(n, _TEXT), _WHOLE),
)


def other_kind(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OtherKind | None:
    """What a file is that is neither a checkpoint of Stable Diffusion's kind nor a part of one that can be completed.

    Args:
        tensors: those of the file; they may be on the meta device.
        metadata: that of the file.

    Returns:
        None for what may be read, and for what is not known.
    """
    if inputs := _other_inputs_of(tensors):
        return OtherKind(
            name=inputs, advice=f"its UNet is given another image beside the prompt; {_SOURCE}. {READ_HERE}"
        )
    names = _Names(tensors, metadata)
    for name, is_one, advice in _KINDS:
        if is_one(names):
            return OtherKind(name=name, advice=advice)
    return None


def other_pipeline(index: Mapping[str, Any]) -> OtherKind | None:
    """What the pipeline of a diffusers folder is, by its `model_index.json`; None where its networks are read here."""
    pipeline = str(index.get("_class_name", ""))
    for part, name in _PIPELINES.items():
        if part in pipeline:
            advice = _SOURCE if name.startswith("a model") else READ_HERE
            return OtherKind(name=f"{name} ({pipeline})", advice=advice)
    for component, wanted in _CLASSES.items():
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


# A part of a pipeline's class -> what it is. What has a UNet that is given more than latents begins with "a model".
_PIPELINES = {
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
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


def _only(names: _Names, prefixes: tuple[str, ...], *, both: bool = False) -> bool:
    """Whether there is something of those parts and nothing of a UNet; with `both`, of VAE and text encoder alike."""
    there = (names.start(*_VAE) and names.start(*_TEXT)) if both else names.start(*prefixes)
    return there and not names.start(*_UNET)


def _other_inputs_of(tensors: Mapping[str, Tensor]) -> str:
    """What a UNet is that is given more channels than it returns; "" for a text-to-image model's."""
    for first, last in (
        ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"),
        ("input_blocks.0.0.weight", "out.2.weight"),
        ("unet.conv_in.weight", "unet.conv_out.weight"),
        ("conv_in.weight", "conv_out.weight"),
    ):
        if first in tensors and last in tensors and tensors[first].ndim == tensors[last].ndim == 4:
            given, returned = tensors[first].shape[1], tensors[last].shape[0]
            return other_inputs(given - returned, returned)
    return ""


def _is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """A few vectors as wide as prompt embeddings, under the words that they stand for."""
    return 0 < len(tensors) <= 8 and all(
        "." not in name and 0 < tensor.ndim <= 2 and tensor.shape[-1] in (768, 1024, 1280)
        for name, tensor in tensors.items()
    )


def _is_mask(tensors: Mapping[str, Tensor]) -> bool:
    """Names of a UNet's weights alone, and under them nothing but zeros and ones, or no floats at all."""
    blocks = ("input_blocks.", "output_blocks.", "middle_block.", "time_embed.", "out.")
    if not tensors or not all(
        name.removeprefix("model.diffusion_model.").startswith(blocks) for name in tensors
    ):
        return False
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        return True
    kernels = [tensor for tensor in tensors.values() if tensor.ndim > 1 and not tensor.is_meta][:4]
    return bool(kernels) and all(bool(((kernel == 0) | (kernel == 1)).all()) for kernel in kernels)
