"""Plans of tiny runs, against the runs themselves and against what stands in their way."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.saliency_unlearning.mask_file import MaskError, load_mask, save_mask
from mu.algorithms.saliency_unlearning.scripts import generate_mask, train
from mu.config import ConfigError, as_dict, as_text, keys_of
from mu.datasets.data_sets import data_set_of
from mu.datasets.index import DataError
from mu.ldm.ema import ema_name
from mu.ldm.tensor_file import CheckpointError, read_state_dict, write_state_dict
from mu.unlearning.inspection import Inspection
from mu.unlearning.plan import Plan, disk_problems

SD_V1 = "package:algorithms/saliency_unlearning/configs/model_config.yaml"


@pytest.fixture(scope="module")
def made(tiny_runs: Any) -> dict[str, Any]:
    """A mask run with its plan from before."""
    config = tiny_runs.mask_config(threshold=(0.25, 0.5), batch_size=3)
    plan = MaskingAlgorithm(config).plan()
    return {"plan": plan, "result": MaskingAlgorithm(config).run()}


def bytes_of(plan: Plan, what: str) -> int:
    (found,) = [planned.bytes for planned in plan.files if planned.what == what]
    return found


def every_file(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def argv_of(config: Any) -> list[str]:
    defaults = {key.name: key for key in keys_of(type(config))}
    return [
        word
        for name, value in as_dict(config).items()
        if value != defaults[name].default
        for word in (f"--{name}", as_text(value, split=defaults[name].rule.split))
    ]


def test_the_plan_of_a_mask_is_what_the_run_does(made: dict[str, Any]) -> None:
    plan, result = made["plan"], made["result"]
    assert plan.can_run
    assert (plan.stage, plan.device, plan.steps) == ("mask", "cpu", 2)
    assert plan.images["forget"] == result["images"] == 4
    assert plan.weights["total"] == result["total"]
    assert plan.weights["selected"] == result["kept"][0.5]
    written = sum(path.stat().st_size for path in result["masks"].values())
    assert bytes_of(plan, "mask_*.safetensors") == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"masking": "saliency"},
        pytest.param(
            {"masking": "random", "train_method": "xattn", "output_format": "ckpt"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"masking": "none", "output_format": "diffusers", "patch": False}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"masking": "random", "random_fraction": 0.01, "output_format": "pth"}, marks=pytest.mark.slow
        ),
        pytest.param({"masking": "random", "save_dtype": "fp16"}, marks=pytest.mark.slow),
    ],
)
def test_the_plan_of_training_is_what_the_run_does(
    made: dict[str, Any], tiny_runs: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    mask = {"mask_path": str(made["result"]["masks"][0.5])} if changes["masking"] == "saliency" else {}
    config = tiny_runs.train_config(output_dir=str(tmp_path), batch_size=3, **changes, **mask)
    plan = SaliencyUnlearningAlgorithm(config).plan()
    assert not list(tmp_path.iterdir())
    result = SaliencyUnlearningAlgorithm(config).run()
    assert plan.can_run
    assert plan.steps == result["steps"]
    assert plan.weights["total"] == result["weights_total"]
    # Of a random mask only the whole is known, not how many of a tensor it marks.
    assert plan.weights["selected"] == pytest.approx(result["weights_selected"], rel=0.02)
    checkpoint = result["checkpoint"]
    files = (
        [path for path in checkpoint.rglob("*") if path.is_file()] if checkpoint.is_dir() else [checkpoint]
    )
    written = sum(path.stat().st_size for path in files)
    assert bytes_of(plan, checkpoint.name) == pytest.approx(written, rel=0.1)
    if result["patch"] is not None:
        written = result["patch"].stat().st_size
        assert written <= bytes_of(plan, result["patch"].name) < 1.5 * written
    else:
        assert all("patch" not in planned.what for planned in plan.files)


def test_latents_and_embeddings_have_the_planned_sizes(tiny_runs: Any, tmp_path: Path) -> None:
    config = tiny_runs.mask_config(processed_dataset_dir=str(tmp_path / "p"), output_dir=str(tmp_path / "m"))
    plan = MaskingAlgorithm(config).plan()
    assert plan.images["to_sample"] == 4
    MaskingAlgorithm(config).run()
    latents = list((tmp_path / "p" / "latents").rglob("*px/*/*.safetensors"))
    assert len(latents) == 2
    assert bytes_of(plan, "latents/*.safetensors") == pytest.approx(
        sum(path.stat().st_size for path in latents), rel=0.1
    )
    (prompts,) = (tmp_path / "p" / "latents").rglob("prompts-*.safetensors")
    assert bytes_of(plan, "latents/prompts-*.safetensors") == pytest.approx(prompts.stat().st_size, rel=0.1)
    again = MaskingAlgorithm(config).plan()
    assert again.images["to_sample"] == 0, "they are there now"


def test_a_checkpoint_of_the_run_has_the_planned_size(
    tiny_runs: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    sizes = []
    from mu.unlearning import checkpoints as module

    def noting(path: Path) -> None:
        sizes.append(path.stat().st_size)

    monkeypatch.setattr(module, "verify_run_state", noting)
    config = tiny_runs.train_config(
        output_dir=str(tmp_path), masking="random", checkpoint_every_steps=1, keep_checkpoints=1
    )
    plan = SaliencyUnlearningAlgorithm(config).make_plan()
    planned, one_more = (planned for planned in plan.files if planned.what.startswith("checkpoints/"))
    assert planned.certain
    assert (one_more.certain, one_more.bytes) == (False, planned.bytes)
    SaliencyUnlearningAlgorithm(config).run()
    assert planned.bytes == pytest.approx(max(sizes), rel=0.1)


# ---- what stands in the way


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mu.ldm.load_model", fail)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_promise_17_too_little_disk_stops_a_run_before_the_model_loads(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    config = tiny_runs.train_config(output_dir=str(tmp_path), masking="none")
    with pytest.raises(ConfigError, match=r"output_dir.*: this run writes .* MB; 1.0 MB are free there"):
        SaliencyUnlearningAlgorithm(config).run_here()
    assert not list(tmp_path.iterdir())
    # Of checkpoints that may never be written, it is said.
    Usage.free = sum(
        planned.bytes for planned in SaliencyUnlearningAlgorithm(config).make_plan().files if planned.certain
    )
    plan = SaliencyUnlearningAlgorithm(config).make_plan()
    assert plan.can_run
    assert "checkpoints/step-*.safetensors" in plan.warnings[0]
    every = tiny_runs.train_config(output_dir=str(tmp_path), masking="none", checkpoint_every_steps=1)
    assert not SaliencyUnlearningAlgorithm(every).make_plan().can_run


def test_what_is_there_already_does_not_stop_a_run(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ("latents/*.safetensors", "latents/prompts-*.safetensors")
    cached = sum(bytes_of(made["plan"], what) for what in folders)
    free = bytes_of(made["plan"], "mask_*.safetensors") + cached // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    problems, warnings = disk_problems(made["plan"].files)
    assert problems == []
    assert "latents/*.safetensors" in warnings[0]


def test_checkpoints_of_the_run_that_goes_on_are_not_counted_again(tiny_runs: Any, tmp_path: Path) -> None:
    keys = {"masking": "none", "checkpoint_every_steps": 1, "output_dir": str(tmp_path)}
    new = SaliencyUnlearningAlgorithm(tiny_runs.train_config(**keys)).make_plan().files
    (size,) = [planned.bytes for planned in new if planned.what == "checkpoints/step-*.safetensors"]
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000002.safetensors").write_bytes(bytes(size // 2))
    (folder / ".step-00000003.safetensors.x.tmp").write_bytes(bytes(1000))
    for resume in ("newest", str(folder.parent)):
        plan = SaliencyUnlearningAlgorithm(tiny_runs.train_config(resume=resume, **keys)).make_plan()
        assert bytes_of(plan, "checkpoints/step-*.safetensors") == size - size // 2 - 1000
        needed = [sum(planned.bytes for planned in files if planned.certain) for files in (new, plan.files)]
        assert needed[1] <= needed[0]
    # One that lies elsewhere goes on in a new folder, with checkpoints of its own.
    elsewhere = {**keys, "output_dir": str(tmp_path / "others"), "resume": str(folder.parent)}
    plan = SaliencyUnlearningAlgorithm(tiny_runs.train_config(**elsewhere)).make_plan()
    assert bytes_of(plan, "checkpoints/step-*.safetensors") == size


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_checkpoint_of_another_structure_stops_a_run_before_it_is_loaded(
    tiny_runs: Any, tmp_path: Path
) -> None:
    state = torch.zeros(3)
    torch.save({"state_dict": {"model.diffusion_model.out.0.weight": state}}, tmp_path / "x.ckpt")
    config = tiny_runs.mask_config(ckpt_path=str(tmp_path / "x.ckpt"), output_dir=str(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=r"is a CompVis checkpoint without its VAE .* and text encoder"):
        MaskingAlgorithm(config).run_here()
    assert not (tmp_path / "m").exists()


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_mask_of_another_structure_stops_a_run_before_the_model_loads(
    made: dict[str, Any], tiny_runs: Any, tmp_path: Path
) -> None:
    mask = load_mask(made["result"]["masks"][0.5])
    name = next(iter(mask))
    mask[name] = mask[name].repeat(2, *[1] * (mask[name].ndim - 1))
    save_mask(mask, tmp_path / "mask_x.safetensors", {"concept": "Noto"})
    config = tiny_runs.train_config(
        mask_path=str(tmp_path / "mask_x.safetensors"), output_dir=str(tmp_path / "runs")
    )
    with pytest.raises(MaskError, match=f"the mask is of another model: 1 of another shape .{name}"):
        SaliencyUnlearningAlgorithm(config).run_here()
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_mask_of_other_weights_stops_a_run_before_the_model_loads(
    made: dict[str, Any], tiny_runs: Any, tmp_path: Path
) -> None:
    keys = {"mask_path": str(made["result"]["masks"][0.5]), "output_dir": str(tmp_path)}
    assert SaliencyUnlearningAlgorithm(tiny_runs.train_config(**keys)).plan().can_run
    other = tiny_runs.train_config(ckpt_path=str(tiny_runs.checkpoint("other")), **keys)
    with pytest.raises(MaskError, match="the mask was made from a model with fingerprint sha256:"):
        SaliencyUnlearningAlgorithm(other).run_here()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_loaded")
def test_all_that_is_wrong_is_in_one_message(tiny_runs: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.diffusion_model.out.0.weight": torch.zeros(3)}}, tmp_path / "x.ckpt")
    config = tiny_runs.train_config(
        ckpt_path=str(tmp_path / "x.ckpt"),
        masking="random",
        train_method="xlayer",
        output_dir=str(tmp_path / "runs"),
    )
    with pytest.raises(ConfigError) as raised:
        SaliencyUnlearningAlgorithm(config).run_here()
    told = "\n".join(raised.value.mistakes)
    assert "is a CompVis checkpoint without its VAE" in told
    assert "xlayer" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("nothing_is_loaded")
def test_images_are_looked_at_before_the_model_loads(tiny_runs: Any, tmp_path: Path) -> None:
    for style in ("Noto", "Blob"):
        folder = tmp_path / "raw" / style / "Cats"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "1.jpg")
    (tmp_path / "raw" / "Noto" / "Cats" / "1.jpg").write_bytes(b"no image")
    config = tiny_runs.mask_config(
        dataset_type="unlearncanvas",
        styles=None,
        objects=None,
        raw_dataset_dir=str(tmp_path / "raw"),
        output_dir=str(tmp_path / "m"),
    )
    with pytest.raises(DataError, match=r"1 files of .* cannot be used:\n.*1.jpg: unreadable"):
        MaskingAlgorithm(config).run_here()


@pytest.mark.parametrize(("num_timesteps", "warned"), [(1, True), (1000, False)])
def test_a_mask_of_the_first_timesteps_alone_is_a_warning(
    tiny_runs: Any, tmp_path: Path, num_timesteps: int, warned: bool
) -> None:
    config = tiny_runs.mask_config(num_timesteps=num_timesteps, output_dir=str(tmp_path))
    plan = MaskingAlgorithm(config).make_plan()
    assert any("num_timesteps: 1 draws from the first" in warning for warning in plan.warnings) == warned


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({"model_config_path": SD_V1}, True),
        ({"model_config_path": SD_V1, "sample_prompts": []}, False),
        ({}, False),
    ],
)
def test_pictures_of_a_large_model_on_a_cpu_are_a_warning(
    tiny_runs: Any, tmp_path: Path, changed: dict[str, Any], warned: bool
) -> None:
    config = tiny_runs.train_config(
        **({"sample_prompts": None} | changed), output_dir=str(tmp_path), devices="cpu"
    )
    plan = SaliencyUnlearningAlgorithm(config).make_plan()
    assert any(warning.startswith("sample_prompts: on a CPU") for warning in plan.warnings) == warned


def test_every_gpu_that_is_named_must_be_there(tiny_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen = Inspection(tiny_runs.mask_config(devices="0,1"))
    assert (str(seen.device), seen.problems) == ("cuda:0", [])
    seen = Inspection(tiny_runs.mask_config(devices="1,2,0,3"))
    assert [str(problem).partition(";")[0] for problem in seen.problems] == [
        "devices: there is no CUDA device 2",
        "devices: there is no CUDA device 3",
    ]


def drawn(tiny_runs: Any, folder: Path, **changes: Any) -> Any:
    """A mask of images on disk: one of Noto and one of Blob."""
    for style in ("Noto", "Blob"):
        (folder / "raw" / style / "Cats").mkdir(parents=True)
        Image.effect_noise((32, 32), 50).convert("RGB").save(folder / "raw" / style / "Cats" / "1.png")
    keys = {"dataset_type": "unlearncanvas", "styles": None, "objects": None, "output_dir": str(folder / "m")}
    return tiny_runs.mask_config(raw_dataset_dir=str(folder / "raw"), **{**keys, **changes})


def both_codes(main: Any, config: Any) -> tuple[int, int]:
    """Exit codes of a dry run and of the run."""
    return main([*argv_of(config), "--dry_run"]), main(argv_of(config))


@pytest.mark.parametrize("fault", ["16-bit", "cut"])
def test_a_dry_run_finds_images_that_the_run_would_refuse(
    tiny_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    config = drawn(tiny_runs, tmp_path)
    path = tmp_path / "raw" / "Noto" / "Cats" / "1.png"
    if fault == "16-bit":
        Image.new("I;16", (32, 32)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:-200])
    told = {"16-bit": "more than 8 bits", "cut": "unreadable"}[fault]
    codes = both_codes(generate_mask.main, config)
    captured = capsys.readouterr()
    assert told in captured.out
    assert told in captured.err
    assert codes == {"16-bit": (2, 2), "cut": (1, 1)}[fault]  # a cut file is met while encoding


def test_a_dry_run_finds_weights_that_the_run_would_refuse(
    tiny_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = dict(read_state_dict(tiny_runs.checkpoint())[0])
    tensors["model.diffusion_model.out.0.weight"] = tensors["model.diffusion_model.out.0.weight"] * float(
        "nan"
    )
    torch.save({"state_dict": tensors}, tmp_path / "nan.ckpt")
    config = tiny_runs.mask_config(ckpt_path=str(tmp_path / "nan.ckpt"), output_dir=str(tmp_path / "m"))
    assert both_codes(generate_mask.main, config) == (1, 1)
    captured = capsys.readouterr()
    assert "out.0.weight holds NaN" in captured.out
    assert "out.0.weight holds NaN" in captured.err


def test_a_dry_run_finds_weights_that_save_dtype_cannot_hold(
    tiny_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = dict(read_state_dict(tiny_runs.checkpoint())[0])
    tensors["model.diffusion_model.out.0.weight"] = tensors["model.diffusion_model.out.0.weight"] * 1e6
    torch.save({"state_dict": tensors}, tmp_path / "large.ckpt")
    changes = {"ckpt_path": str(tmp_path / "large.ckpt"), "masking": "none", "save_dtype": "fp16"}
    config = tiny_runs.train_config(output_dir=str(tmp_path / "runs"), **changes)
    assert both_codes(train.main, config) == (1, 1)
    captured = capsys.readouterr()
    assert "out.0.weight has" in captured.out
    assert "out.0.weight has" in captured.err


def test_promise_17_the_plan_counts_the_ema_copy_that_use_ema_writes(tiny_runs: Any, tmp_path: Path) -> None:
    original = read_state_dict(tiny_runs.checkpoint())[0]
    unet = {key: tensor for key, tensor in original.items() if key.startswith("model.diffusion_model.")}
    write_state_dict(
        {**original, **{ema_name(key): tensor * 1.01 for key, tensor in unet.items()}}, tmp_path / "ema.ckpt"
    )
    changes = {"ckpt_path": str(tmp_path / "ema.ckpt"), "masking": "none", "use_ema": True, "epochs": 1}
    config = tiny_runs.train_config(output_dir=str(tmp_path / "runs"), **changes)
    plan = SaliencyUnlearningAlgorithm(config).plan()
    checkpoint = SaliencyUnlearningAlgorithm(config).run()["checkpoint"]
    assert bytes_of(plan, checkpoint.name) == pytest.approx(checkpoint.stat().st_size, rel=0.1)


def test_a_train_method_that_selects_nothing_has_one_exit_code(
    tiny_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_runs.train_config(train_method="xlayer", masking="none", output_dir=str(tmp_path / "m"))
    assert both_codes(train.main, config) == (2, 2)
    captured = capsys.readouterr()
    assert "'xlayer' selects none" in captured.out
    assert "'xlayer' selects none" in captured.err
    assert not (tmp_path / "m").exists()


# ---- what it costs


def test_heads_of_images_are_read_once_by_a_run(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for style in ("Noto", "Blob"):
        (tmp_path / "raw" / style / "Cats").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "raw" / style / "Cats" / "1.jpg")
    keys = {"dataset_type": "unlearncanvas", "styles": None, "objects": None}
    config = tiny_runs.mask_config(**keys, raw_dataset_dir=str(tmp_path / "raw"))
    assert MaskingAlgorithm(config).make_plan().can_run

    opened = []
    really = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or really(path))
    assert len(data_set_of(config).rows(None).forget) == 1  # as the data handler asks for them
    assert opened == []
    path = tmp_path / "raw" / "Noto" / "Cats" / "1.jpg"
    path.write_bytes(b"no image any more")
    with pytest.raises(DataError, match=r"1.jpg: unreadable"):
        data_set_of(config).rows(None)


# ---- the flag


def test_dry_run_prints_the_plan_and_writes_nothing(
    made: dict[str, Any], tiny_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = every_file(tiny_runs.folder)
    masks = tiny_runs.mask_config(output_dir=str(tmp_path / "m"))
    assert generate_mask.main([*argv_of(masks), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "# plan: mask on cpu",
        "mask_*.safetensors",
        "this plan can be carried",
    ):
        assert expected in printed
    config: TrainConfig = tiny_runs.train_config(
        mask_path=str(made["result"]["masks"][0.5]), output_dir=str(tmp_path / "runs")
    )
    assert train.main(["--dry_run", *argv_of(config)]) == 0
    assert "this plan can be carried out" in capsys.readouterr().out
    other = [*argv_of(config), "--ckpt_path", str(tiny_runs.checkpoint("other"))]
    first = other.index("--ckpt_path")
    del other[first : first + 2]
    assert train.main([*other, "--dry_run", "true"]) == 2
    printed = capsys.readouterr().out
    assert "problem: the mask was made from a model" in printed
    assert "this plan cannot be carried out" in printed
    assert every_file(tiny_runs.folder) == before
    assert not list(tmp_path.iterdir())


def test_dry_run_is_no_key(tiny_runs: Any) -> None:
    assert "dry_run" not in as_dict(tiny_runs.train_config())
