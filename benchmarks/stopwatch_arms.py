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

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mu.ldm import LatentDiffusion, sample_posterior
from mu.unlearning.moving import names_of

C_GUIDANCE = 7.5
ALPHA = 0.5
LR = 1e-5

Values = dict[str, Tensor]
"""UNet-relative name -> tensor of the weight's shape."""


@dataclass(frozen=True)
class Examples:
    """Images, one prompt for all of them, and everything that is drawn at random for them; all on the CPU."""

    names: tuple[str, ...]
    """All different."""
    images: tuple[Tensor, ...]
    """N of (3, H, W) in [-1, 1]."""
    prompt: str
    timesteps: Tensor
    """(N,)"""
    noise: Tensor
    """(N, C, h, w)"""
    posterior_noise: Tensor
    """(N, C, h, w)"""

    def __len__(self) -> int:
        return len(self.images)

    def cut(self, first: int, size: int) -> Examples:
        """Rows first..first+size-1, from the beginning again after the last."""
        rows = [row % len(self) for row in range(first, first + size)]
        return Examples(
            tuple(self.names[row] for row in rows),
            tuple(self.images[row] for row in rows),
            self.prompt,
            self.timesteps[rows],
            self.noise[rows],
            self.posterior_noise[rows],
        )

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
        """Make the optimizer."""
        names = set(names_of(self.model.unet, train_method))
        self.model.requires_grad_(False)
        self.moving = {name: p for name, p in self.model.unet.named_parameters() if name in names}
        for parameter in self.moving.values():
            parameter.requires_grad_(True)
        self.kept = {name: mask[name].to(self.device) for name in self.moving}
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.moving.values(), lr=LR)

    def step(self, forget: Examples, retain: Examples) -> None:
        """One update of the weights."""
        raise NotImplementedError

    def save_model(self, folder: Path) -> Path:
        raise NotImplementedError

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def sampled(self, mean: Tensor, logvar: Tensor, batch: Examples) -> Tensor:
        """Scaled latents (B, C, h, w), a sample of the posterior."""
        noise = batch.posterior_noise.to(self.device)
        return sample_posterior(mean.float(), logvar.float(), noise, self.model.scale_factor)

    def _masked_update(self) -> None:
        """A step of dense Adam on gradients multiplied by the mask."""
        for name, parameter in self.moving.items():
            if parameter.grad is not None:
                parameter.grad *= self.kept[name]
        self.optimizer.step()

    def noised(self, latents: Tensor, batch: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """z_t, t and eps on the device."""
        timesteps, noise = batch.timesteps.to(self.device), batch.noise.to(self.device)
        return self.model.q_sample(latents, timesteps, noise).to(self.model.dtype), timesteps, noise


class Plain(Arm):
    """The authors' procedure, as it is described in public."""

    @torch.no_grad()
    def _latents(self, batch: Examples) -> Tensor:
        mean, logvar = self.model.encode(torch.stack(batch.images).to(self.device, self.model.dtype))
        return self.sampled(mean, logvar, batch)  # (B, C, h, w)

    @torch.no_grad()
    def _context(self, prompt: str, count: int) -> Tensor:
        return self.model.embed([prompt] * count)  # (B, L, D)

    def saliency(self, batches: Iterable[Examples]) -> Values:
        self.model.eval()
        parameters = dict(self.model.unet.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        sums = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in parameters.items()}
        images = 0
        with attention_written_out():
            for batch in batches:
                noisy, timesteps, noise = self.noised(self._latents(batch), batch)
                context = self._context(batch.prompt, len(batch))
                empty = self._context("", len(batch))
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
        predict = self.model.predict_noise
        self.optimizer.zero_grad()
        with attention_written_out():
            noisy, timesteps, _ = self.noised(self._latents(forget), forget)
            prediction = predict(noisy, timesteps, self._context(forget.prompt, len(forget))).float()
            with torch.no_grad():
                target = predict(noisy, timesteps, self._context(self.substitute, len(forget))).float()
            loss = F.mse_loss(prediction, target)
            noisy, timesteps, noise = self.noised(self._latents(retain), retain)
            prediction = predict(noisy, timesteps, self._context(retain.prompt, len(retain))).float()
            loss = loss + ALPHA * F.mse_loss(prediction, noise)
            loss.backward()
        self._masked_update()

    def save_model(self, folder: Path) -> Path:
        path = folder / "model.ckpt"
        torch.save({"state_dict": self.model.state_dict()}, path)
        return path


class EncodedOnce(Arm):
    """Keeps the posterior's moments of all images, and the embedding of each prompt."""

    def __init__(self, model: LatentDiffusion, *, substitute: str, autocast: bool) -> None:
        super().__init__(model, substitute=substitute, autocast=autocast)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.contexts: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, examples: Examples) -> None:
        """One image after the other, as the library does, so that neither arm needs memory for more."""
        for name, image in zip(examples.names, examples.images, strict=True):
            mean, logvar = self.model.encode(image[None].to(self.device, self.model.dtype))
            self.moments[name] = mean.float(), logvar.float()  # each (1, C, h, w)
        for prompt in (examples.prompt, self.substitute, ""):
            if prompt not in self.contexts:
                self.contexts[prompt] = self.model.embed([prompt])  # (1, L, D)

    def _latents(self, batch: Examples) -> Tensor:
        means, logvars = zip(*(self.moments[name] for name in batch.names), strict=True)
        return self.sampled(torch.cat(means), torch.cat(logvars), batch)  # (B, C, h, w)

    def _context(self, prompt: str, count: int) -> Tensor:
        return self.contexts[prompt].expand(count, -1, -1)  # (B, L, D)


class Careful(EncodedOnce):
    """A day's good work with torch alone."""

    def saliency(self, batches: Iterable[Examples]) -> Values:
        self.model.eval()
        self.model.unet.requires_grad_(True)
        images = 0
        for batch in batches:
            noisy, timesteps, noise = self.noised(self._latents(batch), batch)
            contexts = torch.cat([self._context(prompt, len(batch)) for prompt in (batch.prompt, "")])
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

    def step(self, forget: Examples, retain: Examples) -> None:
        predict = self.model.predict_noise
        noisy, timesteps, _ = self.noised(self._latents(forget), forget)
        retain_noisy, retain_timesteps, noise = self.noised(self._latents(retain), retain)
        with self.precision():
            with torch.no_grad():
                target = predict(noisy, timesteps, self._context(self.substitute, len(forget))).float()
            prediction = predict(noisy, timesteps, self._context(forget.prompt, len(forget))).float()
            retained = predict(retain_noisy, retain_timesteps, self._context(retain.prompt, len(retain)))
        loss = F.mse_loss(prediction, target) + ALPHA * F.mse_loss(retained.float(), noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._masked_update()

    def save_model(self, folder: Path) -> Path:
        path = folder / "model.safetensors"
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, path)
        return path
