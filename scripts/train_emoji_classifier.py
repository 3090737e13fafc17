"""Train a classifier that says which style and which object an EmojiCanvas image shows.

The two bundled ones, after scripts/build_emoji_canvas.py has drawn the data set (some minutes each, one thread):

    python scripts/train_emoji_classifier.py --architecture conv --seed 1 \
        --output mu/assets/emoji_canvas/classifier.safetensors
    python scripts/train_emoji_classifier.py --architecture convnext --width 48 --seed 2 \
        --output mu/assets/emoji_canvas/classifier_score.safetensors

The first is for tuning, the second for scoring only. They judge images that a diffusion model made, so besides
the base model's own augmentation (scripts/augment.py) they train on softened, noisy, compressed and slightly
recoloured drawings. The accuracy in the file's header is that on fresh augmentations without those.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import augment
from emoji_drawings import DRAWINGS_PER_OBJECT
from PIL import Image
from torch import Tensor

from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.evaluation.emoji_classifier import ARCHITECTURES, EmojiClassifier, save_classifier

INPUT_SIZE = 64
EVALUATION_SEED_OFFSET = 1_000_003
"""Apart from the training's seeds, so that accuracy is measured on augmentations never trained on."""


def load_drawings(root: Path) -> tuple[Tensor, Tensor, Tensor]:
    """All drawings: images (N, 3, H, W) in [-1, 1], styles (N,), objects (N,).

    Raises:
        FileNotFoundError: a drawing is missing.
    """
    images, styles, objects = [], [], []
    for style_index, style in enumerate(STYLES):
        for object_index, object_name in enumerate(OBJECTS):
            for n in range(1, DRAWINGS_PER_OBJECT + 1):
                path = root / style / object_name / f"{n}.png"
                if not path.is_file():
                    raise FileNotFoundError(f"{path} is missing; scripts/build_emoji_canvas.py draws it")
                with Image.open(path) as image:
                    images.append(torch.from_numpy(np.array(image.convert("RGB"))))
                styles.append(style_index)
                objects.append(object_index)
    pixels = torch.stack(images).permute(0, 3, 1, 2).contiguous()  # (N, 3, H, W)
    return pixels.float() / 127.5 - 1, torch.tensor(styles), torch.tensor(objects)


def _gaussian_blur(images: Tensor, sigma_px: float) -> Tensor:
    reach = math.ceil(3 * sigma_px)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma_px) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _dct_matrix() -> Tensor:
    """The orthonormal 8-point cosine transform, (8, 8)."""
    k = torch.arange(8.0)
    matrix = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _compress(images: Tensor, step: Tensor) -> Tensor:
    """Round the 8 x 8 cosine coefficients, coarser for higher frequencies, as JPEG does.

    Args:
        images: (N, 3, H, W), H and W multiples of 8.
        step: (N, 1, 1, 1, 1, 1), the rounding step of the mean, in units of [-1, 1].
    """
    dct = _dct_matrix()
    n, c, h, w = images.shape
    blocks = images.view(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)  # (N, 3, h, w, 8, 8)
    frequency = torch.arange(8.0)
    steps = step * (1 + frequency[:, None] + frequency)  # (N, 1, 1, 1, 8, 8)
    coefficients = dct @ blocks @ dct.T
    blocks = dct.T @ (torch.round(coefficients / steps) * steps) @ dct
    return blocks.transpose(3, 4).reshape(n, c, h, w)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Make images (N, 3, S, S) look as if a small latent diffusion model had made them, each to another degree.

    Softness of two kinds, colour shifts, noise and block artefacts; a quarter of the images stays as it is.
    """
    n, size = images.shape[0], images.shape[-1]

    def amount(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *(shape or (1, 1, 1)), generator=generator) * (high - low) + low

    out = torch.lerp(images, _gaussian_blur(images, 1.2), amount(0, 1) * (amount(0, 1) < 0.6))
    small = size * (2 + int(torch.randint(0, 5, (), generator=generator))) // 8  # 16 to 48 px of 64
    coarse = F.interpolate(out, size=small, mode="bilinear", antialias=True)
    coarse = F.interpolate(coarse, size=size, mode="bicubic")
    out = torch.lerp(out, coarse, amount(0, 0.8) * (amount(0, 1) < 0.4))

    grey = out.mean(dim=1, keepdim=True)
    out = torch.lerp(grey, out, amount(0.85, 1.15))  # saturation
    out = (out + 1) * amount(0.93, 1.05) * amount(0.96, 1.04, 3, 1, 1) - 1 + amount(-0.05, 0.05)

    noise = torch.randn(out.shape, generator=generator)
    patchy = torch.randn((n, 3, size // 4, size // 4), generator=generator)  # as errors in a latent are
    patchy = F.interpolate(patchy, size=size, mode="bicubic")
    out = out + noise * amount(0, 0.06) + patchy * amount(0, 0.1) * (amount(0, 1) < 0.5)
    compressed = _compress(out, amount(0.005, 0.06, 1, 1, 1, 1, 1))
    out = torch.where(amount(0, 1) < 0.3, compressed, out)
    return torch.where(amount(0, 1) < 0.25, images, out).clamp(-1, 1)


def accuracy(
    model: EmojiClassifier,
    drawings: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
    *,
    rounds: int,
    degraded: bool,
) -> tuple[float, float, Tensor, Tensor]:
    """Style and object accuracy over ``rounds`` augmentations of every drawing.

    Returns:
        the two accuracies, and for every drawing the part of its augmentations whose style (N,) and whose
        object (N,) was right.
    """
    images, styles, objects = drawings
    style_right, object_right = torch.zeros(len(images)), torch.zeros(len(images))
    for _ in range(rounds):
        batch = augment(images, generator, INPUT_SIZE)
        if degraded:
            batch = degrade(batch, generator)
        style_probs, object_probs = model.predict(batch)
        style_right += (style_probs.argmax(1) == styles).float() / rounds
        object_right += (object_probs.argmax(1) == objects).float() / rounds
    return float(style_right.mean()), float(object_right.mean()), style_right, object_right


def train(
    model: EmojiClassifier,
    drawings: tuple[Tensor, Tensor, Tensor],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> None:
    """AdamW with a warm-up and a cosine to zero on the sum of both heads' smoothed cross entropies."""
    images, styles, objects = drawings
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    model.train()
    start = time.monotonic()
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(images), (batch_size,), generator=generator)
        batch = degrade(augment(images[chosen], generator, INPUT_SIZE), generator)
        style_logits, object_logits = model(batch)
        style_loss = F.cross_entropy(style_logits, styles[chosen], label_smoothing=0.05)
        object_loss = F.cross_entropy(object_logits, objects[chosen], label_smoothing=0.05)
        loss = style_loss + object_loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; try a smaller --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            right = (style_logits.argmax(1) == styles[chosen]).float().mean()
            print(
                f"step {step}/{steps}  style loss {style_loss:.3f}  object loss {object_loss:.3f}  "
                f"style right {right:.3f}  {(time.monotonic() - start) / step:.3f} s/step",
                flush=True,
            )
    model.eval()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset_dir", type=Path, default=Path("data/emoji-canvas"), help="%(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="SAFETENSORS")
    parser.add_argument("--architecture", choices=ARCHITECTURES, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer (%(default)s)")
    parser.add_argument("--steps", type=int, default=1800, help="%(default)s")
    parser.add_argument("--batch_size", type=int, default=64, help="%(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="%(default)s")
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="fresh augmentations of each drawing to measure on (%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--min_accuracy", type=float, default=0.99, help="write no file below this (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    drawings = load_drawings(options.dataset_dir)
    model = EmojiClassifier(options.architecture, STYLES, OBJECTS, width=options.width, input_size=INPUT_SIZE)
    print(f"{options.architecture}: {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(
        model,
        drawings,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        generator=generator,
    )
    # Measured as it will be read back: rounded to half precision.
    model.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})
    fresh = torch.Generator().manual_seed(options.seed + EVALUATION_SEED_OFFSET)
    style, object_, style_right, object_right = accuracy(
        model, drawings, fresh, rounds=options.rounds, degraded=False
    )
    print(f"fresh augmentations: style {style:.4f}, object {object_:.4f}")
    hard_style, hard_object, *_ = accuracy(model, drawings, fresh, rounds=options.rounds, degraded=True)
    print(f"fresh degraded augmentations: style {hard_style:.4f}, object {hard_object:.4f}")
    for kind, right in (("style", style_right), ("object", object_right)):
        for index in right.argsort()[:5].tolist():
            if right[index] > 0.95:
                break
            cell, n = divmod(index, DRAWINGS_PER_OBJECT)
            name = f"{STYLES[cell // len(OBJECTS)]}/{OBJECTS[cell % len(OBJECTS)]}/{n + 1}"
            print(f"  {kind} of {name}: right in {right[index]:.2f} of its augmentations")
    if min(style, object_) < options.min_accuracy:
        print(f"nothing written: below --min_accuracy {options.min_accuracy}", file=sys.stderr)
        return 1
    save_classifier(model, options.output, style_accuracy=style, object_accuracy=object_, seed=options.seed)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
