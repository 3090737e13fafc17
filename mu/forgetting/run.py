"""From a recipe to the answer, on one page: plan, mask, training, pictures and scores.

The name of the result's folder has a digest of all that decides the result, and each stage has a folder in it. A stage
that is done is found there and not done again, and a training that was stopped goes on from its newest checkpoint: so
the same command, given again, goes on where it stopped, and comes to the same bits.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from mu.algorithms.esd.algorithm import ESDAlgorithm
from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import TrainConfig
from mu.algorithms.uce.algorithm import UCEAlgorithm
from mu.algorithms.uce.configs import UCEConfig
from mu.atomic import write_atomically
from mu.config import as_text, keys_of, override
from mu.console import called
from mu.errors import Terminated
from mu.evaluation import evaluation
from mu.evaluation.report import report_evaluation, report_training
from mu.forgetting.answer import RESULT_NAME, Forgotten, finished, in_words, read_answer
from mu.forgetting.config import ForgetConfig
from mu.forgetting.pictures import compare
from mu.forgetting.plan import PICTURE_NAME, REPORT_NAME
from mu.forgetting.recipes import Recipe
from mu.forgetting.stages import plan_of
from mu.run_folder import RESULT, RunFolder
from mu.unlearning.checkpoints import find_run_state
from mu.unlearning.run_state import ResumeError
from mu.unlearning.training_config import RESUME_NEWEST, TrainingKeys
from mu.verbosity import bars_off, console_level, is_json, is_quiet, verbosity

_log = logging.getLogger(__name__)


def run(config: ForgetConfig, recipe: Recipe, *, started: float) -> Forgotten:
    """Do what is left of a recipe.

    Args:
        config: that it was made from.
        started: by `time.monotonic`.

    Raises:
        ConfigError: a path is missing.
        MuError: see `SaliencyUnlearningAlgorithm.run` and `mu.evaluation.evaluation.run`.
        KeyboardInterrupt, Terminated: it was stopped; the command that goes on has been printed.
    """
    with (
        _console(),
        RunFolder.go_on(config.output_dir, recipe.folder.name) as folder,
        _saying_how_to_go_on(config),
    ):
        folder.save_config(config)

        # 1. What it will take.
        plan = plan_of(recipe, timing=config.timing is not False).require()
        _say(f"{plan}\n")

        # 2. Images and mask: the images are drawn by the model itself, before anything in it has moved.
        train = recipe.train
        if recipe.mask is not None and isinstance(train, TrainConfig):
            if finished(recipe, "mask") is None:
                _say("Drawing images, and finding the weights that matter for what is forgotten ...")
                MaskingAlgorithm(recipe.mask).run()
            train = override(train, mask_path=str(recipe.folder / "mask"))

        # 3. Training; and the proof that nothing else moved.
        if finished(recipe, "train") is None:
            first = "Drawing what is to be kept, training" if isinstance(train, TrainConfig) else "Training"
            _say(f"{first}, writing the file, and checking that nothing else in it changed ...")
            _train(train)

        # 4. Pictures and scores, of the written file.
        if read_answer(recipe, seconds=0.0) is None:
            _say("Drawing the same pictures before and after ...")
            folder.save_json(RESULT_NAME, _looked_at(recipe))

        # 5. The answer.
        answer = read_answer(recipe, seconds=time.monotonic() - started)
        assert answer is not None
        write_atomically(recipe.folder / "answer.txt", f"{answer}\n".encode())
        return answer


def _say(text: str) -> None:
    """A line on stderr, where the result goes to stdout; not with `--quiet` and `--json`."""
    if not bars_off():
        print(text, file=sys.stderr, flush=True)


def _console() -> AbstractContextManager[None]:
    """Of the log lines of all stages, which log.txt has, the console gets warnings alone, unless debug is asked for."""
    asked = console_level()
    level = "debug" if asked <= logging.DEBUG else "error" if asked >= logging.ERROR else "warning"
    return verbosity(level, quiet=is_quiet(), json=is_json())


def _train(config: TrainConfig | ESDConfig | UCEConfig) -> None:
    """The run of a method; one that was stopped goes on from its newest checkpoint."""
    if isinstance(config, UCEConfig):
        UCEAlgorithm(config).run()
    elif isinstance(config, ESDConfig):
        ESDAlgorithm(config, resume=_resume(config)).run()
    else:
        SaliencyUnlearningAlgorithm(config, resume=_resume(config)).run()


def _resume(config: TrainingKeys) -> str | None:
    """What `resume` is to be: the newest checkpoint in its folder, if there is one that is whole."""
    if not any(Path(config.output_dir).glob("*/checkpoints/step-*")):
        return None
    try:
        state = find_run_state(override(config, resume=RESUME_NEWEST))
    except ResumeError as error:
        _log.warning("the training begins anew: %s", error)
        return None
    _say(f"It goes on after step {state.step:,}, where it was stopped.")
    return RESUME_NEWEST


def _looked_at(recipe: Recipe) -> dict[str, Any]:
    """Picture, report, and numbers: scores where there is a classifier, else how far pictures moved."""
    trained = finished(recipe, "train")
    assert trained is not None
    checkpoint = Path(json.loads((trained / RESULT).read_text(encoding="utf-8"))["checkpoint"])
    picture, report = recipe.folder / PICTURE_NAME, recipe.folder / REPORT_NAME

    # 1. Scores, or how far pictures moved. The report is written once, where one looks first.
    scores: dict[str, Any] | None = None
    moved: dict[str, Any] | None = None
    written: Path | None = None
    if recipe.scores is not None:
        config = override(recipe.scores, ckpt_path=str(checkpoint), report=False)
        looked = Path(str(evaluation.run(config)["run"]))
        scores = _scores(json.loads((looked / RESULT).read_text(encoding="utf-8")))
        if recipe.scores.report:
            shown = config.show_unsafe_pictures
            written = report_evaluation(looked, checkpoint=checkpoint, show_unsafe=shown, path=report)
    else:  # picture and numbers lie with those of the training, whose report shows them
        looked = trained
        title = f"{in_words(recipe)} forgotten (framed): same prompts, same noise"
        path = looked / "pictures" / PICTURE_NAME
        found = compare(recipe.train, checkpoint, recipe.prompts, recipe.kept, path=path, title=title)
        moved = found.as_dict()
        write_atomically(looked / "moved.json", f"{json.dumps(moved, indent=2)}\n".encode())
        written = report_training(looked, show_unsafe=False, path=report)

    # 2. The picture there too; its run keeps its own, from which `unlearn_diff report` makes a report again.
    write_atomically(picture, (looked / "pictures" / PICTURE_NAME).read_bytes())
    report_path = None if written is None else str(written)
    return {"pictures": str(picture), "report": report_path, "scores": scores, "moved": moved}


def _scores(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of an evaluation's metrics.json: score -> meaning, before, after, n."""
    return {
        key: {
            "meaning": metrics["meanings"][key],
            **{name: found[key]["value"] for name, found in metrics["models"].items()},
            "n": metrics["models"]["after"][key]["n"],
        }
        for key in ("UA", "IRA", "CRA", "own")
    }


@contextmanager
def _saying_how_to_go_on(config: ForgetConfig) -> Iterator[None]:
    """Where it is stopped, print the command that goes on."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        words = f"stopped; what is done is kept. The same command goes on: {command(config)}"
        print(words, file=sys.stderr, flush=True)
        raise


def command(config: ForgetConfig) -> str:
    """The command line that asks for the same."""
    words = [*config.what]
    for key in keys_of(ForgetConfig):
        value = getattr(config, key.name)
        if key.name != "what" and value != key.default:
            words += [f"--{key.name}", as_text(value, split=key.rule.split)]
    return f"{called('mu.commands.forget')} {shlex.join(words)}"
