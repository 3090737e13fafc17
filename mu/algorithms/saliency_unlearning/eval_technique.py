"""An unlearned checkpoint as a technique of the benchmark library eval_unlearn (`eval_unlearn.techniques`).

The library finds the class by its entry point and asks it for images; it is no dependency of this package, and nothing
of it is imported here.
"""

from __future__ import annotations

import difflib
import secrets
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mu.algorithms.saliency_unlearning.configs import SampleConfig
from mu.algorithms.saliency_unlearning.sampling import SamplingError, sample_images
from mu.algorithms.saliency_unlearning.utils import model_of
from mu.arithmetic import run_arithmetic
from mu.config import ConfigError, load_config, override, require_paths
from mu.config_file import ConfigFileError, Text, read_flat_file
from mu.datasets.images import to_picture
from mu.devices import device_names

_OPTIONS = ("sample_steps", "guidance_scale", "eta", "image_size", "batch_size", "precision")
_OTHER_NAMES = {"num_inference_steps": "sample_steps"}
_SEED_LIMIT = 2**32


class SaliencyUnlearningTechnique:
    """Loads an unlearned checkpoint, and generates.

    Args:
        ckpt_path: a checkpoint file, the folder of a training run, or a folder of runs, whose newest is taken.
        model_config_path: CompVis YAML of its structure. Default: the one named in `config.yaml` beside the checkpoint,
            as every training run leaves it; without such a file, Stable Diffusion v1.
        devices: one CUDA device number, or "cpu". The `sample` command is what works on several at once.
        options: how images are sampled, as the keys of the `sample` command: `sample_steps` (also as
            `num_inference_steps`), `guidance_scale`, `eta`, `image_size`, `batch_size`, `precision`.

    Raises:
        TypeError: an option is unknown.
        ConfigError: an option has a wrong value, or a path is missing.
        CheckpointError: the checkpoint cannot be read, or is not this model's.
    """

    def __init__(
        self,
        ckpt_path: str | Path,
        model_config_path: str | Path | None = None,
        *,
        devices: str = "0",
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"ckpt_path": ckpt_path, "devices": devices, **_named(options)}
        given["prompts"] = ("brought by each call",)  # a SampleConfig without prompts is a mistake
        if model_config_path is not None:
            given["model_config_path"] = model_config_path
        config = load_config(SampleConfig, overrides=given)
        if len(device_names(config.devices)) > 1:
            raise ConfigError(
                [f"devices: {config.devices} are several; images are generated in this process: name one"]
            )
        if model_config_path is None:
            config = _as_trained(config)
        require_paths(config)
        self.config = config
        self.model = model_of(config)
        self.seeds: tuple[int, ...] = ()
        """Seeds of the images of the last call, with which the same images can be made again."""

    def generate(
        self, prompts: str | Sequence[str], seed: int | Sequence[int] | None = None, **kw: Any
    ) -> list[Image.Image]:
        """One image for each prompt, in order.

        A seed belongs to its image: the same prompt and seed give the same image, whatever else is asked for in the
        call (but for rounding).

        Args:
            prompts: one or more.
            seed: for all prompts, where the second image of the same prompt has seed + 1, and so on; or one for each
                prompt. None: drawn anew for each image, see `seeds`.
            kw: options as of the class, for this call.

        Raises:
            TypeError: an option is unknown.
            ConfigError: an option has a wrong value.
            ValueError: there are not as many seeds as prompts, or a seed is out of range.
            SamplingError: an image has NaN or Inf.
        """
        config = override(self.config, **_named(kw))
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        self.seeds = _seeds(asked, seed)
        pairs = list(zip(asked, self.seeds, strict=True))
        sampled = sample_images(
            self.model,
            pairs,
            steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
            eta=config.eta,
            batch_size=config.batch_size,
            image_size=config.image_size,
            precision=config.precision,
        )
        pictures = []
        with run_arithmetic():
            for image, (prompt, own_seed) in zip(sampled, pairs, strict=True):
                if not torch.isfinite(image).all():
                    raise SamplingError(f"the image of {prompt!r} with seed {own_seed} contains NaN or Inf")
                pictures.append(to_picture(image))
        return pictures


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """Options under this package's names. Raises TypeError for an unknown one, or one that is there twice."""
    named: dict[str, Any] = {}
    for name, value in options.items():
        own = _OTHER_NAMES.get(name, name)
        if own not in _OPTIONS:
            allowed = (*_OPTIONS, *_OTHER_NAMES)
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"there is no option {name!r}; known: {', '.join(allowed)}.{hint}")
        if own in named:
            raise TypeError(f"{own} and {name} are one option; give one of the two")
        named[own] = value
    return named


def _seeds(prompts: Sequence[str], seed: int | Sequence[int] | None) -> tuple[int, ...]:
    if seed is None:
        return tuple(secrets.randbelow(_SEED_LIMIT) for _ in prompts)
    if isinstance(seed, (int, Integral)):
        before: Counter[str] = Counter()
        seeds = []
        for prompt in prompts:
            seeds.append(int(seed) + before[prompt])
            before[prompt] += 1
    else:
        seeds = [int(one) for one in seed]
    if len(seeds) != len(prompts):
        raise ValueError(
            f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed, or one for each prompt"
        )
    wrong = [one for one in seeds if not 0 <= one < _SEED_LIMIT]
    if wrong:
        raise ValueError(f"the seed {wrong[0]} is not in 0..{_SEED_LIMIT - 1}")
    return tuple(seeds)


def _as_trained(config: SampleConfig) -> SampleConfig:
    """The config with the model YAML that the run's own config names, where the checkpoint is of a run."""
    path = config.checkpoint().parent / "config.yaml"
    if not path.is_file():
        return config
    try:
        named = read_flat_file(path).values.get("model_config_path")
    except ConfigFileError as error:
        raise ConfigError([f"ckpt_path: the run's {error}; give model_config_path"]) from error
    if not isinstance(named, Text):
        raise ConfigError([f"ckpt_path: {path} names no model_config_path; give it"])
    return override(config, model_config_path=named.raw)
