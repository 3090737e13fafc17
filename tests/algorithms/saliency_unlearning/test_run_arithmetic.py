"""Whole runs: which arithmetic each network is in, and the same bits from the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.commands import sampling
from mu.config import dump
from mu.evaluation.config import SampleConfig
from mu.evaluation.eval_unlearn import SaliencyUnlearningTechnique
from mu.ldm.autoencoder import AutoencoderKL
from mu.ldm.unet import UNet
from mu.unlearning import progress
from tests.forked_commands import SCRIPTS, Commands

Seen = set[tuple[str, bool, bool]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(network, whether gradients are taken, whether TF32 is allowed anywhere) of every pass."""
    found: Seen = set()

    def allowed_somewhere() -> bool:
        return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32

    def watch(owner: type[nn.Module], method: str) -> None:
        whole = getattr(owner, method)

        def watched(self: Any, *args: Tensor) -> Any:
            allowed = allowed_somewhere()
            if not isinstance(args[0], FakeTensor):  # those of an estimate, in which nothing is computed
                found.add((f"{owner.__name__}.{method}", torch.is_grad_enabled(), allowed))
            return whole(self, *args)

        monkeypatch.setattr(owner, method, watched)

    for owner, method in ((UNet, "forward"), (AutoencoderKL, "encode"), (AutoencoderKL, "decode")):
        watch(owner, method)
    validation_losses = progress.validation_losses

    def validated(*args: Any) -> Any:
        found.add(("validation", False, allowed_somewhere()))
        return validation_losses(*args)

    monkeypatch.setattr(progress, "validation_losses", validated)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_all_but_the_gradients_is_in_real_fp32(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen, precision: str
) -> None:
    """torch's own default lets cuDNN round the factors of convolutions: not where a cache or a picture says fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    places = {"processed_dataset_dir": str(tmp_path / "processed"), "output_dir": str(tmp_path / "runs")}
    MaskingAlgorithm(tiny_runs.mask_config(**places, precision=precision)).run()
    rounded = precision != "fp32"
    exact = {("UNet.forward", False, False), ("AutoencoderKL.decode", False, False)}
    assert seen == {*exact, ("AutoencoderKL.encode", False, False), ("UNet.forward", True, rounded)}
    seen.clear()
    config = tiny_runs.train_config(
        **places,
        precision=precision,
        masking="none",
        epochs=1,
        sample_prompts=("A Cats image, in Noto style.",),
        sample_seeds=(1,),
        sample_every_steps=1,
        validate_every_steps=1,
    )
    result = SaliencyUnlearningAlgorithm(config).run()
    # Without gradient: the targets of training with the rest of its step; pictures and validation in fp32.
    training = {("UNet.forward", True, rounded), ("UNet.forward", False, rounded)}
    encoded = {("AutoencoderKL.encode", False, False)}  # those to retain
    assert seen == {*exact, *encoded, *training, ("validation", False, False)}
    assert torch.backends.cudnn.allow_tf32

    seen.clear()
    model = {"ckpt_path": str(result["checkpoint"]), "model_config_path": str(tiny_runs.model_config)}
    few = {"devices": "cpu", "sample_steps": 1, "guidance_scale": 1.0}
    sampling.run(SampleConfig(**model, **few, prompts=("a",), output_dir=str(tmp_path / "samples")))
    SaliencyUnlearningTechnique(**model, **few).generate("a", seed=1)
    assert seen == exact


def test_a_caller_with_torchs_newer_interface_does_not_end_the_run(tiny_runs: Any, tmp_path: Path) -> None:
    """torch raises where the two contradict each other, as in `torch.get_float32_matmul_precision()`."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older interface alone")
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        config = tiny_runs.train_config(
            output_dir=str(tmp_path), masking="none", epochs=1, precision="bf16-mixed"
        )
        assert SaliencyUnlearningAlgorithm(config).run()["steps"] == 2
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("devices", ["cpu", pytest.param("0", marks=pytest.mark.gpu)])
def test_promise_24_deterministic_commands_give_the_same_bits(
    tiny_runs: Any, tmp_path: Path, commands: Commands, devices: str
) -> None:
    """On a GPU, from torch's defaults in everything else."""
    files: dict[str, list[dict[str, Tensor]]] = {"mask_0.5.safetensors": [], "model.safetensors": []}
    for turn in ("one", "two"):
        places = {"output_dir": str(tmp_path / turn), "processed_dataset_dir": str(tmp_path / turn / "data")}
        mask = tiny_runs.mask_config(**places, devices=devices, deterministic=True)
        train = tiny_runs.train_config(
            **places,
            devices=devices,
            deterministic=True,
            mask_path=str(tmp_path / turn),
            patch=False,
            report=False,
        )
        for name, config in (("generate_mask", mask), ("train", train)):
            path = tmp_path / f"{turn}_{name}.yaml"
            path.write_text(dump(config), encoding="utf-8")
            log = tmp_path / "log"
            code = commands.run(f"{SCRIPTS}.{name}", log, "--config_path", str(path))
            assert code == 0, log.read_text(encoding="utf-8")
        for name, found in files.items():
            (path,) = (tmp_path / turn).rglob(name)
            found.append(load_file(path))  # the header names the config's paths
    for one, other in files.values():
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
