"""What is between a mask and the runs: which file it is, of which model, and what it keeps of each block."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mu.algorithms.saliency_unlearning.configs import TrainConfig, mask_command
from mu.algorithms.saliency_unlearning.mask_file import MaskError, count_marked, load_mask_metadata
from mu.config import resolve_path
from mu.datasets.index import concept_label, concept_names
from mu.ldm import LatentDiffusion
from mu.ldm.diffusers_tensors import UNET_PREFIX
from mu.ldm.tensor_file import fingerprint

_log = logging.getLogger(__name__)
_ATTENTION = {"attn1": "self-attention", "attn2": "cross-attention"}
_PROJECTIONS = {"to_q": "queries", "to_k": "keys", "to_v": "values", "to_out": "output"}
_AROUND_ATTENTION = {"transformer_blocks", "proj_in", "proj_out", "norm"}


def unet_fingerprint(model: LatentDiffusion) -> str:
    """What a mask remembers of the model it was made from: SHA-256 of the UNet's weights, as they are in the file."""
    parameters = dict(model.unet.named_parameters())
    dtypes = {name: model.file_dtypes.get(UNET_PREFIX + name, p.dtype) for name, p in parameters.items()}
    return fingerprint(parameters, dtypes=dtypes)


def layer_groups(mask: Mapping[str, Tensor]) -> dict[str, float]:
    """Kept fraction of each block of the UNet: `input_blocks.1`, `middle_block.0`, `time_embed`, ..."""
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, marked in mask.items():
        group = layer_group(name)
        kept[group] = kept.get(group, 0) + count_marked(marked)
        total[group] = total.get(group, 0) + marked.numel()
    return {group: kept[group] / total[group] for group in total}


def layer_group(name: str) -> str:
    """The block of the UNet that a parameter is of, see `layer_groups`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0].endswith(("_blocks", "_block")) else parts[0]


def kept_by_layer(mask: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[int, int]]]:
    """How many weights a mask keeps of each kind of layer in each block of the UNet, and how many there are.

    Args:
        mask: UNet-relative name -> bool tensor, as `load_mask` gives it.

    Returns:
        block (see `layer_groups`) -> kind (see `layer_kind`) -> (kept, all), in the order of the mask.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, marked in mask.items():
        kinds = found.setdefault(layer_group(name), {})
        kept, total = kinds.get(layer_kind(name), (0, 0))
        kinds[layer_kind(name)] = kept + count_marked(marked), total + marked.numel()
    return found


def layer_kind(name: str) -> str:
    """What kind of layer a parameter is of: `cross-attention keys`, `feed-forward`, `convolutions`, ...

    Norms, and the linear layers between convolutions and attention, count as `norms and projections` where they belong
    to a transformer, else as `convolutions`.
    """
    parts = name.split(".")
    for part, attention in _ATTENTION.items():
        if part in parts:
            return f"{attention} {_PROJECTIONS[parts[parts.index(part) + 1]]}"
    if "ff" in parts:
        return "feed-forward"
    if parts[0] == "time_embed" or "emb_layers" in parts:
        return "time embedding"
    return "norms and projections" if _AROUND_ATTENTION & set(parts) else "convolutions"


def find_mask(config: TrainConfig) -> Path:
    """The mask file that `mask_path` leads to: itself, or in a folder the newest of this concept.

    Where the key `threshold` names one, the newest of this threshold.

    Raises:
        MaskError: the folder has no such mask; names the command that makes it.
    """
    assert config.mask_path is not None
    path = resolve_path(config.mask_path)
    if path.is_file():
        return path
    wanted: dict[str, object] = {"template": config.template}
    if config.threshold is not None:
        wanted["threshold"] = config.threshold
    fitting = []
    for candidate in path.rglob("mask_*.safetensors"):
        metadata = load_mask_metadata(candidate)
        forgotten = concept_names(metadata.get("template_name", ()))
        if set(forgotten) == set(config.concepts) and wanted.items() <= metadata.items():
            fitting.append(candidate)
    if not fitting:
        threshold = "" if config.threshold is None else f" with threshold {config.threshold}"
        raise MaskError(
            f"mask_path: no mask of {config.template} {concept_label(config.concepts)}{threshold} below {path}; make "
            f"it: {mask_command(config)}"
        )
    newest = max(fitting, key=lambda candidate: (candidate.stat().st_mtime_ns, str(candidate)))
    _log.info("mask_path: taking %s, the newest of %d", newest, len(fitting))
    return newest
