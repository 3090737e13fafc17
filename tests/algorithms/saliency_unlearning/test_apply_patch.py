"""The apply_patch command, and patches that training runs write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.scripts.apply_patch import main
from mu.algorithms.saliency_unlearning.scripts.convert import main as convert
from mu.algorithms.saliency_unlearning.utils import UNET_PREFIX, unet_fingerprint
from mu.commands.apply_patch import ApplyPatchConfig
from mu.config import ConfigError, check_paths
from mu.ldm import load_model
from mu.ldm.ema import ema_name, with_ema_weights
from mu.ldm.patch import bits_of, load_patch
from mu.ldm.tensor_file import read_state_dict, write_state_dict

ROOT = Path(__file__).parents[3]


def differing(one: Path | dict[str, Tensor], other: Path | dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in both, to the bit."""
    left, right = (read_state_dict(it)[0] if isinstance(it, Path) else it for it in (one, other))
    shared = left.keys() & right.keys()
    changed = {key for key in shared if not torch.equal(bits_of(left[key]), bits_of(right[key]))}
    return sorted((left.keys() ^ right.keys()) | changed)


def unlearned(tiny_runs: Any, output_dir: Path, **changes: Any) -> Any:
    wanted = {
        "output_dir": str(output_dir),
        "masking": "random",
        "epochs": 1,
        "random_fraction": 0.25,
        **changes,
    }
    return SaliencyUnlearningAlgorithm(tiny_runs.train_config(**wanted)).run()


def run(*argv: object) -> int:
    return main([str(word) for word in argv])


# ---- what a training run writes


@pytest.mark.parametrize("name", ["tiny", "half"])
def test_the_patch_of_a_run_makes_its_checkpoint_and_undoes_it(
    tiny_runs: Any, tmp_path: Path, name: str, capsys: Any
) -> None:
    base = tiny_runs.checkpoint(name)
    result = unlearned(tiny_runs, tmp_path / "runs", ckpt_path=str(base), train_method="xattn")
    patch = load_patch(result["patch"])
    assert patch.weights_changed == result["weights_changed"] > 0
    assert patch.base_fingerprint == unet_fingerprint(load_model(tiny_runs.model_config, base))
    assert patch.metadata == {
        "template": "style",
        "template_name": "Noto",
        "train_method": "xattn",
        "masking": "random",
        "use_ema": False,
    }
    assert all("attn2" in key for key in patch.tensors)
    capsys.readouterr()
    # The folder of the run stands for its patch, and one of runs for that of the newest.
    assert run(base, tmp_path / "newest.safetensors", "--patches", tmp_path / "runs", "--quiet") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'newest.safetensors'}\n"
    assert differing(tmp_path / "newest.safetensors", result["checkpoint"]) == []
    assert run(base, tmp_path / "there.safetensors", "--patches", result["run"]) == 0
    assert capsys.readouterr().out.endswith(
        f"Put on 1 patch: {patch.weights_changed:,} weights changed.\n  model  {tmp_path / 'there.safetensors'}\n"
    )
    assert differing(tmp_path / "there.safetensors", result["checkpoint"]) == []
    argv = [result["run"], tmp_path / "back.safetensors", "--patches", result["patch"], "--remove", "true"]
    assert run(*argv) == 0
    assert differing(tmp_path / "back.safetensors", base) == []


def test_without_the_key_there_is_no_patch(tiny_runs: Any, tmp_path: Path) -> None:
    result = unlearned(tiny_runs, tmp_path, patch=False)
    assert result["patch"] is None
    assert not list(tmp_path.rglob("*.patch.safetensors"))


@pytest.mark.parametrize("use_ema", [False, True])
def test_ema_copies_are_in_the_patch(tiny_runs: Any, tmp_path: Path, use_ema: bool) -> None:
    original = read_state_dict(tiny_runs.checkpoint())[0]
    ema = {ema_name(key): t * 1.01 for key, t in original.items() if key.startswith(UNET_PREFIX)}
    before = {**original, **ema, "model_ema.num_updates": torch.tensor(5)}
    base = tmp_path / "before.ckpt"
    write_state_dict(before, base)
    flags = ["--use_ema", "true"] if use_ema else []
    result = unlearned(tiny_runs, tmp_path / "runs", ckpt_path=str(base), use_ema=use_ema)
    assert run(base, tmp_path / "there.ckpt", "--patches", result["patch"], *flags) == 0
    assert differing(tmp_path / "there.ckpt", result["checkpoint"]) == []
    argv = ["--patches", result["patch"], "--remove", "true"]
    assert run(tmp_path / "there.ckpt", tmp_path / "back.ckpt", *argv) == 0
    started = with_ema_weights(before, source=base) if use_ema else before
    assert differing(read_state_dict(tmp_path / "back.ckpt")[0], started) == []
    if use_ema:
        assert run(base, tmp_path / "no.ckpt", "--patches", result["patch"]) == 1
        assert not (tmp_path / "no.ckpt").exists()


def test_diffusers_folders(tiny_runs: Any, tmp_path: Path, capsys: Any) -> None:
    yaml = ["--model_config_path", tiny_runs.model_config]
    folder, there, back = (tmp_path / name for name in ("folder", "there", "back"))
    assert convert([str(word) for word in (tiny_runs.checkpoint(), folder, *yaml)]) == 0
    result = unlearned(
        tiny_runs, tmp_path / "runs", ckpt_path=str(folder), output_format="diffusers", train_method="xattn"
    )
    assert run(folder, there, "--patches", result["patch"], *yaml) == 0
    assert run(there, back, "--patches", result["patch"], "--remove", "true", *yaml) == 0
    unet = "unet/diffusion_pytorch_model.safetensors"
    for one, other in ((there, result["checkpoint"]), (back, folder)):
        files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
        assert differing(one / unet, other / unet) == []
    assert differing(there / unet, folder / unet) != []
    # It is a patch of the same weights in the other form, too.
    base = tiny_runs.checkpoint()
    assert run(base, tmp_path / "x.safetensors", "--patches", result["patch"]) == 0
    assert run(base, tmp_path / "x", "--patches", result["patch"]) == 1
    assert "convert makes one form from the other" in capsys.readouterr().err


# ---- the command


def test_patches_that_overlap(tiny_runs: Any, tmp_path: Path, capsys: Any) -> None:
    one, two = (
        unlearned(tiny_runs, tmp_path / str(seed), seed=seed, train_method="xattn")["patch"]
        for seed in (0, 1)
    )
    base, sum_ = tiny_runs.checkpoint(), tmp_path / "sum.safetensors"
    assert run(base, sum_, "--patches", f"{one},{two}") == 1
    assert "both change " in capsys.readouterr().err
    assert not sum_.exists()
    assert run(base, sum_, "--patches", f"{one},{two}", "--overlap", "add") == 0
    combined = tmp_path / "sum.patch.safetensors"
    assert f"patch to take it off again  {combined}\n" in capsys.readouterr().out
    argv = ["--patches", f"{two},{one}", "--overlap", "add"]
    assert run(base, tmp_path / "other.safetensors", *argv) == 0
    assert differing(sum_, tmp_path / "other.safetensors") == []
    assert run(sum_, tmp_path / "back.safetensors", "--patches", combined, "--remove", "true") == 0
    assert differing(tmp_path / "back.safetensors", base) == []


def test_another_base_is_refused(tiny_runs: Any, tmp_path: Path, capsys: Any) -> None:
    patch = unlearned(tiny_runs, tmp_path / "runs")["patch"]
    assert run(tiny_runs.checkpoint("other"), tmp_path / "x.safetensors", "--patches", patch) == 1
    said = capsys.readouterr().err
    assert "do not hold the values that it was made from" in said
    assert load_patch(patch).base_fingerprint in said
    assert not (tmp_path / "x.safetensors").exists()


def test_help_and_mistakes_come_without_torch(tmp_path: Path) -> None:
    program = "import sys; from mu.algorithms.saliency_unlearning.scripts.apply_patch import main; "
    program += "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"

    def apart(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *argv],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )

    helped = apart("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "scripts.apply_patch INPUT OUTPUT [--config_path" in helped.stdout
    (tmp_path / "run").mkdir()
    wrong = apart("absent.ckpt", "out.safetensors", "--patches", "a.safetensors,run", "--overlapp", "add")
    assert wrong.returncode == 2
    assert "Did you mean 'overlap'?" in wrong.stderr
    assert "input_path: there is no file absent.ckpt" in wrong.stderr
    assert "patches: there is no file a.safetensors" in wrong.stderr
    assert "patches: there is no file run/model.patch.safetensors" in wrong.stderr


def test_a_patch_that_is_given_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    patch = tmp_path / "run" / "model.patch.safetensors"
    patch.write_bytes(b"")
    config = ApplyPatchConfig(
        input_path="in.ckpt",
        output_path=str(tmp_path / "out.ckpt"),
        patches=(str(tmp_path / "run"), str(patch)),
    )
    assert f"patches: {patch} is given twice; once is enough" in check_paths(config)


def test_what_does_not_go_together_is_told() -> None:
    whole = {"input_path": "a", "output_path": "b.ckpt", "patches": ("p",)}
    for changes, says in (
        ({"input_path": None}, "input_path: is missing"),
        ({"output_path": None}, "output_path: is missing"),
        ({"patches": None}, "patches: is missing"),
        ({"remove": True, "overlap": "add"}, "removing adds nothing up"),
    ):
        with pytest.raises(ConfigError, match=says):
            ApplyPatchConfig(**{**whole, **changes})
