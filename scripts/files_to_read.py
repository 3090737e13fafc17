"""Which files of `mu` run while a mask is made, and between two updates of training: docs/developing.md has the counts.

Of Lightning it names those that run between two updates.

python scripts/files_to_read.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import mu
from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import (
    saliency_unlearning_generate_mask_emoji_canvas,
    saliency_unlearning_train_emoji_canvas,
)

TOP = f"{Path(mu.__file__).parent}/"
SMALL: dict[str, Any] = {
    "devices": "cpu",
    "objects": ("Cats", "Dogs"),
    "images_per_prompt": 1,
    "sample_steps": 2,
    "batch_size": 4,
}


class Watch:
    """Files of `mu` of which a function is called, while it is on."""

    def __init__(self) -> None:
        self.files: dict[str, set[str]] = {
            "mask": set(),
            "gradient to mask": set(),
            "step": set(),
            "step, of Lightning": set(),
        }
        self.on: set[str] = set()
        self.steps = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if "step" in self.on and "site-packages/" in code.co_filename and "lightning" in code.co_filename:
            self.files["step, of Lightning"].add(code.co_filename.split("site-packages/")[-1])
        if not code.co_filename.startswith(TOP):
            return
        if event == "call" and code.co_name == "accumulate_within_memory":
            self.on.add("gradient to mask")
        if event == "call":
            for part in self.on:
                self.files[part].add(code.co_filename.removeprefix(TOP))
        if event == "return" and code.co_name == "save_mask":
            self.on.discard("gradient to mask")
        if event == "return" and code.co_name == "step" and code.co_filename.endswith("optim.py"):
            self.steps += 1
            if self.steps == 2:
                self.on.add("step")
            elif self.steps == 3:
                self.on.discard("step")


def main() -> int:
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        where = {**SMALL, "processed_dataset_dir": f"{folder}/data"}
        sys.setprofile(watch)
        watch.on.add("mask")
        MaskingAlgorithm(
            saliency_unlearning_generate_mask_emoji_canvas, output_dir=f"{folder}/masks", **where
        ).run()
        watch.on.clear()
        SaliencyUnlearningAlgorithm(
            saliency_unlearning_train_emoji_canvas,
            mask_path=f"{folder}/masks",
            output_dir=f"{folder}/runs",
            epochs=4,
            retain_images_per_prompt=1,
            retain_batch_size=4,
            sample_prompts=(),
            **where,
        ).run()
        sys.setprofile(None)
    for part, files in watch.files.items():
        print(f"{part}: {len(files)} files", *sorted(files), sep="\n    ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
