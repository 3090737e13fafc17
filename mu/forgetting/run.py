"""From what is asked to the answer, on one page: plan, mask, training, pictures and scores.

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
from collections.abc import Iterator
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
from mu.evaluation.report import report_training
from mu.forgetting.answer import Forgotten
from mu.forgetting.config import ForgetConfig
from mu.forgetting.pictures import compare
from mu.forgetting.plan import RESULT_NAME, finished, named, plan_of
from mu.forgetting.recipes import Recipe, recipe_of
from mu.run_folder import RESULT, RunFolder
from mu.unlearning.checkpoints import find_run_state
from mu.unlearning.config import OutputKeys
from mu.unlearning.run_state import ResumeError
from mu.unlearning.training_config import RESUME_NEWEST, TrainingKeys
from mu.verbosity import bars_off, console_level, is_json, is_quiet, verbosity

_log = logging.getLogger(__name__)


def forget(config: ForgetConfig) -> Forgotten:
    """Make a model forget, and look at what it forgot and kept.

    Returns:
        Where everything is, and the numbers.

    Raises:
        ConfigError: a key is wrong.
        MuError: see `SaliencyUnlearningAlgorithm.run` and `mu.evaluation.evaluation.run`.
        KeyboardInterrupt, Terminated: it was stopped; the command that goes on has been printed.
    """
    started = time.monotonic()

    # 1. What is asked.
    recipe = recipe_of(config)
    with (
        _console(),
        RunFolder.go_on(config.output_dir, recipe.folder.name) as folder,
        _saying_how_to_go_on(config),
    ):
        folder.save_config(config)

        # 2. What it will take.
        plan = plan_of(recipe).require()
        _say(f"{plan}\n")

        # 3. Images and mask: the images are drawn by the model itself, before anything in it has moved.
        train = recipe.train
        if recipe.mask is not None and isinstance(train, TrainConfig):
            if finished(recipe, "mask") is None:
                _say("Drawing images, and finding the weights that matter for what is forgotten ...")
                MaskingAlgorithm(recipe.mask).run()
            train = override(train, mask_path=str(recipe.folder / "mask"))

        # 4. Training; and the proof that nothing else moved.
        if finished(recipe, "train") is None:
            first = "Drawing what is to be kept, training" if isinstance(train, TrainConfig) else "Training"
            _say(f"{first}, writing the file, and checking that nothing else in it changed ...")
            _train(train)
        trained = finished(recipe, "train")
        assert trained is not None
        written = json.loads((trained / RESULT).read_text(encoding="utf-8"))
        checkpoint = Path(written["checkpoint"])

        # 5. Pictures and scores, of the written file.
        found = _read(recipe.folder / RESULT_NAME)
        if not found:
            _say("Drawing the same pictures before and after ...")
            found = _looked_at(recipe, train, trained, checkpoint)
            folder.save_json(RESULT_NAME, found)

        # 6. The answer.
        answer = Forgotten(
            what=named(recipe),
            prompts=recipe.prompts,
            instead=recipe.asked.instead,
            kept=recipe.kept_in_words,
            folder=recipe.folder,
            checkpoint=checkpoint,
            patch=None if written["patch"] is None else Path(written["patch"]),
            pictures=Path(found["pictures"]),
            report=None if found["report"] is None else Path(found["report"]),
            scores=found["scores"],
            moved=found["moved"],
            weights=(written["weights_changed"], written["weights_total"]),
            base=config.ckpt_path,
            structure=config.structure,
            seconds=time.monotonic() - started,
        )
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


def _looked_at(recipe: Recipe, train: OutputKeys, trained: Path, checkpoint: Path) -> dict[str, Any]:
    """Pictures, report, and numbers: scores where there is a classifier, else how far pictures moved."""
    if recipe.scores is not None:
        result = evaluation.run(override(recipe.scores, ckpt_path=str(checkpoint)))
        run = Path(str(result["run"]))
        metrics = json.loads((run / RESULT).read_text(encoding="utf-8"))
        numbers = {
            key: {
                "meaning": metrics["meanings"][key],
                **{name: found[key]["value"] for name, found in metrics["models"].items()},
                "n": metrics["models"]["after"][key]["n"],
            }
            for key in ("UA", "IRA", "CRA", "own")
        }
        paths = {"pictures": result["picture"], "report": result.get("report")}
        return {**paths, "scores": numbers, "moved": None}

    # Picture and numbers lie with those of the training, whose report shows them.
    picture = trained / "pictures" / "before_after.png"
    title = f"{named(recipe)} forgotten (framed): same prompts, same noise"
    moved = compare(train, checkpoint, recipe.prompts, recipe.kept, path=picture, title=title)
    write_atomically(trained / "moved.json", f"{json.dumps(moved.as_dict(), indent=2)}\n".encode())
    report = report_training(trained, show_unsafe=False)
    return {
        "pictures": str(picture),
        "report": None if report is None else str(report),
        "scores": None,
        "moved": moved.as_dict(),
    }


def _read(path: Path) -> dict[str, Any]:
    """What an earlier call has found, if all of it is still there."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    files = [found[key] for key in ("pictures", "report") if found[key] is not None]
    return found if all(Path(file).is_file() for file in files) else {}


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
