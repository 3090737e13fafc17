"""Which weights of the UNet a run may move, by their names."""

from __future__ import annotations

from collections.abc import Callable

_TIME = ("out.", "time_embed.")
_SELF_LAYERS = ("input_blocks.4.", "input_blocks.7.")
_CROSS_LAYERS = ("output_blocks.6.", "output_blocks.8.")
IN_METHOD: dict[str, Callable[[str], bool]] = {
    "full": lambda _: True,
    "notime": lambda name: not name.startswith(_TIME),
    "noxattn": lambda name: not name.startswith(_TIME) and "attn2" not in name.split("."),
    "selfattn": lambda name: "attn1" in name.split("."),
    "xattn": lambda name: "attn2" in name.split("."),
    "selflayer": lambda name: name.startswith(_SELF_LAYERS) and "attn1" in name.split("."),
    "xlayer": lambda name: name.startswith(_CROSS_LAYERS) and "attn2" in name.split("."),
}
"""Train method -> whether it moves the parameter of this UNet-relative name."""
TRAIN_METHODS = tuple(IN_METHOD)
TRAIN_METHOD_HELP = (
    "full: all; notime: without out and time_embed; noxattn: these also without cross-attention; selfattn, xattn: "
    "self- or cross-attention alone; selflayer: self-attention of input blocks 4 and 7; xlayer: cross-attention of "
    "output blocks 6 and 8."
)
