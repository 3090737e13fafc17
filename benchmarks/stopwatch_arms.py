"""Two other ways to unlearn, which the stopwatch compares with this library (`stopwatch_ours.py`).

- `Plain`: written after the public description of the SalUn authors' procedure. fp32; the autoencoder and the text
  encoder run for each batch; attention written out; each batch's gradients are copied to the CPU and summed there; two
  argsorts rank all saliencies; the mask is int64; torch's Adam on gradients that are multiplied by the mask.
- `Careful`: what a good engineer writes in a day. Latents and prompt embeddings computed once, torch's fused attention,
  bf16 autocast, both guidance branches in one call, the threshold by torch.topk, torch's Adam on masked gradients.
They compute what the library computes, from the same random draws: tests compare masks and first updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mu.datasets.streams import Draw
from mu.ldm import LatentDiffusion, sample_posterior
from mu.unlearning.moving import names_of

C_GUIDANCE = 7.5
ALPHA = 0.5
LR = 1e-5

Values = dict[str, Tensor]
"""UNet-relative name -> tensor of the weight's shape."""


class Example(NamedTuple):
    """An image, and everything that is drawn at random for it; on the CPU."""

    name: str
    image: Tensor
    """(3, H, W) in [-1, 1]."""
    draw: Draw


@dataclass(frozen=True)
class Examples:
    """Images of different names, and one prompt for all of them."""

    prompt: str
    rows: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def cut(self, first: int, size: int) -> Examples:
        """Rows first..first+size-1, from the beginning again after the last."""
        rows = range(first, first + size)
        return Examples(self.prompt, tuple(self.rows[row % len(self)] for row in rows))

    def batches(self, size: int) -> list[Examples]:
        """Of `size`; the last may be short."""
        return [self.cut(first, min(size, len(self) - first)) for first in range(0, len(self), size)]


@contextmanager
def attention_written_out() -> Iterator[None]:
    """softmax(Q K^T / sqrt(d)) V in the place of torch's fused attention; masked attention stays torch's."""
    fused = F.scaled_dot_product_attention

    def written_out(q: Tensor, k: Tensor, v: Tensor, *masks: object, **options: object) -> Tensor:
        if masks or options:
            return fused(q, k, v, *masks, **options)  # type: ignore[arg-type]
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, N, L)
        return weights @ v  # (B, heads, N, dim_head)

    F.scaled_dot_product_attention = written_out  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


class Arm:
    """One way through both stages. Methods are called in this order; `saliency` to `save_mask` need no training."""

    def __init__(self, model: LatentDiffusion, *, substitute: str, autocast: bool) -> None:
        self.model = model
        self.substitute = substitute
        self.device = model.device
        self.autocast = autocast
        """bf16 autocast, where the arm has it."""

    def encode(self, examples: Examples) -> None:
        """What the arm computes once for all batches of these images."""

    def saliency(self, batches: Iterable[Examples]) -> Values:
        """|gradient of the mean forget loss|, where the arm keeps it."""
        raise NotImplementedError

    @staticmethod
    def mask(saliency: Values, threshold: float) -> Values:
        """1 for the most salient `threshold` of all weights, 0 elsewhere; in the arm's dtype."""
        raise NotImplementedError

    def save_mask(self, mask: Values, folder: Path) -> Path:
        path = folder / "mask.pt"
        torch.save(mask, path)
        return path

    def start_training(self, mask: Values, train_method: str) -> None:
        """Make the optimizer: dense Adam."""
        names = set(names_of(self.model.unet, train_method))
        self.model.requires_grad_(False)
        self.moving = {name: p for name, p in self.model.unet.named_parameters() if name in names}
        for parameter in self.moving.values():
            parameter.requires_grad_(True)
        self.kept = {name: mask[name].to(self.device) for name in self.moving}
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.moving.values(), lr=LR)

    def step(self, forget: Examples, retain: Examples) -> None:
        """One update of the weights, by gradients that are multiplied by the mask."""
        predict = self.model.predict_noise
        noisy, timesteps, _ = self.noised(forget)
        retain_noisy, retain_timesteps, noise = self.noised(retain)
        prompts = ((forget, forget.prompt), (forget, self.substitute), (retain, retain.prompt))
        context, substituted, retain_context = (self.context(prompt, len(batch)) for batch, prompt in prompts)
        with self.precision():
            with torch.no_grad():
                target = predict(noisy, timesteps, substituted).float()  # (B, C, h, w)
            prediction = predict(noisy, timesteps, context).float()  # (B, C, h, w)
            retained = predict(retain_noisy, retain_timesteps, retain_context).float()  # (B', C, h, w)
        loss = F.mse_loss(prediction, target) + ALPHA * F.mse_loss(retained, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in self.moving.items():
            if parameter.grad is not None:
                parameter.grad *= self.kept[name]
        self.optimizer.step()

    def save_model(self, folder: Path) -> Path:
        raise NotImplementedError

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def moments(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, C, h, w) of the posterior of each image."""
        raise NotImplementedError

    def context(self, prompt: str, count: int) -> Tensor:
        """A prompt's embedding, `count` times: (B, L, D)."""
        raise NotImplementedError

    def latents(self, batch: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents, a sample of the posterior, with t and eps, on the device."""
        mean, logvar = self.moments(batch)
        timesteps = torch.tensor([row.draw.timestep for row in batch.rows]).to(self.device)
        noise, posterior_noise = (
            torch.stack(which).to(self.device)
            for which in zip(*((row.draw.noise, row.draw.posterior_noise) for row in batch.rows), strict=True)
        )
        latents = sample_posterior(mean.float(), logvar.float(), posterior_noise, self.model.scale_factor)
        return latents, timesteps, noise

    def noised(self, batch: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """z_t, t and eps on the device."""
        latents, timesteps, noise = self.latents(batch)
        return self.model.q_sample(latents, timesteps, noise).to(self.model.dtype), timesteps, noise


class Plain(Arm):
    """The authors' procedure, as it is described in public."""

    def precision(self) -> AbstractContextManager[object]:
        return nullcontext()

    @torch.no_grad()
    def moments(self, batch: Examples) -> tuple[Tensor, Tensor]:
        images = torch.stack([row.image for row in batch.rows])
        return self.model.encode(images.to(self.device, self.model.dtype))

    @torch.no_grad()
    def context(self, prompt: str, count: int) -> Tensor:
        return self.model.embed([prompt] * count)

    def saliency(self, batches: Iterable[Examples]) -> Values:
        self.model.eval()
        parameters = dict(self.model.unet.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        sums = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in parameters.items()}
        images = 0
        with attention_written_out():
            for batch in batches:
                noisy, timesteps, noise = self.noised(batch)
                context, empty = (self.context(prompt, len(batch)) for prompt in (batch.prompt, ""))
                conditional = self.model.predict_noise(noisy, timesteps, context).float()  # (B, C, h, w)
                unconditional = self.model.predict_noise(noisy, timesteps, empty).float()  # (B, C, h, w)
                guided = (1 + C_GUIDANCE) * conditional - C_GUIDANCE * unconditional
                (len(batch) * F.mse_loss(guided, noise)).backward()
                images += len(batch)
                for name, parameter in parameters.items():
                    assert parameter.grad is not None
                    sums[name] += parameter.grad.cpu()
                    parameter.grad = None
        return {name: (total / images).abs().float() for name, total in sums.items()}

    @staticmethod
    def mask(saliency: Values, threshold: float) -> Values:
        every = -torch.cat([values.flatten() for values in saliency.values()])  # (n,)
        kept = int(threshold * len(every))
        order = torch.argsort(every, stable=True)  # (n,)
        ranks = torch.argsort(order).split([values.numel() for values in saliency.values()])
        mask = {}
        for (name, values), rank in zip(saliency.items(), ranks, strict=True):
            mask[name] = torch.zeros(values.shape, dtype=torch.int64)
            mask[name][rank.view(values.shape) < kept] = 1
        return mask

    def step(self, forget: Examples, retain: Examples) -> None:
        with attention_written_out():
            super().step(forget, retain)

    def save_model(self, folder: Path) -> Path:
        path = folder / "model.ckpt"
        torch.save({"state_dict": self.model.state_dict()}, path)
        return path


class Careful(Arm):
    """A day's good work with torch alone. Posterior moments and embeddings of prompts are computed once."""

    def __init__(self, model: LatentDiffusion, *, substitute: str, autocast: bool) -> None:
        super().__init__(model, substitute=substitute, autocast=autocast)
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}
        self.contexts: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, examples: Examples) -> None:
        """One image after the other, as the library does, so that neither arm needs memory for more."""
        for name, image, _ in examples.rows:
            mean, logvar = self.model.encode(image[None].to(self.device, self.model.dtype))
            self.encoded[name] = mean.float(), logvar.float()  # each (1, C, h, w)
        for prompt in (examples.prompt, self.substitute, ""):
            if prompt not in self.contexts:
                self.contexts[prompt] = self.model.embed([prompt])  # (1, L, D)

    def moments(self, batch: Examples) -> tuple[Tensor, Tensor]:
        means, logvars = zip(*(self.encoded[row.name] for row in batch.rows), strict=True)
        return torch.cat(means), torch.cat(logvars)

    def context(self, prompt: str, count: int) -> Tensor:
        return self.contexts[prompt].expand(count, -1, -1)

    def saliency(self, batches: Iterable[Examples]) -> Values:
        self.model.eval()
        self.model.unet.requires_grad_(True)
        images = 0
        for batch in batches:
            noisy, timesteps, noise = self.noised(batch)
            contexts = torch.cat([self.context(prompt, len(batch)) for prompt in (batch.prompt, "")])
            with self.precision():
                both = self.model.predict_noise(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), contexts)
            conditional, unconditional = both.float().chunk(2)  # two of (B, C, h, w)
            guided = (1 + C_GUIDANCE) * conditional - C_GUIDANCE * unconditional
            (len(batch) * F.mse_loss(guided, noise)).backward()
            images += len(batch)
        saliency = {}
        for name, parameter in self.model.unet.named_parameters():
            assert parameter.grad is not None
            saliency[name] = parameter.grad.div_(images).abs_().float()
            parameter.grad = None
        return saliency

    @staticmethod
    def mask(saliency: Values, threshold: float) -> Values:
        every = torch.cat([values.flatten() for values in saliency.values()])  # (n,)
        edge = torch.topk(every, int(threshold * len(every)), sorted=False).values.min()  # ()
        return {name: values >= edge for name, values in saliency.items()}

    def save_model(self, folder: Path) -> Path:
        path = folder / "model.safetensors"
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, path)
        return path
