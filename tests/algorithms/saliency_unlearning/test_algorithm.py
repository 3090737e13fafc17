"""Both stages from a config to the files of a run, on a tiny model that lies on disk."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mu.algorithms.saliency_unlearning.algorithm import (
    MaskingAlgorithm,
    SaliencyUnlearnAlgorithm,
    SaliencyUnlearningAlgorithm,
)
from mu.algorithms.saliency_unlearning.configs import (
    MaskConfig,
    TrainConfig,
    saliency_unlearning_generate_mask_emoji_canvas,
    saliency_unlearning_train_emoji_canvas,
)
from mu.algorithms.saliency_unlearning.data_handler import SaliencyUnlearnDataHandler
from mu.algorithms.saliency_unlearning.masking import (
    MaskError,
    accumulate_saliency,
    load_mask,
    load_mask_metadata,
    random_mask,
    threshold_mask,
)
from mu.algorithms.saliency_unlearning.trainer import salun_loss
from mu.algorithms.saliency_unlearning.utils import (
    UNET_PREFIX,
    unet_fingerprint,
)
from mu.config import ConfigError, load_config, override
from mu.ldm import LatentDiffusion, load_model
from mu.ldm.model_config import load_model_config
from mu.ldm.tensor_file import read_state_dict
from mu.unlearning import output
from mu.unlearning.moving import (
    TrainingError,
    names_of,
)
from mu.unlearning.output import write_unlearned
from mu.unlearning.trainer import Trainer

Result = dict[str, Any]


@pytest.fixture(scope="module")
def mask_run(tiny_runs: Any) -> Result:
    return MaskingAlgorithm(tiny_runs.mask_config(threshold=(0.2, 0.5))).run()


@pytest.fixture(scope="module")
def train_run(tiny_runs: Any, mask_run: Result) -> Result:
    config = tiny_runs.train_config(mask_path=str(mask_run["masks"][0.5]))
    return SaliencyUnlearningAlgorithm(config, sample_prompts=None, sample_seeds=(3,)).run()


@pytest.fixture
def model(tiny_runs: Any) -> LatentDiffusion:
    """As it was before unlearning."""
    return load_model(tiny_runs.model_config, tiny_runs.checkpoint())


def trained(tiny_runs: Any, folder: Path, **changes: Any) -> Result:
    """A training run of its own, with a random mask unless `changes` say otherwise."""
    wanted = {"masking": "random", "output_dir": str(folder / "runs"), **changes}
    return SaliencyUnlearningAlgorithm(tiny_runs.train_config(**wanted)).run()


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def losses(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", newline="") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def changed_entries(before: Path, after: Path) -> dict[str, Tensor]:
    """CompVis name -> where a tensor of the file `after` differs from that in `before`, if it does anywhere."""
    old, new = read_state_dict(before)[0], read_state_dict(after)[0]
    assert old.keys() == new.keys()
    assert {name: tensor.dtype for name, tensor in old.items()} == {
        name: tensor.dtype for name, tensor in new.items()
    }
    return {name: old[name] != new[name] for name in old if bits(old[name]) != bits(new[name])}


# ---- the mask


def test_a_mask_run_leaves_its_files(mask_run: Result, tiny_runs: Any) -> None:
    run = mask_run["run"]
    assert run.parent == tiny_runs.folder / "masks"
    assert run.name.startswith("style-Noto-")
    assert files_in(run) == {
        "config.yaml",
        "environment.json",
        "log.txt",
        "mask_0.2.safetensors",
        "mask_0.5.safetensors",
        "metrics.json",
    }
    assert load_config(MaskConfig, config_path=run / "config.yaml") == tiny_runs.mask_config(
        threshold=(0.2, 0.5)
    )
    assert str(mask_run["masks"][0.5]) in (run / "log.txt").read_text()
    noted = json.loads((run / "metrics.json").read_text())
    assert noted == {
        **{key: mask_run[key] for key in ("images", "seconds", "total")},
        "run": str(run),
        "masks": {"0.2": str(run / "mask_0.2.safetensors"), "0.5": str(run / "mask_0.5.safetensors")},
        "kept": {"0.2": mask_run["kept"][0.2], "0.5": mask_run["kept"][0.5]},
    }


def test_the_masks_mark_the_most_salient_weights(
    mask_run: Result, tiny_runs: Any, model: LatentDiffusion
) -> None:
    """Against both steps written out; several thresholds of one pass are nested."""
    data = SaliencyUnlearnDataHandler(tiny_runs.mask_config(), model)
    assert {row.style for row in data.rows.forget} == {"Noto"}
    assert mask_run["images"] == 4
    saliency = accumulate_saliency(model, data.mask_batches(), c_guidance=7.5)
    total = sum(parameter.numel() for parameter in model.unet.parameters())
    assert mask_run["total"] == total
    masks = {}
    for threshold in (0.2, 0.5):
        mask = masks[threshold] = load_mask(mask_run["masks"][threshold])
        expected = threshold_mask(saliency, threshold)
        assert list(mask) == list(expected)
        assert all(torch.equal(mask[name], expected[name]) for name in expected)
        kept = sum(int(marked.sum()) for marked in mask.values())
        assert kept == mask_run["kept"][threshold] == int(threshold * total)
    assert not any((masks[0.2][name] & ~masks[0.5][name]).any() for name in saliency)


def test_promise_21_a_loss_that_is_not_finite_names_the_images(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LatentDiffusion.q_sample
    calls: list[int] = []

    def q_sample(model: LatentDiffusion, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        calls.append(len(latents))
        noisy = whole(model, latents, timesteps, noise)
        return noisy * torch.nan if len(calls) == 2 else noisy

    monkeypatch.setattr(LatentDiffusion, "q_sample", q_sample)
    config = tiny_runs.mask_config(batch_size=3, output_dir=str(tmp_path))
    with pytest.raises(MaskError, match=r"mask batch 1 is nan.*its images: .*Noto/Dogs/1000001\.png$"):
        MaskingAlgorithm(config).run()
    assert calls == [3, 1]


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_a_config_may_be_a_mapping(wrap: Any) -> None:
    keys = {"template_name": "Blob", "lr": 2e-5, "sample_seeds": [3, 4]}
    found = SaliencyUnlearningAlgorithm(wrap(keys), lr=3e-5).config
    assert found == TrainConfig(template_name="Blob", lr=3e-5, sample_seeds=(3, 4))
    mask = MaskingAlgorithm(wrap({"threshold": [0.2, 0.5]}), template_name="Blob").config
    assert mask == MaskConfig(threshold=(0.2, 0.5), template_name="Blob")
    with pytest.raises(ConfigError, match="learning_rate: there is no such key"):
        SaliencyUnlearningAlgorithm(wrap({"learning_rate": 1e-5}))


def test_a_mask_says_what_it_was_made_from(mask_run: Result, model: LatentDiffusion) -> None:
    metadata = load_mask_metadata(mask_run["masks"][0.2])
    blocks = metadata.pop("kept_fraction")
    assert metadata == {
        "concept": "Noto",
        "template": "style",
        "template_name": "Noto",
        "threshold": 0.2,
        "kept": mask_run["kept"][0.2],
        "total": mask_run["total"],
        "pool": "unet",
        "train_method": "full",
        "model_fingerprint": unet_fingerprint(model),
        "c_guidance": 7.5,
        "images": 4,
        "draws_per_image": 1,
        "seed": 0,
    }
    assert {"time_embed", "middle_block.1", "out"} < blocks.keys()
    assert all(0 <= part <= 1 for part in blocks.values())


def test_a_pool_is_ranked_by_itself(tiny_runs: Any, model: LatentDiffusion, tmp_path: Path) -> None:
    config = tiny_runs.mask_config(output_dir=str(tmp_path), threshold=0.1)
    result = MaskingAlgorithm(config, pool="train_method", train_method="xattn").run()
    pool = names_of(model.unet, "xattn")
    size = sum(model.unet.get_parameter(name).numel() for name in pool)
    mask = load_mask(result["masks"][0.1])
    assert {name for name, marked in mask.items() if marked.any()} <= set(pool)
    assert sum(int(mask[name].sum()) for name in pool) == result["kept"][0.1] == int(0.1 * size)
    assert mask.keys() == dict(model.unet.named_parameters()).keys()
    metadata = load_mask_metadata(result["masks"][0.1])
    assert (metadata["pool"], metadata["train_method"]) == ("train_method", "xattn")


def test_thresholds_that_nearly_agree_have_files_of_their_own(tiny_runs: Any, tmp_path: Path) -> None:
    near = 0.50001, 0.500011, 1.0
    result = MaskingAlgorithm(tiny_runs.mask_config(output_dir=str(tmp_path), threshold=near)).run()
    names = ["mask_0.50001.safetensors", "mask_0.500011.safetensors", "mask_1.safetensors"]
    assert [path.name for path in result["masks"].values()] == names
    assert [load_mask_metadata(path)["threshold"] for path in result["masks"].values()] == list(near)
    assert result["kept"][1.0] == result["total"]


def test_a_run_changes_neither_its_config_nor_an_earlier_run(tiny_runs: Any, tmp_path: Path) -> None:
    ready = saliency_unlearning_generate_mask_emoji_canvas
    overrides = tiny_runs.keys(output_dir=str(tmp_path), threshold=0.3)
    first = MaskingAlgorithm(ready, **overrides).run()
    path = first["masks"][0.3]
    content = path.read_bytes()
    second = MaskingAlgorithm(ready, **overrides).run()
    assert first["run"] != second["run"]
    assert path.read_bytes() == content
    one, other = load_mask(path), load_mask(second["masks"][0.3])
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert ready == load_config(MaskConfig, config_path="emoji_canvas/mask_style.yaml")


# ---- training


def test_a_training_run_leaves_its_files(train_run: Result, mask_run: Result, tiny_runs: Any) -> None:
    run = train_run["run"]
    assert run.parent == tiny_runs.folder / "finetuned_models"
    assert files_in(run) == {
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.csv",
        "metrics.json",
        "model.patch.safetensors",
        "model.safetensors",
        "pictures/before_after.png",
    }
    assert train_run["checkpoint"] == run / "model.safetensors"
    assert train_run["patch"] == run / "model.patch.safetensors"
    assert train_run["pictures"] == run / "pictures" / "before_after.png"
    assert train_run["mask"] == mask_run["masks"][0.5]
    assert train_run["weights_selected"] == mask_run["kept"][0.5]
    assert train_run["weights_total"] == mask_run["total"]
    saved = load_config(TrainConfig, config_path=run / "config.yaml")
    assert (saved.mask_path, saved.sample_seeds) == (str(train_run["mask"]), (3,))
    noted = json.loads((run / "metrics.json").read_text())
    assert noted == {
        key: str(value) if isinstance(value, Path) else value for key, value in train_run.items()
    }


def test_every_step_is_in_the_metrics(train_run: Result) -> None:
    rows = losses(train_run["run"])
    assert [row.pop("step") for row in rows] == [1, 2, 3, 4]  # 4 images in batches of 3, twice
    assert train_run["steps"] == 4
    for row in rows:
        assert row.keys() == {"loss", "forget", "retain"}
        assert row["loss"] == pytest.approx(row["forget"] + 0.5 * row["retain"], rel=1e-5)
    for key, name in (("loss", "loss"), ("forget_loss", "forget"), ("retain_loss", "retain")):
        assert train_run[key] == pytest.approx((rows[2][name] + rows[3][name]) / 2, rel=1e-6)


def test_the_first_loss_is_that_of_the_first_batch(
    train_run: Result, tiny_runs: Any, model: LatentDiffusion
) -> None:
    batch = SaliencyUnlearnDataHandler(tiny_runs.train_config(), model).train_batches[0]
    with torch.no_grad():
        terms = salun_loss(model, batch.forget, batch.retain, 0.5)
    first = losses(train_run["run"])[0]
    assert [first["loss"], first["forget"], first["retain"]] == pytest.approx(
        [float(term) for term in terms], rel=1e-4
    )


def test_promise_23_only_weights_in_the_mask_changed_in_the_file(train_run: Result, tiny_runs: Any) -> None:
    """Bit for bit against the file that training started from."""
    changed = changed_entries(tiny_runs.checkpoint(), train_run["checkpoint"])
    mask = load_mask(train_run["mask"])
    for name, differs in changed.items():
        assert name.startswith(UNET_PREFIX)
        assert not (differs & ~mask[name.removeprefix(UNET_PREFIX)]).any()
    count = sum(int(differs.sum()) for differs in changed.values())
    assert count == train_run["weights_changed"]
    assert count > 0.9 * train_run["weights_selected"]
    load_model(tiny_runs.model_config, train_run["checkpoint"])


def test_promise_24_the_same_config_gives_the_same_weights(train_run: Result) -> None:
    config = load_config(TrainConfig, config_path=train_run["run"] / "config.yaml")
    again = SaliencyUnlearnAlgorithm(config, sample_prompts=()).run()
    assert again["run"] != train_run["run"]
    assert again["pictures"] is None
    assert not changed_entries(train_run["checkpoint"], again["checkpoint"])
    other = SaliencyUnlearnAlgorithm(config, sample_prompts=(), seed=1).run()
    assert changed_entries(train_run["checkpoint"], other["checkpoint"])


def test_two_names_of_one_class() -> None:
    assert SaliencyUnlearnAlgorithm is SaliencyUnlearningAlgorithm


def test_an_fp16_file_stays_fp16(tiny_runs: Any, tmp_path: Path) -> None:
    """Here with a random mask, and written as .ckpt."""
    half = tiny_runs.checkpoint("half")
    result = trained(tiny_runs, tmp_path, ckpt_path=str(half), random_fraction=0.25, output_format="ckpt")
    assert result["checkpoint"].name == "model.ckpt"
    assert read_state_dict(half)[0][f"{UNET_PREFIX}out.2.weight"].dtype == torch.float16
    changed = changed_entries(half, result["checkpoint"])
    assert all(name.startswith(UNET_PREFIX) for name in changed)
    count = sum(int(differs.sum()) for differs in changed.values())
    selected = int(0.25 * result["weights_total"])
    assert result["weights_selected"] == selected
    assert 0.5 * selected < count <= selected
    assert count == result["weights_changed"]


def test_a_random_mask_is_that_of_its_seed(tiny_runs: Any, tmp_path: Path) -> None:
    def moved(seed: int) -> dict[str, Tensor]:
        result = trained(tiny_runs, tmp_path, random_fraction=0.25, epochs=1, seed=seed)
        return changed_entries(tiny_runs.checkpoint(), result["checkpoint"])

    first, second = moved(0), moved(1)
    common = sum(int((first[name] & second[name]).sum()) for name in first.keys() & second.keys())
    count = sum(int(differs.sum()) for differs in first.values())
    assert common == pytest.approx(0.25 * count, rel=0.05)  # as two independent quarters have


def test_without_a_mask_the_train_method_alone_decides(
    tiny_runs: Any, model: LatentDiffusion, tmp_path: Path
) -> None:
    result = trained(tiny_runs, tmp_path, masking="none", train_method="xattn", epochs=1)
    names = {UNET_PREFIX + name for name in names_of(model.unet, "xattn")}
    assert result["mask"] is None
    assert result["weights_selected"] == sum(model.get_parameter(name).numel() for name in names)
    changed = changed_entries(tiny_runs.checkpoint(), result["checkpoint"])
    assert changed.keys() <= names
    assert len(changed) > 0.8 * len(names)


@pytest.mark.parametrize(
    ("change", "same_rows"),
    [({"target": "frozen"}, 1), ({"lr_schedule": "linear"}, 2), ({"alpha": 2.0}, 0)],
)
def test_settings_of_the_loss_reach_the_training(
    train_run: Result, tiny_runs: Any, tmp_path: Path, change: dict[str, Any], same_rows: int
) -> None:
    """A frozen target differs once weights have moved, a falling learning rate once it has fallen."""
    result = trained(tiny_runs, tmp_path, masking="saliency", mask_path=str(train_run["mask"]), **change)
    rows, others = losses(train_run["run"]), losses(result["run"])
    term = "loss" if "alpha" in change else "forget"
    same = [
        row[term] == pytest.approx(other[term], rel=1e-6) for row, other in zip(rows, others, strict=True)
    ]
    assert same == [True] * same_rows + [False] * (4 - same_rows)


def test_a_folder_of_masks_gives_the_one_of_the_threshold(
    mask_run: Result, tiny_runs: Any, tmp_path: Path
) -> None:
    folder = str(mask_run["run"])
    result = trained(tiny_runs, tmp_path, masking="saliency", mask_path=folder, threshold=0.2, epochs=1)
    assert result["mask"] == mask_run["masks"][0.2]
    assert result["weights_selected"] == mask_run["kept"][0.2]
    assert str(result["mask"]) in (result["run"] / "log.txt").read_text()


# ---- what is refused


def test_promise_07_the_mask_of_another_model_is_refused_before_anything_is_made(
    mask_run: Result, tiny_runs: Any, tmp_path: Path
) -> None:
    with pytest.raises(MaskError, match="the mask was made from a model with fingerprint sha256:"):
        trained(
            tiny_runs,
            tmp_path,
            masking="saliency",
            mask_path=str(mask_run["masks"][0.5]),
            ckpt_path=str(tiny_runs.checkpoint("other")),
            processed_dataset_dir=str(tmp_path / "processed"),
        )
    assert not list(tmp_path.iterdir())


def test_a_missing_mask_names_the_command_that_makes_it(tiny_runs: Any, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    with pytest.raises(ConfigError, match=r"mask_path: .*scripts\.generate_mask .*--template_name Noto"):
        trained(tiny_runs, tmp_path, masking="saliency", mask_path=str(tmp_path / "masks"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("make", [MaskingAlgorithm, SaliencyUnlearningAlgorithm])
def test_a_missing_checkpoint_names_the_command_that_fetches_it(
    tiny_runs: Any, tmp_path: Path, make: Any
) -> None:
    wanted = {"ckpt_path": str(tmp_path / "absent.ckpt"), "output_dir": str(tmp_path / "runs")}
    if make is MaskingAlgorithm:
        config = tiny_runs.mask_config(**wanted)
    else:
        config = tiny_runs.train_config(masking="none", **wanted)
    with pytest.raises(ConfigError, match=r"absent\.ckpt; `download_model compvis`"):
        make(config).run()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_override_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'alpha'"):
        SaliencyUnlearningAlgorithm(saliency_unlearning_train_emoji_canvas, alhpa=0.1)
    with pytest.raises(ConfigError, match="threshold"):
        MaskingAlgorithm(saliency_unlearning_generate_mask_emoji_canvas, threshold=float("nan"))


def test_promise_23_a_weight_that_moves_outside_the_mask_stops_the_run(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, or on the way to the file: the run does not say that it succeeded, and leaves no such file."""

    def spoil(model: LatentDiffusion) -> None:
        with torch.no_grad():
            model.get_parameter("first_stage_model.quant_conv.bias")[0] += 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda trainer, *_, **__: spoil(trainer.model.ldm) or {})
        with pytest.raises(TrainingError, match=r"quant_conv\.bias differs from .* outside what may move"):
            trained(tiny_runs, tmp_path / "memory")
    assert not list((tmp_path / "memory").rglob("model.*"))

    def write_spoilt(model: LatentDiffusion, config: TrainConfig, folder: Path, *, source: Path) -> Path:
        spoil(model)
        return write_unlearned(model, config, folder, source=source)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda *_, **__: {})
        patch.setattr(output, "write_unlearned", write_spoilt)
        with pytest.raises(TrainingError, match=r"quant_conv\.bias differs from .* outside what may move"):
            trained(tiny_runs, tmp_path / "file")
    assert not list((tmp_path / "file").rglob("metrics.json"))
    assert not list((tmp_path / "file").rglob("model*"))

    def write_and_damage(model: LatentDiffusion, config: TrainConfig, folder: Path, *, source: Path) -> Path:
        path = write_unlearned(model, config, folder, source=source)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        tensors["model.diffusion_model.out.2.bias"][0] += 1.0  # all of it is selected, so it may differ
        save_file(tensors, path)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda *_, **__: {})
        patch.setattr(output, "write_unlearned", write_and_damage)
        with pytest.raises(TrainingError, match=r"out\.2\.bias reads back otherwise than it was written"):
            trained(tiny_runs, tmp_path / "read", masking="none")
    assert not list((tmp_path / "read").rglob("model*"))


def test_a_run_that_goes_on_from_the_newest_run_is_compared_with_that_one(
    tiny_runs: Any, tmp_path: Path
) -> None:
    """Not with its own file, which is the newest by then: that comparison would let everything pass."""
    earlier = tmp_path / "runs" / "earlier" / "model.safetensors"
    earlier.parent.mkdir(parents=True)
    shutil.copy(tiny_runs.checkpoint(), earlier)
    result = trained(tiny_runs, tmp_path, ckpt_path=str(tmp_path / "runs"), template_name=("Noto",))
    assert result["weights_changed"] > 0
    assert read_state_dict(result["checkpoint"])[1]["modelspec.title"] == "Noto unlearned"


# ---- folders of images


def test_both_stages_on_a_folder_of_images(tiny_runs: Any, tmp_path: Path) -> None:
    generator = numpy.random.default_rng(0)
    for style, count in (("Abstractionism", 1), ("Van_Gogh", 2), ("Seed_Images", 1)):
        for name in ("Cats", "Dogs"):
            (tmp_path / "canvas" / style / name).mkdir(parents=True)
            for number in range(1, count + 1):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(tmp_path / "canvas" / style / name / f"{number}.png")
    folder = {
        "dataset_type": "unlearncanvas",
        "raw_dataset_dir": str(tmp_path / "canvas"),
        "processed_dataset_dir": str(tmp_path / "processed"),
        "template_name": "Van_Gogh",
        "styles": None,
        "objects": None,
        "image_size": 16,
    }
    masks = tmp_path / "masks"
    mask_run = MaskingAlgorithm(tiny_runs.mask_config(**folder, output_dir=str(masks))).run()
    assert mask_run["images"] == 4
    result = trained(tiny_runs, tmp_path, masking="saliency", mask_path=str(masks), **folder)
    assert result["mask"] == mask_run["masks"][0.5]
    assert result["steps"] == 4
    assert result["weights_changed"] > 0.9 * result["weights_selected"]

    listed = tmp_path / "processed" / "index" / "unlearncanvas" / "style-Van_Gogh"
    assert (listed / "forget" / "prompts.txt").read_text().split("\n")[:2] == [
        "A Cats image in Van Gogh style."
    ] * 2
    assert set((listed / "forget" / "substitutes.txt").read_text().splitlines()) == {
        "A Cats image in Photo style.",
        "A Dogs image in Photo style.",
    }
    assert set((listed / "retain" / "prompts.txt").read_text().splitlines()) == {
        f"A {name} image in {style} style."
        for name in ("Cats", "Dogs")
        for style in ("Abstractionism", "Photo")
    }
    assert not (tmp_path / "processed" / "generated").exists()


def test_a_ready_made_training_config_is_not_changed_by_overrides() -> None:
    ready = saliency_unlearning_train_emoji_canvas
    assert SaliencyUnlearningAlgorithm(ready, template_name="Blob").config == override(
        ready, template_name="Blob"
    )
    assert ready == load_config(TrainConfig, config_path="emoji_canvas/train_style.yaml")


# ---- ways to compute


@pytest.mark.parametrize(
    "keys",
    [
        {"ckpt": "half", "precision": "bf16-mixed", "channels_last": True},
        {"ckpt": "half", "target": "frozen", "micro_batch_size": 2},
        {"ckpt": "tiny", "precision": "bf16-mixed", "gradient_checkpointing": True, "channels_last": True},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_whatever_the_way_to_compute_only_the_mask_moves_and_the_file_keeps_its_type(
    tiny_runs: Any, tmp_path: Path, keys: dict[str, Any]
) -> None:
    keys = dict(keys)
    source = tiny_runs.checkpoint(keys.pop("ckpt"))
    result = trained(tiny_runs, tmp_path, ckpt_path=str(source), **keys)
    changed = changed_entries(source, result["checkpoint"])  # compares the types too
    unet = dict(load_model(tiny_runs.model_config).unet.named_parameters())
    mask = random_mask(unet, 0.5, seed=0)
    assert changed
    for name, where in changed.items():
        assert not (where & ~mask[name.removeprefix(UNET_PREFIX)]).any()
    assert result["weights_changed"] > 0.5 * result["weights_selected"]


def test_promise_22_a_mask_is_the_same_to_rounding_when_memory_runs_out(
    tiny_runs: Any, tmp_path: Path, mask_run: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, batches = LatentDiffusion.predict, []

    def predict(model: LatentDiffusion, x: Tensor, *args: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            batches.append(len(x) // 2)  # both branches of guidance go in one call
            if batches[-1] > 1:
                torch.empty(2**60, dtype=torch.uint8)
        return whole(model, x, *args)

    monkeypatch.setattr(LatentDiffusion, "predict", predict)
    result = MaskingAlgorithm(tiny_runs.mask_config(batch_size=3, output_dir=str(tmp_path))).run()
    assert batches == [3, 3, 1, 1, 1, 1]  # whole; computed again; halved
    one, other = load_mask(result["masks"][0.5]), load_mask(mask_run["masks"][0.5])
    differing = sum(int((one[name] != other[name]).sum()) for name in one)
    assert differing < 1e-3 * result["total"]


def test_the_mask_stays_in_main_memory(tiny_runs: Any) -> None:
    """Wherever the model is; here on a device without values."""
    model = LatentDiffusion(load_model_config(tiny_runs.model_config), device="meta")
    moving = SaliencyUnlearningAlgorithm(tiny_runs.train_config(masking="random")).moving(model, {})
    assert moving.selected.keys() == dict(model.unet.named_parameters()).keys()
    assert {marked.device.type for marked in moving.selected.values()} == {"cpu"}


def test_nothing_of_a_run_stays_in_memory(
    tiny_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and weights, optimizer and its state."""
    made: dict[str, weakref.ref[Any]] = {}
    whole = Trainer.fit

    def fit(trainer: Trainer, *rest: Any, **more: Any) -> dict[str, float]:
        losses = whole(trainer, *rest, **more)
        weight, state = next(iter(trainer.optimizer.state.items()))
        made.update(
            model=weakref.ref(trainer.model),
            weight=weakref.ref(weight),
            optimizer=weakref.ref(trainer.optimizer),
            moment=weakref.ref(state["exp_avg"]),
        )
        return losses

    monkeypatch.setattr(Trainer, "fit", fit)
    trained(tiny_runs, tmp_path)
    gc.collect()
    assert len(made) == 4
    assert [name for name, reference in made.items() if reference() is not None] == []
