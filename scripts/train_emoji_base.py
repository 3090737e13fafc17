"""Train the bundled EmojiCanvas base model: autoencoder, then UNet and text encoder.

    python scripts/build_emoji_canvas.py --packages node_modules/@iconify-json --output_dir data/emoji-canvas
    python scripts/train_emoji_base.py --data_dir data/emoji-canvas --run_dir outputs/emoji_base --stage autoencoder
    python scripts/train_emoji_base.py --data_dir data/emoji-canvas --run_dir outputs/emoji_base --stage diffusion
    python scripts/train_emoji_base.py --data_dir data/emoji-canvas --run_dir outputs/emoji_base --stage package

Each stage writes its state to the run folder at intervals and goes on from there when started again. With
`--start_from mu/assets/emoji_canvas` a stage begins with the packaged weights: so better ones are made of the ones that
are there. The diffusion stage takes the autoencoder of the run folder, if there is one, else the packaged one.

An oracle, the model retrained without a concept, by which unlearning is judged (docs/attacks.md):

    python scripts/train_emoji_base.py --data_dir data/emoji-canvas --run_dir outputs/without_noto --stage diffusion \
        --autoencoder_from mu/assets/emoji_canvas --leave_out Noto
    python scripts/train_emoji_base.py --run_dir outputs/without_noto --stage package \
        --output_dir outputs/without_noto/model

`--leave_out` leaves out every picture of the styles and objects it names. UNet and text encoder begin anew; with
`--autoencoder_from` the VAE is that of the packaged model, which no attack here changes.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from augment import augment
from PIL import Image
from torch import Tensor, nn

from mu.datasets.canvas import canvas_prompt
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.ldm import LatentDiffusion, load_model, sample_posterior, save_checkpoint
from mu.ldm.model_config import parse_model_config
from mu.ldm.sampler import sample_ddim

IMAGE_SIZE = 64
DRAWINGS_PER_CELL = 4
KL_WEIGHT = 1e-3
LATENT_NOISE = 0.05
"""Of the latents' standard deviation, added before decoding: the decoder must bear what a sampler leaves over."""
UNCONDITIONAL_SHARE = 0.1
MIN_SNR_GAMMA = 5.0
EMA_DECAY = 0.999


def model_yaml(scale_factor: float = 1.0) -> dict:
    """The model's CompVis YAML."""
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "timesteps": 1000,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": 16,
                "channels": 4,
                "cond_stage_trainable": True,
                "conditioning_key": "crossattn",
                "scale_factor": scale_factor,
                "use_ema": False,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "image_size": 16,
                        "in_channels": 4,
                        "out_channels": 4,
                        "model_channels": 64,
                        "attention_resolutions": [4, 2],
                        "num_res_blocks": 1,
                        "channel_mult": [1, 2, 3],
                        "num_heads": 4,
                        "use_spatial_transformer": True,
                        "transformer_depth": 1,
                        "context_dim": 48,
                        "legacy": False,
                    },
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "ddconfig": {
                            "double_z": True,
                            "z_channels": 4,
                            "resolution": IMAGE_SIZE,
                            "in_channels": 3,
                            "out_ch": 3,
                            "ch": 32,
                            "ch_mult": [1, 2, 2],
                            "num_res_blocks": 1,
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                    "params": {
                        "hidden_size": 48,
                        "intermediate_size": 128,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                    },
                },
            },
        }
    }


def kept_cells(leave_out: Sequence[str]) -> Tensor:
    """Places on the grid of styles and objects, counted a style at a time, that have none of these concepts."""
    cells = [(style, obj) for style in STYLES for obj in OBJECTS]
    return torch.tensor([n for n, cell in enumerate(cells) if not set(cell) & set(leave_out)])


def load_drawings(data_dir: Path) -> Tensor:
    """(styles, objects, drawings, 3, H, W) uint8."""
    paths = [
        data_dir / style / obj / f"{n}.png"
        for style in STYLES
        for obj in OBJECTS
        for n in range(1, DRAWINGS_PER_CELL + 1)
    ]
    images = [
        torch.frombuffer(bytearray(Image.open(p).convert("RGB").tobytes()), dtype=torch.uint8) for p in paths
    ]
    side = Image.open(paths[0]).width
    stacked = torch.stack(images).view(-1, side, side, 3).permute(0, 3, 1, 2)
    return stacked.reshape(len(STYLES), len(OBJECTS), DRAWINGS_PER_CELL, 3, side, side)


def to_float(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def save_state(path: Path, state: dict) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def update_ema(ema: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Clock:
    """Prints the averages of the values seen since the last line."""

    def __init__(self, every: int) -> None:
        self.every, self.sums, self.start = every, {}, time.time()

    def tick(self, step: int, steps: int, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if (step + 1) % self.every == 0:
            means = "  ".join(f"{name} {total / self.every:.4f}" for name, total in self.sums.items())
            seconds = (time.time() - self.start) / self.every
            print(f"step {step + 1}/{steps}  {means}  {seconds:.2f} s a step", flush=True)
            self.sums, self.start = {}, time.time()


def image_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of the pixels, of their differences along both axes (edges stay sharp) and of the differences between
    colour channels (hues stay apart), at full, half, quarter and eighth size."""
    total = torch.zeros((), device=output.device)
    for _ in range(4):
        total = total + F.l1_loss(output, target)
        for dim in (2, 3):
            total = total + F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
        total = total + F.l1_loss(output - output.roll(1, dims=1), target - target.roll(1, dims=1))
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return total / 2


def swap_colours(images: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the colour channels of half of the images (N, 3, H, W): rare hues become as common as others."""
    for i in range(0, len(images), 2):
        images[i] = images[i][torch.randperm(3, generator=generator)]
    return images


def train_autoencoder(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    drawings = load_drawings(args.data_dir).flatten(0, 2)
    if args.start_from is not None:
        model = load_model(args.start_from / "model_config.yaml", args.start_from / "model.safetensors")
    else:
        model = LatentDiffusion(parse_model_config(model_yaml()["model"]))
    model = model.first_stage_model.to(args.device)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr or 1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    path, start = args.run_dir / "autoencoder.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    steps, clock = args.steps or 5000, Clock(50)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(len(drawings), (args.batch_size or 16,), generator=generator)
        images = swap_colours(augment(to_float(drawings[rows]), generator, size=IMAGE_SIZE), generator)
        images = images.to(args.device)
        noise = torch.randn((2, len(images), *latent_shape(model)), generator=generator).to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr or 1e-3, 100)
        with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.bf16):
            mean, logvar = model.encode(images)
            mean, logvar = mean.float(), logvar.float()
            z = sample_posterior(mean, logvar, noise[0], 1.0)
            z = z + LATENT_NOISE * mean.detach().std() * noise[1]
            output = model.decode(z).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = image_loss(output, images) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step)
        clock.tick(step, steps, loss=loss.item(), l1=F.l1_loss(output, images).item(), kl=kl.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_state(path, state | {"step": step + 1})
            with torch.no_grad():
                pair = torch.cat([images[:12], ema.decode(ema.encode(images[:12])[0])])
            save_grid(pair, args.run_dir / "autoencoder.png", columns=12)


def latent_shape(model: nn.Module) -> tuple[int, int, int]:
    params = model.params
    return params.embed_dim, IMAGE_SIZE // params.factor, IMAGE_SIZE // params.factor


@torch.no_grad()
def encode_drawings(model: LatentDiffusion, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Posterior moments of many placements of each drawing, kept in the run folder: two of (cells, K, C, h, w)."""
    path = args.run_dir / "moments.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["mean"], state["logvar"]
    drawings = load_drawings(args.data_dir).flatten(0, 2)
    generator = torch.Generator().manual_seed(args.seed)
    moments = []
    for i in range(args.placements):
        for rows in torch.arange(len(drawings)).split(84):
            images = augment(
                to_float(drawings[rows]), generator, size=IMAGE_SIZE, strength=args.augmentation
            ).to(args.device)
            with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.bf16):
                mean, logvar = model.encode(images)
            moments.append(torch.stack([mean, logvar]).half().cpu())
        if (i + 1) % 8 == 0:
            print(f"encoded {i + 1}/{args.placements} placements of each drawing", flush=True)
    cells = len(STYLES) * len(OBJECTS)
    both = torch.cat(moments, dim=1).unflatten(
        1, (args.placements, cells, DRAWINGS_PER_CELL)
    )  # (2, K, cells, 4, ...)
    both = both.permute(0, 2, 1, 3, 4, 5, 6).flatten(2, 3).contiguous()
    save_state(path, {"mean": both[0].clone(), "logvar": both[1].clone()})
    return both[0], both[1]


def train_diffusion(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.start_from is not None:
        model = load_model(args.start_from / "model_config.yaml", args.start_from / "model.safetensors")
    else:
        model = LatentDiffusion(parse_model_config(model_yaml()["model"]))
    autoencoder = args.run_dir / "autoencoder.pt"
    packaged = args.autoencoder_from or args.start_from
    packaged_autoencoder = packaged is not None and not autoencoder.exists()
    if packaged_autoencoder:  # written out: the package stage takes it from there
        source = load_model(packaged / "model_config.yaml", packaged / "model.safetensors")
        save_state(
            autoencoder,
            {"ema": source.first_stage_model.state_dict(), "scale_factor": source.scale_factor},
        )
    encoder = torch.load(autoencoder, weights_only=True)
    model.first_stage_model.load_state_dict(encoder["ema"])
    model.to(args.device)
    mean, logvar = encode_drawings(model, args)
    total_variance = mean.float().var() + logvar.float().exp().mean()
    scale_factor = encoder.get("scale_factor", round(1 / total_variance.sqrt().item(), 4))
    kept = kept_cells(args.leave_out)
    prompts = [canvas_prompt(obj, style) for style in STYLES for obj in OBJECTS] + [""]

    trained = nn.ModuleDict({"unet": model.unet, "text": model.cond_stage_model})
    ema = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    path, start = args.run_dir / "diffusion.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=args.device)
        trained.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, scale_factor = state["step"], state["scale_factor"]
        if state.get("leave_out", []) != args.leave_out:
            raise SystemExit(
                f"{path} is of --leave_out {' '.join(state.get('leave_out', [])) or '(nothing)'}"
            )
    print(
        f"scale_factor {scale_factor}; {sum(p.numel() for p in model.unet.parameters()):,} UNet parameters",
        flush=True,
    )

    tokens = tokenize_once(prompts).to(args.device)
    snr = model.alphas_cumprod / (1 - model.alphas_cumprod)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr  # Hang et al. 2023, equation 6 for noise prediction
    weights = weights / weights.mean()
    steps, peak, clock = args.steps or 6500, args.lr or 1e-3, Clock(50)
    batch_size = args.batch_size or 64
    network = torch.compile(model.unet) if args.compile else model.unet
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        cells = kept[torch.randint(len(kept), (batch_size,), generator=generator)]
        placements = torch.randint(mean.shape[1], (batch_size,), generator=generator)
        noise = torch.randn((2, batch_size, *mean.shape[2:]), generator=generator).to(args.device)
        # One timestep from each of batch_size equal parts of the schedule: less variance than independent draws.
        offsets = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        timesteps = (offsets * model.num_timesteps).long().to(args.device)
        dropped = torch.rand(batch_size, generator=generator) < UNCONDITIONAL_SHARE
        rows = torch.where(dropped, torch.tensor(len(prompts) - 1), cells).to(args.device)
        moments = (moment[cells, placements].float().to(args.device) for moment in (mean, logvar))
        latents = sample_posterior(*moments, noise[0], scale_factor)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 200)
        with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.bf16):
            used, position = rows.unique(return_inverse=True)
            context = embed_tokens(model, tokens[used])[position]
            prediction = network(model.q_sample(latents, timesteps, noise[1]), timesteps, context).float()
        error = (prediction - noise[1]).square().mean(dim=(1, 2, 3))  # (B,)
        loss = (weights[timesteps] * error).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, trained, step)
        clock.tick(step, steps, loss=loss.item(), mse=error.mean().item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "model": trained.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            state |= {"step": step + 1, "scale_factor": scale_factor, "leave_out": args.leave_out}
            save_state(path, state)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            package(args, args.run_dir / "preview")


def tokenize_once(prompts: list[str]) -> Tensor:
    from mu.ldm.text_encoder import tokenize

    return tokenize(prompts)


def embed_tokens(model: LatentDiffusion, tokens: Tensor) -> Tensor:
    return model.cond_stage_model.transformer["text_model"](input_ids=tokens).last_hidden_state  # (B, 77, D)


def package(args: argparse.Namespace, output_dir: Path) -> None:
    """Write the EMA weights in fp16 with their YAML, and one sample of each prompt."""
    state = torch.load(args.run_dir / "diffusion.pt", weights_only=True, map_location="cpu")
    output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(model_yaml(state["scale_factor"]), sort_keys=False)
    header = "# The EmojiCanvas base model (scripts/train_emoji_base.py), as CompVis writes a model.\n"
    if left_out := state.get("leave_out"):
        header += (
            f"# Trained without {' and '.join(left_out)}: no picture of it was seen but by the autoencoder.\n"
        )
    (output_dir / "model_config.yaml").write_text(header + text, encoding="utf-8")
    model = load_model(output_dir / "model_config.yaml")
    model.first_stage_model.load_state_dict(
        torch.load(args.run_dir / "autoencoder.pt", weights_only=True)["ema"]
    )
    nn.ModuleDict({"unet": model.unet, "text": model.cond_stage_model}).load_state_dict(state["ema"])
    names = {name for name, _ in model.named_parameters()}
    model.file_dtypes = {key: torch.float16 if key in names else torch.float32 for key in model.state_dict()}
    save_checkpoint(model, output_dir / "model.safetensors")
    size = (output_dir / "model.safetensors").stat().st_size
    print(f"wrote {output_dir / 'model.safetensors'}: {size / 1e6:.1f} MB, step {state['step']}", flush=True)
    model = load_model(output_dir / "model_config.yaml", output_dir / "model.safetensors", device=args.device)
    images = []
    with torch.no_grad(), torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.bf16):
        for style in STYLES:
            latents = sample_ddim(
                model,
                model.embed([canvas_prompt(obj, style) for obj in OBJECTS]),
                shape=model.latent_shape(),
                steps=20,
                guidance_scale=args.guidance_scale,
                uncond_context=model.embed([""]),
                generator=torch.Generator().manual_seed(7),
            )
            images.append(model.decode(latents).float().cpu())
    save_grid(torch.cat(images), output_dir / "samples.png", columns=len(OBJECTS))


def save_grid(images: Tensor, path: Path, *, columns: int) -> None:
    rows = len(images) // columns
    grid = (
        images.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    )  # (H, W, 3)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().contiguous()
    Image.fromarray(pixels.numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=["autoencoder", "diffusion", "package"], required=True)
    parser.add_argument("--data_dir", type=Path, default=Path("data/emoji-canvas"))
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/emoji_base"))
    parser.add_argument(
        "--output_dir", type=Path, default=Path("mu/assets/emoji_canvas"), help="of --stage package"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--steps", type=int, help="default: 5000 for the autoencoder, 6500 for the diffusion model"
    )
    parser.add_argument(
        "--batch_size", type=int, help="default: 16 for the autoencoder, 64 for the diffusion model"
    )
    parser.add_argument("--lr", type=float, help="peak learning rate; default: 1e-3")
    parser.add_argument(
        "--placements", type=int, default=64, help="augmented copies of each drawing to encode"
    )
    parser.add_argument(
        "--augmentation",
        type=float,
        default=0.3,
        help="strength of the copies' augmentation; 1: as the classifiers'",
    )
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="of the sample grids")
    parser.add_argument("--start_from", type=Path, help="folder with model.safetensors and model_config.yaml")
    parser.add_argument(
        "--autoencoder_from",
        type=Path,
        help="the same; the diffusion stage takes the autoencoder alone from it",
    )
    parser.add_argument(
        "--leave_out",
        nargs="+",
        default=[],
        choices=[*STYLES, *OBJECTS],
        metavar="CONCEPT",
        help="styles and objects of which the diffusion stage sees no picture",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="compile the UNet")
    args = parser.parse_args()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    if args.stage == "autoencoder":
        train_autoencoder(args)
    elif args.stage == "diffusion":
        train_diffusion(args)
    else:
        package(args, args.output_dir)


if __name__ == "__main__":
    main()
