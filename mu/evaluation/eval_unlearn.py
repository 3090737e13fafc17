"""An unlearned checkpoint as a technique of the benchmark library eval_unlearn (`eval_unlearn.techniques`).

The library finds the class by its entry point and asks it for images; it is no dependency of this package, and nothing
of it is imported here.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mu.arithmetic import run_arithmetic
from mu.config import ConfigError, load_config, override, require_paths
from mu.config_file import ConfigFileError, Text, Value, read_flat_file
from mu.config_keys import is_null
from mu.config_names import nearest
from mu.datasets.images import to_picture
from mu.datasets.index import concept_label
from mu.datasets.seen_prompts import cut_notes
from mu.devices import device_names
from mu.evaluation.config import SampleConfig
from mu.ldm.text_to_image import SamplingError, sample_images
from mu.unlearning.config import model_of

_OPTIONS = ("sample_steps", "guidance_scale", "eta", "image_size", "batch_size", "precision")
_OTHER_NAMES = {"num_inference_steps": "sample_steps"}
_SEED_LIMIT = 2**32
_log = logging.getLogger(__name__)


class SaliencyUnlearningTechnique:
    """Loads an unlearned checkpoint, and generates.

    Args:
        ckpt_path: a checkpoint file, the folder of a training run, or a folder of runs, whose newest is taken.
        model_config_path: CompVis YAML of its structure. Default: the one named in `config.yaml` beside the checkpoint,
            as every training run leaves it; without such a file, Stable Diffusion v1.
        devices: one CUDA device number, or "cpu"; "0" without it. The `sample` command is what works on several.
        device: the same as torch and the library name it, such as "cuda", "cuda:1" or "cpu".
        erase_concept: what was forgotten, under which the library files its reports; its metric err wants "nudity".
            Default: what the run's own config names.
        options: how images are sampled, as the keys of the `sample` command: `sample_steps` (also as
            `num_inference_steps`), `guidance_scale`, `eta`, `image_size`, `batch_size`, `precision`.

    Attributes:
        erase_concept: the concept, None where neither the caller nor a run's config names it.
        seeds: of the images of the last call, with which the same images can be made again.

    Raises:
        TypeError: an option is unknown, or given under two names.
        ConfigError: an option has a wrong value, or a path is missing.
        CheckpointError: the checkpoint cannot be read, or is not this model's.
    """

    def __init__(
        self,
        ckpt_path: str | Path,
        model_config_path: str | Path | None = None,
        *,
        devices: str | None = None,
        device: str | int | torch.device | None = None,
        erase_concept: str | None = None,
        **options: Any,
    ) -> None:
        if devices is not None and device is not None:
            raise TypeError("devices and device are one option; give one of the two")
        own = devices or _device_number(device)
        given: dict[str, Any] = {"ckpt_path": ckpt_path, "devices": own, **_named(options)}
        given["prompts"] = ("brought by each call",)  # a SampleConfig without prompts is a mistake
        if model_config_path is not None:
            given["model_config_path"] = model_config_path
        config = load_config(SampleConfig, overrides=given)
        if len(device_names(config.devices)) > 1:
            raise ConfigError(
                [f"devices: {config.devices} are several; images are generated in this process: name one"]
            )
        trained = _trained(config) if model_config_path is None or erase_concept is None else None
        if model_config_path is None and trained is not None:
            config = _as_trained(config, trained)
        self.erase_concept = erase_concept or _concept(trained)
        require_paths(config)
        self.config = config
        self.model = model_of(config)
        self._cut_said = False
        self.seeds: tuple[int, ...] = ()

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
        if not self._cut_said and (notes := cut_notes(self.model.params, asked)):
            _log.warning("%s; further ones are not told", notes[0])
            self._cut_said = True
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
            known = ", ".join(allowed)
            raise TypeError(f"there is no option {name!r}; known: {known}.{nearest(name, allowed)}")
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


def _device_number(device: str | int | torch.device | None) -> str:
    """A device as torch names it, as the key `devices` does: "cuda:1" is "1"."""
    text = "cuda" if device is None else str(device)
    kind, _, number = text.partition(":")
    return (number or "0") if kind == "cuda" else text


def _trained(config: SampleConfig) -> dict[str, Value] | None:
    """What the config of the checkpoint's own training run says, where it lies beside it."""
    path = config.checkpoint().parent / "config.yaml"
    if not path.is_file():
        return None
    try:
        return read_flat_file(path).values
    except ConfigFileError as error:
        raise ConfigError(
            [f"ckpt_path: the run's {error}; give model_config_path and erase_concept"]
        ) from error


def _as_trained(config: SampleConfig, trained: dict[str, Value]) -> SampleConfig:
    """The config with the model YAML that the training run's names."""
    named = trained.get("model_config_path")
    if not isinstance(named, Text):
        path = config.checkpoint().parent / "config.yaml"
        raise ConfigError([f"ckpt_path: {path} names no model_config_path; give it"])
    return override(config, model_config_path=str(named))


def _concept(trained: dict[str, Value] | None) -> str | None:
    """The name of what a training run forgot, of several with `+` between."""
    named = (trained or {}).get("template_name")
    if named is None or is_null(named):
        return None
    return concept_label(tuple(str(text) for text in (named if isinstance(named, list) else [named])))
