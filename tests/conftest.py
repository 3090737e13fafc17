"""A latent diffusion model that is small enough to be built and run in milliseconds, shared by all tests."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mu import launch
from mu.ldm import LatentDiffusion, load_model
from tests.forked_commands import Commands

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for what it starts with `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("WANDB_MODE", None)  # what a developer wants of runs is not meant for those of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that start commands take longest: they come first, so that none is left over for one worker."""
    first = {
        item.path for item in items if isinstance(item, pytest.Function) and "commands" in item.fixturenames
    }
    items.sort(key=lambda item: item.path not in first)


TINY_UNET: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 32,
    "use_checkpoint": False,
    "legacy": False,
}
TINY_AUTOENCODER: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# Sections of `tiny_model_yaml` for a model built as Stable Diffusion v2 is.
TINY_V2: dict[str, Any] = {
    "unet": {"num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True},
    "text": {"num_hidden_layers": 3, "layer": "penultimate"},
    "open_clip": True,
}


def tiny_model_yaml(
    *,
    unet: dict[str, Any] | None = None,
    autoencoder: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    unconditional: bool = False,
    open_clip: bool = False,
    **model: Any,
) -> dict[str, Any]:
    """The content of a CompVis YAML of a tiny model; each argument overrides some options of one section."""
    cond_stage: Any = {
        "target": f"ldm.modules.encoders.modules.Frozen{'OpenCLIP' if open_clip else 'CLIP'}Embedder",
        "params": {**TINY_TEXT, **(text or {})},
    }
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "timesteps": 1000,
                "first_stage_key": "image",
                "cond_stage_key": "caption",
                "scale_factor": 0.5,
                **model,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {**TINY_UNET, **(unet or {})},
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "ddconfig": {**TINY_AUTOENCODER, **(autoencoder or {})},
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": "__is_unconditional__" if unconditional else cond_stage,
            },
        }
    }


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter values that matter: a new model's residual branches end in zeros and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * values + (1.0 if name.endswith("weight") else 0.0))


@pytest.fixture
def make_tiny_model(tmp_path: Path) -> Callable[..., LatentDiffusion]:
    """make_tiny_model(seed=0, dtype=..., **sections): a tiny model with random weights, none of them zero.

    The sections are those of `tiny_model_yaml`.
    """

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **sections: Any) -> LatentDiffusion:
        path = tmp_path / "tiny_of_this_test.yaml"
        path.write_text(yaml.safe_dump(tiny_model_yaml(**sections)), encoding="utf-8")
        model = load_model(path)
        randomise(model, seed)
        return model.cast_weights(dtype)

    return make


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., LatentDiffusion]) -> LatentDiffusion:
    """The default tiny model: images (3, 16, 16), latents (4, 8, 8), contexts (77, 32)."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CompVis YAML of `tiny_model`."""
    path = tmp_path_factory.mktemp("tiny_model") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_model_yaml()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Here and in processes that are started: bits can be compared only where sums are cut alike."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Starts commands as processes of their own."""
    with Commands() as server:
        yield server


@pytest.fixture
def forked_ranks(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """`on_ranks` has its processes forked by the server of `commands`; test_launch.py starts some for real."""
    stand_in = SimpleNamespace(Popen=commands.rank, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(launch, "subprocess", stand_in)
