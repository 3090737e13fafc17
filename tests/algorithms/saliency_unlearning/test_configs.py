from __future__ import annotations

import dataclasses
import os
import re
import shlex
from pathlib import Path

import pytest
from command_lines import parse_cli

from mu.algorithms.saliency_unlearning import configs
from mu.algorithms.saliency_unlearning.configs import (
    PACKAGED,
    MaskConfig,
    TrainConfig,
    mask_command,
)
from mu.cli import _flag_value
from mu.config import (
    Config,
    ConfigError,
    assemble,
    check_paths,
    dump,
    keys_of,
    load_config,
    override,
    resolve_path,
)
from mu.config_file import packaged_configs
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.config import (
    EvaluateConfig,
    SampleConfig,
)
from mu.unlearning.config import DataKeys
from mu.unlearning.find_checkpoint import checkpoint_file
from tests.datasets.drawing import draw_i2p

ROOT = Path(__file__).parents[3]
CLASSES: dict[str, type[Config]] = {
    "mask": MaskConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "attack": AttackConfig,
}
_SALUN = "mu.algorithms.saliency_unlearning.scripts"
DOORS = {
    "mask": (f"{_SALUN}.generate_mask", []),
    "train": (f"{_SALUN}.train", []),
    "sample": (f"{_SALUN}.sample", []),
    "evaluate": (f"{_SALUN}.evaluate", []),
    "attack": ("mu.commands.attack", ["inversion"]),
}
"""Kind -> module, and its first words."""
GENERATED = {"dataset_type": "generated", "template_name": "Noto"}


def kind_of(name: str) -> str:
    return re.split(r"[_.]", Path(name).name)[0]


def mistakes_of(cls: type[Config], **values: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        cls(**values)
    return caught.value.mistakes


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder in which the files that the defaults name exist, as far as names go."""
    monkeypatch.chdir(tmp_path)
    for file in (
        "models/compvis/style50/compvis.ckpt",
        "data/quick-canvas-dataset/sample/Abstractionism/Cats/1.jpg",
        "data/quick-canvas-dataset/sample/Van_Gogh/Dogs/1.jpg",
        "outputs/saliency_unlearning/masks/a/mask_0.5.safetensors",
    ):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_bytes(b"x")
    return tmp_path


def test_ready_made_configs_have_the_documented_defaults():
    for mask, train, data in (
        (configs.saliency_unlearning_generate_mask_mu, configs.saliency_unlearning_train_mu, "quick-canvas"),
        (configs.saliency_unlearning_generate_mask_i2p, configs.saliency_unlearning_train_i2p, "i2p"),
    ):
        assert mask.ckpt_path == train.ckpt_path == "models/compvis/style50/compvis.ckpt"
        assert mask.raw_dataset_dir == train.raw_dataset_dir == f"data/{data}-dataset/sample"
        assert mask.output_dir == "outputs/saliency_unlearning/masks"
        assert train.output_dir == "outputs/saliency_unlearning/finetuned_models"
        assert train.mask_path == mask.output_dir
        assert (mask.threshold, mask.c_guidance, mask.num_timesteps) == (0.5, 7.5, 1000)
        assert (train.alpha, train.epochs, train.lr, train.batch_size, train.train_method) == (
            0.5,
            5,
            1e-5,
            8,
            "full",
        )
        assert mask.template_name == train.template_name
    emoji = configs.saliency_unlearning_train_emoji_canvas
    assert (emoji.dataset_type, emoji.image_size, emoji.template_name) == ("generated", 64, "Noto")
    assert emoji.mask_path == configs.saliency_unlearning_generate_mask_emoji_canvas.output_dir


def test_a_ready_made_config_is_never_changed():
    before = dump(configs.saliency_unlearning_train_mu)
    other = override(configs.saliency_unlearning_train_mu, template_name="Van_Gogh", lr=2e-5)
    assert (other.template_name, other.lr) == ("Van_Gogh", 2e-5)
    assert dump(configs.saliency_unlearning_train_mu) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.saliency_unlearning_train_mu.lr = 1.0


OWN = {
    name: path
    for name, path in packaged_configs().items()
    if "saliency_unlearning" in path.read_text("utf-8")
}


@pytest.mark.parametrize("name", OWN)
def test_a_packaged_config_is_right_and_opens_with_its_command(name):
    kind = kind_of(name)
    config = load_config(CLASSES[kind], config_path=name)
    text = OWN[name].read_text(encoding="utf-8")
    words = shlex.split(text.splitlines()[0].removeprefix("#"))
    door, first = DOORS[kind]
    opening = ["python", "-m", door, *first, "--config_path", name]
    assert words[: len(opening)] == opening
    # The flags after it are examples: they are what the file itself says.
    flags = words[len(opening) :]
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        assert str(getattr(config, flag.removeprefix("--"))) == value
    assert not re.search(r"(: |^)[/~]", text, re.MULTILINE), "a path of some machine"


def test_the_packaged_configs_are_files_of_the_repository_and_of_the_method():
    assert {"mask_config.yaml", "train_config.yaml", "emoji_canvas/mask_style.yaml"} <= OWN.keys()
    assert len(OWN) >= 17
    for name, path in OWN.items():
        assert path == (PACKAGED if "/" not in name else ROOT / "configs") / name
        assert not any(part.is_symlink() for part in (path, *path.parents)), (
            "a checkout on Windows breaks links"
        )


@pytest.mark.parametrize("world_name", ["emoji_canvas", "unlearn_canvas"])
@pytest.mark.parametrize("kind", ["style", "object"])
def test_a_recipe_of_training_looks_where_its_mask_is_put(world_name, kind):
    mask = load_config(MaskConfig, config_path=f"{world_name}/mask_{kind}.yaml")
    train = load_config(TrainConfig, config_path=f"{world_name}/train_{kind}.yaml")
    assert train.mask_path == mask.output_dir
    shared = [key.name for key in keys_of(DataKeys) if key.name != "output_dir"]
    assert {key: getattr(mask, key) for key in shared} == {key: getattr(train, key) for key in shared}
    assert mask.template == kind


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_key_has_a_whole_sentence_of_help(cls):
    for key in keys_of(cls):
        assert key.rule.help.endswith("."), key.name
        assert len(key.rule.help) > 10, key.name


def test_names_here_are_those_of_the_modules_that_use_them():
    from mu.datasets.data_sets import DATASETS
    from mu.datasets.generated_images import PRECISIONS
    from mu.unlearning.moving import TRAIN_METHODS

    choices = {key.name: key.rule.choices for key in keys_of(TrainConfig)}
    assert choices["train_method"] == TRAIN_METHODS
    assert choices["sample_precision"] == PRECISIONS
    assert choices["dataset_type"] == tuple(DATASETS)


def test_the_seeds_of_evaluation_are_not_those_of_training():
    from mu.datasets.generated import TRAINING_SEED_BASE

    assert mistakes_of(EvaluateConfig, seeds=[TRAINING_SEED_BASE])
    assert EvaluateConfig(seeds=[TRAINING_SEED_BASE - 1]).seeds == (TRAINING_SEED_BASE - 1,)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"template_name": "Nto"}, "template_name: 'Nto' is not one of: Noto, Blob, "),
        ({"template_name": "fluent flat"}, "Did you mean 'Fluent_Flat'?"),
        ({"template": "object"}, "template_name: 'Noto' is not one of: Cats, "),
        ({"styles": ["Blob"]}, "template_name: 'Noto' is not one of: Blob."),
        ({"styles": ["Noto"]}, "substitute: 'Noto' is the only style here"),
        ({"substitute": "Noto"}, "substitute: 'Noto' is the style to forget"),
        ({"substitute": "Twemojji"}, "substitute: 'Twemojji' is no style"),
        ({"substitute": "A {thing} image"}, "substitute: "),
        ({"template": "i2p"}, "template: i2p goes with dataset_type i2p"),
    ],
)
def test_names_that_the_grid_does_not_have_are_found(values, expected):
    (mistake,) = mistakes_of(MaskConfig, **{**GENERATED, **values})
    assert expected in mistake


def test_substitutes_that_can_be_used_are_taken():
    for substitute in (None, "Blob", "A photo of a {object}"):
        assert MaskConfig(**GENERATED, substitute=substitute).substitute == substitute
    config = MaskConfig(dataset_type="generated", styles=["A", "B"], objects=["Cats"], template_name="A")
    assert config.styles == ("A", "B")


I2P = {"dataset_type": "i2p", "template": "i2p", "template_name": "hate"}
FOLDER = {
    "dataset_type": "folder",
    "retain_dataset_dir": "other",
    "substitute": "a cat",
    "template_name": "dog",
}
PROMPTS = {"dataset_type": "generated", "forget_prompts": ["a wolf"], "retain_prompts": ["a dog"]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({**I2P, "template": "object"}, "template: i2p goes with dataset_type i2p"),
        ({"forget_prompts": ["x"]}, "forget_prompts: dataset_type unlearncanvas has its own prompts"),
        ({"retain_prompts": ["x"]}, "retain_prompts: not used by dataset_type unlearncanvas"),
        ({"styles": ["Cubism", "Joy"]}, "styles: only a grid of dataset_type generated has it"),
        ({**PROMPTS, "objects": ["Cats", "Dogs"]}, "objects: only a grid of dataset_type generated has it"),
        ({"retain_set": "generated"}, "retain_prompts: retain_set generated needs prompts of what is kept"),
        ({"retain_set": "seed_image"}, "retain_set: 'seed_image' is not one of: "),
        ({"retain_dataset_dir": "x"}, "retain_dataset_dir: only dataset_type folder"),
        (
            {"raw_dataset_dir": None},
            "raw_dataset_dir: dataset_type unlearncanvas needs a folder of images; without images of your "
            "own, set dataset_type: generated, with forget_prompts",
        ),
        ({**I2P, "forget_prompts": ["x"]}, "forget_prompts: dataset_type i2p has its own prompts"),
        ({**I2P, "retain_prompts": ["x", "y"]}, "retain_prompts: give one prompt for all images"),
        ({**I2P, "retain_prompts": ["x"], "retain_set": "others"}, "retain_prompts: not used by"),
        ({"dataset_type": "generic"}, "substitute: say in a whole prompt"),
        ({**FOLDER, "retain_dataset_dir": None}, "retain_dataset_dir: dataset_type folder needs a folder"),
        (
            {**FOLDER, "retain_set": "seed_images"},
            "retain_set: seed_images does not go with dataset_type folder",
        ),
        ({**FOLDER, "forget_prompts": ["x", "y"]}, "forget_prompts: folder: give one prompt"),
        ({**FOLDER, "substitute": None}, "substitute: say in a whole prompt"),
        (
            {**PROMPTS, "retain_prompts": None, "substitute": "x y"},
            "retain_prompts: forget_prompts needs prompts",
        ),
        (
            {**PROMPTS, "forget_prompts": None, "template_name": "Noto"},
            "retain_prompts: goes with forget_prompts",
        ),
        ({**PROMPTS, "retain_prompts": ["a dog", "a cat"]}, "substitute: say in a whole prompt"),
        (
            {**PROMPTS, "retain_prompts": ["A wolf"]},
            "retain_prompts: 'A wolf' is one of the prompts to forget",
        ),
        ({**PROMPTS, "retain_set": "seed_images"}, "retain_set: seed_images does not go with"),
        ({**GENERATED, "template_name": ["Noto", "Bolb"]}, "template_name: 'Bolb' is not one of"),
        (
            {**GENERATED, "template_name": ["Noto", "Blob"], "substitute": "Blob"},
            "one of the styles to forget",
        ),
        ({**GENERATED, "template_name": STYLES}, "are all styles here"),
    ],
)
def test_keys_that_do_not_go_together_are_found(values, expected):
    (mistake,) = mistakes_of(MaskConfig, **values)
    assert expected in mistake


@pytest.mark.parametrize(
    "values",
    [
        I2P,
        {**I2P, "retain_prompts": ["x"]},
        {**I2P, "retain_set": "generated"},
        FOLDER,
        {**FOLDER, "forget_prompts": ["my dog"], "retain_prompts": ["a pet"], "substitute": None},
        {**FOLDER, "retain_dataset_dir": None, "retain_set": "generated", "retain_prompts": ["a", "b"]},
        PROMPTS,
        {"dataset_type": "generic", "substitute": "a lawn", "template_name": ["a", "b"]},
        {"retain_set": "seed_images"},
        {"retain_set": "generated", "retain_prompts": ["a lawn"]},
        {**GENERATED, "template_name": ["Noto", "Blob"]},
    ],
)
def test_keys_that_go_together_are_kept_by_file_and_command(values, tmp_path):
    config = MaskConfig(**values)
    (tmp_path / "mask.yaml").write_text(dump(config), encoding="utf-8")
    assert load_config(MaskConfig, config_path=tmp_path / "mask.yaml") == config
    words = shlex.split(mask_command(TrainConfig(**values, mask_path="masks")))
    assert assemble(MaskConfig, parsed(words[3:])) == override(config, output_dir="masks")


def parsed(words):
    """The flags of a command line as entries, without looking at what is on disk."""
    flags, keys = dict(zip(words[::2], words[1::2], strict=True)), keys_of(MaskConfig)
    by_flag = {f"--{key.name}": key for key in keys}
    return [(by_flag[flag].name, _flag_value(by_flag[flag], text), flag) for flag, text in flags.items()]


def test_one_name_or_several():
    assert MaskConfig(**GENERATED).concepts == ("Noto",)
    several = MaskConfig(**{**GENERATED, "template_name": "Noto,Blob"})
    assert several.template_name == several.concepts == ("Noto", "Blob")
    assert EvaluateConfig(template_name="Noto,Blob").template_name == ("Noto", "Blob")
    assert "'Bolb'" in mistakes_of(EvaluateConfig, template_name=["Noto", "Bolb"])[0]


@pytest.mark.usefixtures("world")
def test_folders_are_looked_at_before_a_model_is_loaded():
    def problems(**values):
        return [problem for problem in check_paths(MaskConfig(**values)) if "ckpt_path" not in problem]

    (missing,) = problems(**I2P, raw_dataset_dir="absent")
    assert missing.startswith(
        "raw_dataset_dir: there is no folder absent. Download it with `download_data sample i2p`"
    )
    draw_i2p(Path("data/i2p"))
    assert problems(**I2P, raw_dataset_dir="data/i2p") == []
    (unknown,) = problems(**{**I2P, "template_name": "haet"}, raw_dataset_dir="data/i2p")
    assert unknown.startswith("template_name: there is no category 'haet'")
    assert "Did you mean 'hate'?" in unknown
    Path("data/i2p/images/hate/1.jpg").write_bytes(b"")
    (broken,) = problems(**I2P, raw_dataset_dir="data/i2p")
    assert broken.startswith("raw_dataset_dir: 1 files of data/i2p are missing or cannot be used")
    assert problems(retain_set="seed_images")[0].startswith("retain_set: seed_images needs the photos")
    assert problems(substitute="Van_Goph")[0].startswith("substitute: 'Van_Goph' is no style")
    assert problems(template_name=["Abstractionism", "Van_Gogh"]) == []
    (too_deep,) = problems(template="object", raw_dataset_dir="data/quick-canvas-dataset/sample/Van_Gogh")
    assert "holds no images laid out as <Style>/<Class>/<n>.jpg" in too_deep


def test_threshold_chooses_a_mask_and_random_fraction_is_the_size_of_a_random_one() -> None:
    """A file of the first version, whose threshold did both, is taken where it says the same, and else told the key."""
    assert TrainConfig(masking="random", threshold=0.5).random_fraction == 0.5
    assert TrainConfig(masking="random", threshold=0.5, random_fraction=0.3).random_fraction == 0.3
    assert TrainConfig(masking="saliency", threshold=0.25).threshold == 0.25
    (mistake,) = mistakes_of(TrainConfig, masking="random", threshold=0.25)
    assert "set random_fraction: 0.25" in mistake


def test_thresholds_are_always_a_tuple():
    assert MaskConfig(threshold=0.3).thresholds == (0.3,)
    assert MaskConfig(threshold=[0.3, 0.5]).thresholds == (0.3, 0.5)
    assert mistakes_of(TrainConfig, threshold=[0.3, 0.5])
    assert mistakes_of(MaskConfig, threshold=0)
    assert mistakes_of(MaskConfig, threshold=float("nan"))


@pytest.mark.parametrize("devices", ["cpu", "0", "cuda:1", "0,1", "cpu,cpu", "cuda:0,1"])
def test_devices(devices):
    assert MaskConfig(devices=devices).devices == devices


@pytest.mark.parametrize("devices", ["gpu", "0;1", "-1", "cuda", "", "0 ", "0,", ",0"])
def test_devices_that_are_none(devices):
    assert mistakes_of(MaskConfig, devices=devices)[0].startswith("devices: ")


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("devices", "why"), [("cpu,0", "one kind"), ("0,cuda:0", "a GPU twice")])
def test_devices_that_cannot_work_together(devices, why):
    (mistake,) = check_paths(MaskConfig(devices=devices))
    assert mistake.startswith("devices: ")
    assert why in mistake


@pytest.mark.usefixtures("world")
def test_everything_there_is_no_problem():
    assert check_paths(MaskConfig()) == []
    assert check_paths(TrainConfig()) == []


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint, data, mask = check_paths(TrainConfig())
    assert checkpoint.startswith(
        "ckpt_path: there is no file models/compvis/style50/compvis.ckpt; `download_model compvis`"
    )
    assert data.startswith(
        "raw_dataset_dir: there is no folder data/quick-canvas-dataset/sample; `download_data sample"
    )
    assert mask.startswith(
        "mask_path: there is no mask at outputs/saliency_unlearning/masks; make it: python -m "
    )


@pytest.mark.usefixtures("world")
def test_the_command_for_a_missing_mask_makes_the_mask_of_this_concept():
    config = TrainConfig(template="object", template_name="Dogs", seed=3, threshold=0.3, mask_path="my masks")
    words = shlex.split(mask_command(config))
    assert words[:3] == ["python", "-m", "mu.algorithms.saliency_unlearning.scripts.generate_mask"]
    mask = parse_cli(MaskConfig, words[3:])
    for key in keys_of(DataKeys):
        assert getattr(mask, key.name) == getattr(config, key.name)
    assert (mask.output_dir, mask.threshold) == ("my masks", 0.3)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("mask_path", "folder"),
    [("masks.v2", "masks.v2"), ("runs/1.5", "runs/1.5"), ("a/mask_0.5.safetensors", None)],
)
def test_a_folder_of_masks_may_have_a_dot_in_its_name(mask_path, folder):
    mask = parse_cli(MaskConfig, shlex.split(mask_command(TrainConfig(mask_path=mask_path)))[3:])
    assert mask.output_dir == (folder or MaskConfig().output_dir)


def test_no_mask_is_asked_for_where_none_is_used(world):
    (world / "outputs/saliency_unlearning/masks/a/mask_0.5.safetensors").unlink()
    assert len(check_paths(TrainConfig())) == 1
    assert check_paths(TrainConfig(masking="random", mask_path=None)) == []
    assert mistakes_of(TrainConfig, mask_path=None)[0].startswith("mask_path: masking saliency needs a mask")


@pytest.mark.usefixtures("world")
def test_a_concept_that_the_folder_has_not_is_found_with_the_nearest():
    (problem,) = check_paths(MaskConfig(template_name="Abstractionsim"))
    assert problem.startswith("template_name: there is no style 'Abstractionsim' in data/")
    assert "Did you mean 'Abstractionism'?" in problem
    (problem,) = check_paths(MaskConfig(template="object", template_name="Birds"))
    assert "it has: Cats, Dogs" in problem


@pytest.mark.usefixtures("world")
def test_an_output_folder_that_is_a_file_is_found():
    (problem,) = check_paths(MaskConfig(output_dir="models/compvis/style50/compvis.ckpt/x"))
    assert problem.startswith("output_dir: ")


def make_run(
    folder: Path, name: str, age: int, *, model: str = "model.safetensors", **concept: str | tuple[str, ...]
) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / model).write_bytes(b"x")
    os.utime(run / model, (1_000_000 - age, 1_000_000 - age))
    (run / "config.yaml").write_text(dump(TrainConfig(masking="none", **concept)))
    return run / model


def test_a_checkpoint_is_a_file_a_run_or_the_newest_of_the_runs(tmp_path):
    oldest = make_run(tmp_path, "c", 30, template_name="Noto")
    middle = make_run(tmp_path, "b", 20, template_name="Noto", model="model.ckpt")
    newest = make_run(tmp_path, "a", 10, template="object", template_name="Cats")
    (tmp_path / "unfinished").mkdir()
    assert checkpoint_file(str(oldest)) == oldest
    assert checkpoint_file(str(middle.parent)) == middle
    assert checkpoint_file(str(tmp_path)) == newest
    assert checkpoint_file(str(tmp_path), template="style", template_name="Noto") == middle
    assert EvaluateConfig(ckpt_path=tmp_path, template_name="Noto").checkpoint() == middle
    several = make_run(tmp_path, "d", 5, template_name=("Blob", "Noto"))
    assert checkpoint_file(str(tmp_path), template="style", template_name=("Noto", "Blob")) == several
    assert checkpoint_file(str(tmp_path), template="style", template_name="Noto") == middle
    problems = check_paths(EvaluateConfig(ckpt_path=tmp_path, template_name="Blob"))  # alone
    assert any("nor a finished run that forgot style Blob" in problem for problem in problems)
    assert any(
        "unfinished holds neither" in problem
        for problem in check_paths(SampleConfig(prompts=["x"], ckpt_path=tmp_path / "unfinished"))
    )


def test_prompts_come_from_the_key_or_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat, sitting\n\n  a dog \n", encoding="utf-8")
    assert [case.prompt for case in SampleConfig(prompts_path=path).cases()] == ["a cat, sitting", "a dog"]
    assert [case.prompt for case in SampleConfig(prompts="a cat, sitting").cases()] == ["a cat, sitting"]
    assert mistakes_of(SampleConfig) == mistakes_of(SampleConfig, prompts=["x"], prompts_path=path)
    path.write_text("\n")
    for wrong in (path, tmp_path / "absent.txt"):
        problems = check_paths(SampleConfig(prompts_path=wrong))
        assert sum(problem.startswith("prompts_path: ") for problem in problems) == 1
    for absent in (tmp_path / "absent.txt", tmp_path / "absent.csv"):
        [told] = [one for one in check_paths(SampleConfig(prompts_path=absent)) if "prompts_path" in one]
        assert told == f"prompts_path: there is no file {absent}; give a .txt or .csv file of prompts"
    [told] = [one for one in check_paths(SampleConfig(prompts_path=tmp_path)) if "prompts_path" in one]
    assert told.startswith(f"prompts_path: {tmp_path} is a folder, not a file; ")


def test_the_model_before_training_is_a_file(tmp_path):
    for wrong in (tmp_path, tmp_path / "absent.ckpt"):
        problems = check_paths(EvaluateConfig(base_ckpt_path=wrong))
        assert sum(problem.startswith("base_ckpt_path: ") for problem in problems) == 1


def test_a_mask_is_not_asked_for_under_a_wrong_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, overrides={**GENERATED, "template_name": "Nto"}, on_disk=True)
    assert not any(mistake.startswith("mask_path") for mistake in caught.value.mistakes)


def test_a_concept_outside_the_grid_is_not_evaluated():
    assert "Did you mean 'Noto'?" in mistakes_of(EvaluateConfig, template_name="Nto")[0]
    assert EvaluateConfig(template="object", template_name="Cats").template_name == "Cats"


@pytest.mark.parametrize(
    ("cls", "values", "expected"),
    [
        (EvaluateConfig, {"left_out": ["Notto"]}, "'Notto' is not on the grid"),
        (EvaluateConfig, {"left_out": ["Noto"]}, "'Noto' is forgotten and must be counted"),
        (EvaluateConfig, {"left_out": OBJECTS[1:]}, "fewer than two objects would be counted"),
        (EvaluateConfig, {"cra_prompts": "own"}, "is not one of: retained, all"),
    ],
)
def test_readings_that_leave_nothing_to_count_are_refused(cls, values, expected):
    assert expected in mistakes_of(cls, **values)[0]


def test_readings_of_the_scores_are_taken():
    from mu.evaluation.metrics import CRA_PROMPTS

    assert (EvaluateConfig().cra_prompts, EvaluateConfig().left_out) == ("retained", ())
    choices = {key.name: key.rule.choices for key in keys_of(EvaluateConfig)}
    assert choices["cra_prompts"] == CRA_PROMPTS
    assert EvaluateConfig(left_out="Blob").left_out == ("Blob",)


def test_prompts_may_come_from_a_table(tmp_path):
    path = tmp_path / "cases.CSV"
    path.write_text("case_number,prompt,sd_seed\n4,a cat,9\n4,a cat,8\n7,a dog,9\n")
    config = SampleConfig(prompts_path=path)
    assert [(case.case_number, case.seed) for case in config.cases()] == [("4", 9), ("4", 8), ("7", 9)]
    plain = override(config, use_row_settings=False).cases()
    assert [(case.case_number, case.seed) for case in plain] == [("4", None), ("7", None)]
    path.write_text("case_number,promt\n4,a cat\n")
    problems = check_paths(config)
    assert any(problem.startswith(f"prompts_path: {path} has no column 'prompt'") for problem in problems)


def test_the_model_file_is_stable_diffusion_v1():
    from mu.ldm import load_model

    model = load_model(resolve_path(TrainConfig().model_config_path), device="meta")
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == 859_520_964
    assert (model.image_size, model.scale_factor, model.num_timesteps) == (512, 0.18215, 1000)
    assert sum(p.numel() for p in model.first_stage_model.parameters()) == 83_653_863
    assert sum(p.numel() for p in model.cond_stage_model.parameters()) == 123_060_480
