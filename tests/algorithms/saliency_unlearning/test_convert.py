"""The convert command, and runs that read and write checkpoints of other kinds than CompVis' plain one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.scripts.convert import main
from mu.algorithms.saliency_unlearning.utils import UNET_PREFIX
from mu.commands.convert import ConvertConfig
from mu.config import ConfigError, check_paths
from mu.ldm import load_model
from mu.ldm.ema import ema_name
from mu.ldm.tensor_file import read_state_dict, write_state_dict
from mu.unlearning.find_checkpoint import checkpoint_file
from mu.unlearning.moving import TrainingError
from tests.algorithms.saliency_unlearning.conftest import verify_written

ROOT = Path(__file__).parents[3]
# ---- the command


def test_every_format_comes_out_of_the_command(tiny_runs: Any, tmp_path: Path, capsys: Any) -> None:
    source, yaml = str(tiny_runs.checkpoint()), ["--model_config_path", str(tiny_runs.model_config)]
    assert main([source, str(tmp_path / "folder"), *yaml]) == 0
    printed = capsys.readouterr().out
    assert f"Read {source} (CompVis checkpoint: UNet of " in printed
    assert " and wrote it as diffusers.\n" in printed
    assert f"\n  model  {tmp_path / 'folder'}\n" in printed
    assert printed.endswith(f'  StableDiffusionPipeline.from_pretrained("{tmp_path / "folder"}")\n')
    for name in ("back.safetensors", "back.ckpt"):
        assert main([str(tmp_path / "folder"), str(tmp_path / name), *yaml]) == 0
        original, back = read_state_dict(source)[0], read_state_dict(tmp_path / name)[0]
        assert original.keys() == back.keys()
        assert all(torch.equal(original[key], back[key]) for key in original)
    assert main([source, str(tmp_path / "unet.pt"), *yaml]) == 0
    assert "down_blocks.0.resnets.0.conv1.weight" in torch.load(tmp_path / "unet.pt", weights_only=True)
    capsys.readouterr()
    assert main([source, str(tmp_path / "folder"), *yaml]) == 2
    assert "folder is there already; --overwrite true replaces it" in capsys.readouterr().err
    assert main([source, str(tmp_path / "folder"), *yaml, "--overwrite", "true"]) == 0
    assert main([source, str(tmp_path / "x.ckpt"), *yaml, "--use_ema", "true"]) == 1
    assert "has no EMA weights" in capsys.readouterr().err
    assert not (tmp_path / "x.ckpt").exists()


def test_help_and_mistakes_come_without_torch(tmp_path: Path) -> None:
    program = "import sys; from mu.algorithms.saliency_unlearning.scripts.convert import main; "
    program += "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *argv],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )

    helped = run("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "scripts.convert INPUT OUTPUT [--config_path" in helped.stdout
    wrong = run("absent.ckpt", "out.safetensors", "--fromat", "unet")
    assert wrong.returncode == 2
    assert "Did you mean 'format'?" in wrong.stderr
    assert "input_path: there is no file absent.ckpt" in wrong.stderr


def test_a_suffix_in_capitals_makes_no_folder_of_that_name() -> None:
    with pytest.raises(
        ConfigError, match=r"output_path: write the suffix \.SafeTensors in small letters: \.s"
    ):
        ConvertConfig(input_path="a.ckpt", output_path="b.SafeTensors")


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("a.safetensors", "compvis"),
        ("a.ckpt", "compvis"),
        ("a.pth", "compvis"),
        ("unet.pt", "unet"),
        ("unet.bin", "unet"),
        ("folder", "diffusers"),
        ("my-model-v1.5", "diffusers"),
    ],
)
def test_the_format_follows_the_name_of_the_output(output: str, kind: str) -> None:
    assert ConvertConfig(input_path="in.ckpt", output_path=output).output_kind == kind


def test_what_does_not_go_together_is_told() -> None:
    for values, says in (
        ({"input_path": "a"}, "output_path: is missing"),
        (
            {"input_path": "a", "output_path": "b", "format": "compvis"},
            "output_path: format compvis is written",
        ),
        (
            {"input_path": "a", "output_path": "b.ckpt", "format": "unet"},
            "output_path: format unet is written",
        ),
        (
            {"input_path": "a", "output_path": "b.ckpt", "format": "diffusers"},
            "is a folder; b.ckpt looks like",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            ConvertConfig(**values)


# ---- runs


def unlearned(tiny_runs: Any, output_dir: Path, **changes: Any) -> Any:
    config = tiny_runs.train_config(output_dir=str(output_dir), masking="random", epochs=1, **changes)
    return SaliencyUnlearningAlgorithm(config, random_fraction=0.25).run()


def test_from_a_diffusers_folder_to_a_diffusers_folder(tiny_runs: Any, tmp_path: Path) -> None:
    """The same images and mask: the weights that come out are those of a run from the CompVis file."""
    yaml = ["--model_config_path", str(tiny_runs.model_config)]
    assert main([str(tiny_runs.checkpoint()), str(tmp_path / "folder"), *yaml]) == 0
    plain = unlearned(tiny_runs, tmp_path / "plain")
    result = unlearned(
        tiny_runs, tmp_path / "runs", ckpt_path=str(tmp_path / "folder"), output_format="diffusers"
    )
    metadata = read_state_dict(plain["checkpoint"])[1]
    assert metadata["modelspec.title"] == "Noto unlearned"
    assert result["checkpoint"] == result["run"] / "diffusers"
    assert checkpoint_file(str(tmp_path / "runs")) == result["checkpoint"]
    assert result["weights_changed"] == plain["weights_changed"] > 0
    assert check_paths(tiny_runs.train_config(ckpt_path=str(result["run"]), masking="none")) == []
    one = load_model(tiny_runs.model_config, plain["checkpoint"]).state_dict()
    other = load_model(tiny_runs.model_config, result["checkpoint"]).state_dict()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_ema_copy_is_unlearned_too(tiny_runs: Any, tmp_path: Path, use_ema: bool) -> None:
    original = read_state_dict(tiny_runs.checkpoint())[0]
    unet = {key: tensor for key, tensor in original.items() if key.startswith(UNET_PREFIX)}
    ema = {ema_name(key): tensor * 1.01 for key, tensor in unet.items()}
    before = {**original, **ema, "model_ema.num_updates": torch.tensor(5)}
    write_state_dict(before, tmp_path / "before.ckpt")
    result = unlearned(tiny_runs, tmp_path / "runs", ckpt_path=str(tmp_path / "before.ckpt"), use_ema=use_ema)
    after = read_state_dict(result["checkpoint"])[0]
    assert after.keys() == before.keys()
    assert after["model_ema.num_updates"] == 5
    count = 0
    for key in unet:
        start = before[ema_name(key)] if use_ema else before[key]
        moved = after[key] != start
        count += int(moved.sum())
        copy = after[ema_name(key)]
        assert torch.equal(copy[moved], after[key][moved])  # the new values, so nobody gets the old ones back
        assert torch.equal(copy[~moved], before[ema_name(key)][~moved])
    assert count == result["weights_changed"] > 0.1 * result["weights_total"]


def test_an_ema_copy_with_old_values_is_noticed(tmp_path: Path) -> None:
    key = f"{UNET_PREFIX}weight"
    before = {key: torch.tensor([1.0, 2.0]), ema_name(key): torch.tensor([1.5, 2.5])}
    write_state_dict(before, tmp_path / "before.ckpt")
    selected = {"weight": torch.tensor([True, False])}

    def compared(weight: list[float], ema: list[float]) -> int:
        after = {key: torch.tensor(weight), ema_name(key): torch.tensor(ema)}
        write_state_dict(after, tmp_path / "after.ckpt")
        return verify_written(tmp_path / "before.ckpt", tmp_path / "after.ckpt", selected)

    assert compared([3.0, 2.0], [3.0, 2.5]) == 1
    with pytest.raises(TrainingError, match="still has old values of weights that changed"):
        compared([3.0, 2.0], [1.5, 2.5])
    with pytest.raises(
        TrainingError, match=r"model_ema\.diffusion_modelweight differs .* outside what may move"
    ):
        compared([3.0, 2.0], [3.0, 2.0])


def test_half_precision_by_the_command(tiny_runs: Any, tmp_path: Path, capsys: Any) -> None:
    source, yaml = str(tiny_runs.checkpoint()), ["--model_config_path", str(tiny_runs.model_config)]
    assert main([source, str(tmp_path / "f"), *yaml, "--variant", "fp16"]) == 0
    assert " and wrote it as diffusers, in fp16.\n" in capsys.readouterr().out
    file = tmp_path / "f" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    assert {tensor.dtype for tensor in read_state_dict(file)[0].values()} == {torch.float16}
    assert main([source, str(tmp_path / "b.safetensors"), *yaml, "--dtype", "bf16"]) == 0
    made = read_state_dict(tmp_path / "b.safetensors")[0]
    assert made[f"{UNET_PREFIX}out.2.weight"].dtype == torch.bfloat16
    capsys.readouterr()
    for flags, says in (
        (["--variant", "fp16", "--dtype", "bf16"], "variant fp16 says what type the files hold, dtype bf16"),
        (["--variant", "fp16", "--format", "compvis"], "a variant is for format diffusers, not compvis"),
        (["--dtype", "int8"], "source, fp32, fp16, bf16"),
    ):
        assert main([source, str(tmp_path / "x.safetensors"), *yaml, *flags]) == 2
        assert says in capsys.readouterr().err
