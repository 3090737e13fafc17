"""What every attack is given, and what it gives back: how the concept's images are drawn under it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mu.atomic import write_atomically
from mu.config import as_dict
from mu.datasets.canvas import CANVAS_TEMPLATE, style_words
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.index import Row
from mu.datasets.streams import initial_noise, passes
from mu.evaluation.attacks.config import AttackConfig
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.tensor_file import write_state_dict
from mu.ldm.text_to_image import TextToImage, sampling_precision
from mu.unlearning.batches import EncodedRows
from mu.unlearning.inversion import Noised

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """Where a drawing begins other than from noise: latents (B, C, h, w), as noisy as the DDIM step `step` has them."""

    latents: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the images of the concept's prompts are drawn under an attack. What is None is as without one.

    Attributes:
        stage: its name among those of one attack.
        label: all that decides these images beside the model, their prompts and their seeds.
        model: what draws.
        prompt: the text in the place of a row's prompt.
        context: contexts (B, L, D) of rows in the place of their prompts.
        begin: where rows begin; given what DDIM's first step would have got, (B, C, h, w).
        learnt: what is told of it: plain values for JSON.
    """

    stage: str = "attacked"
    label: str
    model: LatentDiffusion
    prompt: Callable[[Row], str] | None = None
    context: Callable[[Sequence[Row]], Tensor] | None = None
    begin: Callable[[Sequence[Row], Tensor], Begun] | None = None
    learnt: Mapping[str, Any] = field(default_factory=dict)


class DrawnImages(GeneratedImages):
    """The images of a drawing, kept as `GeneratedImages` are; the folder is found from the attacked model."""

    def __init__(
        self, attacked: LatentDiffusion, folder: Path | str, settings: SampleSettings, drawing: Drawing
    ) -> None:
        super().__init__(
            attacked, folder, settings, subfolder="grids", prompt=f"{CANVAS_TEMPLATE} under {drawing.label}"
        )
        self.model = drawing.model
        self.drawing = drawing

    def _sample(self, rows: Sequence[Row], sampler: TextToImage) -> Iterator[Tensor]:
        given = self.drawing
        noise = torch.stack(
            [initial_noise(row.style, row.object, int(row.image.stem), sampler.shape) for row in rows]
        )
        begun = Begun(noise, 0) if given.begin is None else given.begin(rows, noise)
        yield from sampler.images(
            [row.prompt if given.prompt is None else given.prompt(row) for row in rows],
            guidance_scale=self.settings.guidance_scale,
            noise=begun.latents,
            context=None if given.context is None else given.context(rows),
            first_step=begun.step,
        )


class Kept:
    """What an attack has learnt from one model, in one file: as it stands now, and at the end.

    Learning that was stopped goes on from it, and what was learnt once is not learnt again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes; None where nothing is kept, or what is kept is damaged, as a warning then says."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["notes"])  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            _log.warning("%s is damaged (%s): what it held is learnt again", self.path, error)
            return None

    def write(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Whole, or not at all."""
        write_state_dict(tensors, self.path, {"notes": json.dumps(notes)})

    def write_text(self, text: str) -> None:
        """A text beside it, for people."""
        path, content = self.path.with_suffix(".txt"), f"{text}\n".encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is attacked.

    Attributes:
        model: with weights that ask for no gradient.
        model_fingerprint: of its weights.
        called: the concept's name in the prompts.
        rows: the concept's prompts and seeds, as images without an attack.
        images: of the concept, to learn from; None where an attack needs none.
        images_digest: of their files.
        base: loads the model before unlearning; None where there is none.
        folder: of grids and of what is learnt.
        is_drawn: whether all images of a drawing with this label are there.
    """

    config: AttackConfig
    model: LatentDiffusion
    model_fingerprint: str
    called: str
    rows: Sequence[Row]
    images: EncodedRows | None
    images_digest: str
    base: Callable[[], LatentDiffusion] | None
    folder: Path
    is_drawn: Callable[[str], bool]

    @property
    def learnt_from(self) -> EncodedRows:
        """The images, of an attack that needs some."""
        assert self.images is not None
        return self.images

    @property
    def half(self) -> bool:
        """Whether the networks compute in bf16."""
        return sampling_precision(self.config.precision, self.model.device) == "bf16"

    def label(self, prefix: str, **more: object) -> str:
        """The attack, with a digest of its keys (those that begin with `prefix`), its images, and of `more`."""
        keys = {key: value for key, value in as_dict(self.config).items() if key.startswith(prefix)}
        said = {
            **keys,
            "seed": self.config.attack_seed,
            "images": self.images_digest,
            "half": self.half,
            "concept": [self.config.template, self.config.template_name],
            **more,
        }
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=list).encode()).hexdigest()
        return f"{self.config.attack} {digest[:16]}"

    def kept(self, label: str, *, weights: str | None = None) -> Kept:
        """The file of what is learnt under this label, from weights with this fingerprint; None: from the model's."""
        weights = (weights or self.model_fingerprint).removeprefix("sha256:")[:12]
        return Kept(self.folder / "learnt" / f"{weights}-{label.replace(' ', '-')}.safetensors")

    def batch(self, step: int, size: int) -> tuple[list[Row], Noised]:
        """The images of a step: shuffled passes over them, with draws that are functions of seed and step."""
        seed, images = self.config.attack_seed, self.learnt_from
        wanted = list(passes(seed, "attack", len(images.rows), start=step * size, stop=(step + 1) * size))
        drawn = images.batch(wanted, seed=seed, stage="attack", num_timesteps=self.model.num_timesteps)
        return [images.rows[place] for _, place in wanted], Noised(*drawn)


class Attack(Protocol):
    """One attack."""

    def drawings(self, target: Target) -> Iterator[Drawing]:
        """What is to be drawn, one after another: each when the one before it has been drawn."""
        ...


def around_name(row: Row, template: str) -> tuple[str, str]:
    """The prompt's texts before and after the concept's name."""
    if template == "style":
        before, _, after = row.prompt.rpartition(f"in {style_words(row.style)} style")
        return f"{before}in", f"style{after}"
    before, _, after = row.prompt.partition(f"A {row.object.replace('_', ' ')} image")
    return f"{before}A", f"image{after}"
