"""The sizes of files before they are written, from the names, shapes and types of what will be in them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mu.datasets.index import Row
from mu.ldm.diffusers_tensors import to_diffusers
from mu.ldm.params import LatentDiffusionParams
from mu.ldm.tensor_file import FINGERPRINT_KEY

DIGEST = f"sha256:{'0' * 64}"
"""Stands for a SHA-256 that is not known yet, at its length."""
RUN_STATE_TENSOR_BYTES = 1_350
"""What a checkpoint of a run takes for each tensor that moves, beside the values: five names, in two places."""
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_CACHED = {"format": "1", FINGERPRINT_KEY: DIGEST}
"""What files of latents and embeddings carry."""
_TOKENIZER_BYTES = 1_590_000
"""vocab.json and merges.txt of CLIP, and the configurations of a diffusers folder."""


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Size of a safetensors file of these tensors, which may be on the meta device."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    # In the file, the widest types come first.
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        code = _CODES.get(tensor.dtype, "BOOL")
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + end


def checkpoint_bytes(
    tensors: Mapping[str, Tensor],
    output_format: str,
    params: LatentDiffusionParams,
    metadata: Mapping[str, str],
) -> int:
    """Size of the unlearned checkpoint.

    Args:
        tensors: all of it, in the types of the file; on the meta device.
        output_format: see the key of that name.
        metadata: what a safetensors file carries beside its fingerprint.
    """
    carried = {FINGERPRINT_KEY: DIGEST}
    if output_format == "diffusers":
        parts = to_diffusers(tensors, params)
        return _TOKENIZER_BYTES + sum(safetensors_bytes(part, carried) for part in parts.values())
    if output_format == "safetensors":
        return safetensors_bytes(tensors, {**metadata, **carried})
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    frame = io.BytesIO()
    torch.save({"state_dict": empty, **carried}, frame)
    # Values begin at multiples of 64 bytes.
    return frame.tell() + sum(tensor.nbytes + 32 for tensor in tensors.values())


def run_state_bytes(selected: Mapping[str, int]) -> int:
    """Size of a checkpoint of a run: the values that move, and two moments of each, in fp32.

    Args:
        selected: UNet-relative name -> entries that move.
    """
    return 12 * sum(selected.values()) + len(selected) * RUN_STATE_TENSOR_BYTES


def latents_bytes(rows: Sequence[Row], latent_shape: Sequence[int]) -> tuple[int, int]:
    """(files, bytes) of the cached latents of rows: a file for each folder of images."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.relative.rpartition("/")[0], []).append(row.relative)
    values = torch.empty(tuple(latent_shape), device="meta")  # (C, h, w)
    total = 0
    for names in groups.values():
        tensors = {f"{kind} {name}": values for name in names for kind in ("mean", "logvar")}
        images = json.dumps(dict.fromkeys(names, "0" * 64))
        described = {"first_stage": DIGEST, "image_size_px": "512", "images": images}
        total += safetensors_bytes(tensors, {**_CACHED, **described})
    return len(groups), total


def prompts_bytes(prompts: Sequence[str], width: int, *, tokens: int = 77) -> int:
    """Size of the file with the embeddings of prompts."""
    embedding = torch.empty(tokens, width, device="meta")  # (L, D)
    tensors = {str(number): embedding for number in range(len(prompts))}
    described = {"text_encoder": DIGEST, "prompts": json.dumps(list(prompts))}
    return safetensors_bytes(tensors, {**_CACHED, **described})


def png_bytes(side_px: int) -> int:
    """About what a picture takes as PNG: of photographs and paintings, half of its pixels' three bytes."""
    return 3 * side_px * side_px // 2
