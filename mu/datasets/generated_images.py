"""Images that are sampled from the model itself, once, and kept.

They lie at `<folder>/<subfolder>/<model>-<settings>/`. `<model>` is the beginning of the model's fingerprint and
`<settings>` a hash of all that decides how an image looks (steps, guidance, size, ...), both written out in
`manifest.json` there. A seed belongs to an image (style, object, seed), so the same images serve every concept, and a
run samples only those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mu import ranks
from mu.atomic import finish_writes, write_atomically, write_together
from mu.bars import bar
from mu.datasets.canvas import CANVAS_TEMPLATE
from mu.datasets.images import png
from mu.datasets.index import DataError, Row, check_choice
from mu.datasets.streams import initial_noise
from mu.ldm.latent_diffusion import LatentDiffusion
from mu.ldm.params import LatentDiffusionParams
from mu.ldm.tensor_file import fingerprint
from mu.ldm.text_to_image import PRECISIONS, TextToImage, sampling_precision

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleSettings:
    """How images are sampled: DDIM steps, classifier-free guidance scale (1 is none), side in pixels, arithmetic.

    `precision` is one of `PRECISIONS`: "bf16" is bf16 autocast, faster, with images that differ a little; "auto" is it
    on a GPU that computes in bf16 (`GeneratedImages` puts what that means in its place).
    """

    steps: int
    guidance_scale: float
    image_size: int
    precision: str = "fp32"


class GeneratedImages:
    """The images of one model with one set of settings.

    Args:
        model: in eval mode, with a text encoder.
        folder: `path` lies below it.
        subfolder: its name in `folder`, between `folder` and `<model>-<settings>`.
        prompt: how the prompt of an image follows from its place, for the manifest.

    Attributes:
        path: the folder of the styles.
        manifest: all that decides how an image looks, apart from its style, object and seed.

    Raises:
        DataError: the model cannot be sampled from, or not with that many steps.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        folder: Path | str,
        settings: SampleSettings,
        *,
        subfolder: str = "generated",
        prompt: str = CANVAS_TEMPLATE,
    ) -> None:
        if model.cond_stage_model is None:
            raise DataError(
                "dataset_type generated: this model has no text encoder (cond_stage_config: __is_unconditional__), "
                "so it cannot be asked for images of a concept."
            )
        if model.training:
            raise DataError("images are sampled from a model in eval mode: call model.eval() first.")
        check_choice("precision", settings.precision, PRECISIONS)
        if not 1 <= settings.steps <= model.num_timesteps:
            raise DataError(
                f"sample_steps = {settings.steps}: allowed are 1 to {model.num_timesteps} (the model's T)."
            )
        self.model = model
        self.settings = replace(settings, precision=sampling_precision(settings.precision, model.device))
        self.manifest = {
            **_manifest(model.params, self.settings, prompt),
            "model": fingerprint(model.state_dict()),
        }
        described = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()
        weights = self.manifest["model"].removeprefix("sha256:")
        self.path = Path(folder) / subfolder / f"{weights[:12]}-{described[:8]}"

    def sample_missing(self, rows: Sequence[Row], *, batch_size: int, of: str = "") -> int:
        """Samples the images of `rows` that do not exist yet, and returns how many those were.

        `of` says beside the progress which images they are.

        The images of a batch are written together, as soon as it is done: a run that was killed loses one batch, and
        the next one cuts the rest into the same batches, on which their last bits depend. The processes of a run share
        the batches; when one returns, all images are there.

        Raises:
            DataError: an image came out with NaN or Inf, or the folder's manifest says something else.
            OutOfMemoryError: memory does not suffice for one image at a time.
        """

        def lacking() -> list[int]:
            _claim_folder(self.path, self.manifest)
            finish_writes(self.path)
            return [place for place, row in enumerate(rows) if not row.image.exists()]

        missing = [rows[place] for place in ranks.on_main(lacking)]
        if not missing:
            return 0
        steps = self.settings.steps
        _log.info("sampling %d of %d images from the model (%d steps)", len(missing), len(rows), steps)
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        with ranks.in_step():
            self._write_sampled(ranks.share(batches), of)
        return len(missing)

    def _write_sampled(self, batches: Sequence[Sequence[Row]], of: str) -> None:
        count = sum(map(len, batches))
        sampler = TextToImage(
            self.model,
            steps=self.settings.steps,
            shape=self.model.latent_shape(self.settings.image_size),
            precision=self.settings.precision,
        )
        with bar(f"drawing images {of}".rstrip(), total=count, unit="images") as progress:
            sampler.done = progress.update
            for batch in batches:
                files = {}
                for row, image in zip(batch, self._sample(batch, sampler), strict=True):
                    if not torch.isfinite(image).all():
                        raise DataError(
                            f"{row.image}: the model's image for {row.prompt!r} contains NaN or Inf."
                        )
                    files[row.image.relative_to(self.path).as_posix()] = png(image)
                write_together(self.path, files)

    def _sample(self, rows: Sequence[Row], sampler: TextToImage) -> Iterator[Tensor]:
        """Images (3, H, W), about [-1, 1], on the CPU."""
        noise = torch.stack(
            [initial_noise(row.style, row.object, int(row.image.stem), sampler.shape) for row in rows]
        )
        prompts = [row.prompt for row in rows]
        yield from sampler.images(prompts, guidance_scale=self.settings.guidance_scale, noise=noise)


def folders_like(
    folder: Path | str,
    params: LatentDiffusionParams,
    settings: SampleSettings,
    *,
    subfolder: str = "generated",
    prompt: str = CANVAS_TEMPLATE,
) -> list[Path]:
    """What `GeneratedImages.path` was, in earlier runs, of models of this structure with these settings."""
    wanted = _manifest(params, settings, prompt)
    found = []
    for path in sorted((Path(folder) / subfolder).glob("*/manifest.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and {**content, "model": ""} == {**wanted, "model": ""}:
            found.append(path.parent)
    return found


def _manifest(params: LatentDiffusionParams, settings: SampleSettings, prompt: str) -> dict[str, str]:
    """What decides how an image looks, apart from its style, object and seed, and the weights of the model."""
    return {
        "format": "1",
        "model": "",
        "parameterization": str(params.parameterization),
        "scale_factor": repr(params.scale_factor),
        "sampler": "ddim, eta 0",
        "steps": str(settings.steps),
        "guidance_scale": repr(float(settings.guidance_scale)),
        "image_size_px": str(settings.image_size),
        "precision": settings.precision,
        "prompt": prompt,
    }


def _claim_folder(folder: Path, content: dict[str, str]) -> None:
    """Writes manifest.json, or makes sure that the one there says the same."""
    path = folder / "manifest.json"
    if not path.exists():
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found != content:
        raise DataError(
            f"{path} describes other images than are asked for here; move {folder} away and run again."
        )
