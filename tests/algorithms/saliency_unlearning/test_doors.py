from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mu.algorithms.saliency_unlearning.configs import MaskConfig
from mu.commands.answers import masked
from mu.config import dump, keys_of, load_config

PACKAGE = "mu.algorithms.saliency_unlearning"
# door -> its config class, the module that does the work, and the name called there
DOORS = {
    "generate_mask": ("MaskConfig", f"{PACKAGE}.algorithm", "MaskingAlgorithm"),
    "train": ("TrainConfig", f"{PACKAGE}.algorithm", "SaliencyUnlearningAlgorithm"),
    "sample": ("SampleConfig", "mu.commands.sampling", "run"),
    "evaluate": ("EvaluateConfig", "mu.evaluation.evaluation", "run"),
}
RUN = Path("outputs/run")
RESULT = {
    "run": RUN,
    "masks": {0.5: RUN / "mask_0.5.safetensors"},
    "kept": {0.5: 5},
    "total": 10,
    "checkpoint": RUN / "model.safetensors",
    "patch": RUN / "model.patch.safetensors",
    "pictures": None,
    "mask": RUN / "mask_0.5.safetensors",
    "weights_changed": 4,
    "weights_selected": 5,
    "weights_total": 10,
    "steps": 3,
    "images": 2,
    "sampled": 1,
    "index": RUN / "images.csv",
    "images of each model": 4,
    "UA": {"meaning": "images that are not seen as it", "before, %": None, "after, %": 98.25},
    "FID": {"meaning": "distance", "after": "3.5 (n = 4)"},
    "report": RUN / "report.html",
    "seconds": 123.4,
}
"""What all doors' work gives, in one."""
SAID = {
    "generate_mask": """Found the weights that matter most for the style Abstractionism: 5 (50.0%) of the 10 weights \
of the UNet, from 2 images, in 2 min 3 s.
  mask     outputs/run/mask_0.5.safetensors
  numbers  outputs/run/metrics.json
To forget it, moving these weights alone:
  python -m mu.algorithms.saliency_unlearning.scripts.train --config_path YOUR.yaml --template_name Abstractionism \
--mask_path outputs/run/mask_0.5.safetensors
""",
    "train": """Made the model forget the style Abstractionism by 3 steps, in 2 min 3 s: 4 of its 10 UNet weights \
changed, and not one bit of the file outside the 5 in the mask.
  model    outputs/run/model.safetensors
  patch    outputs/run/model.patch.safetensors
  report   outputs/run/report.html
  numbers  outputs/run/metrics.json
For diffusers:
  python -m mu.algorithms.saliency_unlearning.scripts.convert outputs/run/model.safetensors outputs/run/diffusers \
--model_config_path model.yaml
""",
    "sample": """Drew 1 of 2 images in 2 min 3 s; the rest was there already.
  images   outputs/run/images
  index    outputs/run/images.csv
  numbers  outputs/run/metrics.json
""",
    "evaluate": """Measured 4 images of each model, in 2 min 3 s; to be forgotten: the style Noto.
                                       before    after
UA    images that are not seen as it        -   98.2 %
FID, after: 3.5 (n = 4)
  report   outputs/run/report.html
  numbers  outputs/run/metrics.json
""",
}
# Runs a door as `python -m` does, then tells which heavy packages it has imported.
PROGRAM = """
import json, runpy, sys
code = 0
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code
heavy = sorted({"torch", "transformers", "numpy", "pytorch_lightning", "open_clip"} & set(sys.modules))
print(json.dumps([code, heavy]))
"""


def run_apart(door: str, *argv: str, cwd: Path | None = None) -> tuple[int, list[str], str, str]:
    """(exit code, heavy packages imported, stdout, stderr) of a door in its own process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{PACKAGE}.scripts.{door}", *argv],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"},
    )
    *printed, last = done.stdout.splitlines()
    code, heavy = json.loads(last)
    return code, heavy, "\n".join(printed), done.stderr


@pytest.mark.parametrize("door", DOORS)
def test_help_is_quick_and_names_every_key(door):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, heavy, printed, said = run_apart(door, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert (code, heavy, said) == (0, [], "")
    assert seconds < 1, f"--help took {seconds:.2f} s of processor time"
    home = "mu.evaluation.config" if door in ("sample", "evaluate") else f"{PACKAGE}.configs"
    cls = getattr(importlib.import_module(home), DOORS[door][0])
    for key in keys_of(cls):
        assert f"\n--{key.name}  {key.type_words}" in printed
        assert " ".join(key.rule.help.split()) in " ".join(printed.split())
    own = {
        "generate_mask": "mask_style",
        "train": "train_style",
        "evaluate": "evaluate_style",
        "benchmark_unlearning": "benchmark",
    }
    assert f"\n      emoji_canvas/{own.get(door, door)}.yaml\n" in printed


@pytest.mark.parametrize("door", DOORS)
def test_promise_25_mistakes_come_in_one_message_before_torch(door, tmp_path):
    (tmp_path / "x.yaml").write_text("no_such_key: 1\ndevices: '${oc.env:HOME}'\n")
    argv = ["--config_path", "x.yaml", "--sample_stepz", "3", "--output_dir", "x.yaml/below"]
    code, heavy, printed, said = run_apart(door, *argv, cwd=tmp_path)
    assert (code, heavy, printed) == (2, [], "")
    first, *mistakes = said.splitlines()
    assert first == f"{len(mistakes)} mistakes in the configuration:"
    for expected in (
        "no_such_key: ",
        "--sample_stepz: ",
        "devices: '${oc.env:HOME}': values are not",
        "output_dir: ",
    ):
        assert sum(mistake.startswith(f"  {expected}") for mistake in mistakes) == 1
    assert "Traceback" not in said


def test_promise_25_every_kind_of_mistake_is_in_the_one_message(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: .nan\nalpha: -1\ntrain_method: fulll\nbatch_size: two\nepochz: 3\n")
    argv = ["--config_path=x.yaml", "--template_name", "../up", "--ckpt_path", "absent.ckpt"]
    code, heavy, _, said = run_apart("train", *argv, cwd=tmp_path)
    assert (code, heavy) == (2, [])
    for expected in (
        "lr: must be finite, got nan (x.yaml line 1)",
        "alpha: must be >= 0 and <= 1000000, got -1 (x.yaml line 2)",
        "train_method: 'fulll' is not one of: full, notime",
        "batch_size: must be a whole number, got 'two' (x.yaml line 4)",
        "epochz: there is no such key. Did you mean 'epochs'? (x.yaml line 5)",
        "template_name: '../up' is used as a folder's name",
        "ckpt_path: there is no file absent.ckpt; `download_model compvis` puts one at",
    ):
        assert f"\n  {expected}" in said


@pytest.fixture
def handed_on(monkeypatch, tmp_path):
    """Stands in for the modules behind the doors; gives the configs that they are handed."""
    monkeypatch.chdir(tmp_path)
    handed = []

    class Algorithm:
        def __init__(self, config, **overrides):
            assert overrides == {}
            handed.append(config)

        def run(self):
            return RESULT

    def run(config):
        return Algorithm(config).run()

    behind: dict[str, types.ModuleType] = {}
    for _, module, name in DOORS.values():
        stand_in = behind.setdefault(module, types.ModuleType(module))
        setattr(stand_in, name, run if name == "run" else Algorithm)
    for module, stand_in in behind.items():
        parent, _, name = module.rpartition(".")
        monkeypatch.setitem(sys.modules, module, stand_in)
        monkeypatch.setattr(importlib.import_module(parent), name, stand_in, raising=False)
    return handed


def files_for(door: str, folder: Path) -> list[str]:
    """Flags under which nothing is missing on disk."""
    for name in ("model.ckpt", "model.yaml", "classifier.safetensors", "mask.safetensors"):
        (folder / name).write_bytes(b"x")
    (folder / "canvas/Abstractionism/Cats").mkdir(parents=True)
    model = ["--ckpt_path", "model.ckpt", "--model_config_path", "model.yaml", "--devices", "cpu"]
    data = ["--raw_dataset_dir", "canvas"]
    classifier = ["--classifier_path", "classifier.safetensors"]
    return {
        "generate_mask": model + data,
        "train": [*model, *data, "--mask_path", "mask.safetensors", "--report", "false"],
        "sample": [*model, "--prompts", "A Cats image, sitting", "--seeds", "3,4"],
        "evaluate": [*model, *classifier, "--report", "false"],
    }[door]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_hands_the_checked_config_on_and_prints_what_comes_back(door, handed_on, tmp_path, capsys):
    flags = files_for(door, tmp_path)
    module = importlib.import_module(f"{PACKAGE}.scripts.{door}")
    assert module.main(flags) == 0
    (config,) = handed_on
    assert type(config).__name__ == DOORS[door][0]
    for flag, text in zip(flags[::2], flags[1::2], strict=True):
        value = getattr(config, flag.removeprefix("--"))
        read = {"A Cats image, sitting": ("A Cats image, sitting",), "3,4": (3, 4), "false": False}
        expected = read.get(text, text)
        assert value == expected
    assert capsys.readouterr().out == f"\n{SAID[door]}", "the answer alone"
    assert module.main([*flags, "--log_level", "debug"]) == 0
    assert dump(config) in capsys.readouterr().out
    assert module.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(RESULT, default=str))


def test_a_packaged_recipe_is_used_by_name(handed_on, tmp_path, capsys):
    module = importlib.import_module(f"{PACKAGE}.scripts.generate_mask")
    flags = ["--config_path", "emoji_canvas/mask_style.yaml", *files_for("evaluate", tmp_path)[:6]]
    assert module.main([*flags, "--template_name", "Blob"]) == 0
    (config,) = handed_on
    recipe = load_config(type(config), config_path="emoji_canvas/mask_style.yaml")
    assert (config.template_name, config.batch_size) == ("Blob", recipe.batch_size)
    assert "emoji_canvas/mask_style.yaml is not on disk; using " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [(None, "YOUR.yaml"), ("my_dog.yaml", "my_dog.yaml"), ("mask_dog.yaml", "YOUR.yaml")],
)
def test_the_mask_is_followed_by_training_with_the_same_file_where_it_serves_both(given, named):
    ((_, command),) = masked(MaskConfig(), RESULT, given).following
    assert f"--config_path {named} " in command
