"""Write the report of a finished training, evaluation or attack again, from the files of its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mu.bars import loading
from mu.cli import run_door
from mu.commands.answers import reported
from mu.config import Config, resolve_path, setting
from mu.console import UCE_EXAMPLE, called
from mu.run_folder import RESULT, writable_problem
from mu.unlearning.find_checkpoint import Problem

MODULE = "mu.commands.report"


class ReportConfig(Config):
    """Of which run."""

    run: str | None = setting(
        None,
        "Folder of a finished run of train, evaluate or attack; of a folder of runs, the newest. The first argument, "
        "without its name.",
        kind="path",
    )

    def folder(self) -> Path:
        """The run's folder that `run` leads to."""
        assert self.run is not None
        given = resolve_path(self.run)
        if (given / RESULT).is_file():
            return given
        results = given.glob(f"*/{RESULT}")
        return max(results, key=lambda path: path.stat().st_mtime_ns, default=given / RESULT).parent

    def conflicts(self) -> Iterator[Problem]:
        if self.run is None:
            yield ("run",), f"is missing; write: {called(MODULE)} RUN_FOLDER"

    def disk_problems(self) -> Iterator[Problem]:
        if self.run is None:
            return
        if not (self.folder() / RESULT).is_file():
            yield ("run",), f"{self.run} is not the folder of a finished run, with a {RESULT}"
        elif (problem := writable_problem(self.folder())) is not None:
            yield ("run",), problem


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Its first word is the folder."""
    return run_door(
        ReportConfig,
        lambda config: run(config.folder()),
        module=MODULE,
        summary=str(__doc__),
        examples=[UCE_EXAMPLE, (MODULE, "outputs/uce")],
        argv=argv,
        answer=reported,
        first_words={"run": "RUN_FOLDER"},
    )


def run(folder: Path) -> dict[str, object]:
    """Write `report.html` into the folder of a finished run; pictures of I2P are blurred unless the run showed them.

    Returns:
        `run` and `report`, their paths.

    Raises:
        ReportError: it is not the folder of a training, an evaluation or an attack, or one of its files is damaged.
        WriteError: the report cannot be written.
    """
    import yaml
    from safetensors import SafetensorError

    with loading():
        from mu.errors import MuError
        from mu.evaluation.attacks.report import is_attack, write_attack_report
        from mu.evaluation.report import REPORT_NAME, read_evaluation, read_training_run, write_report
        from mu.evaluation.report_data import ReportError, is_training_run

    try:
        if is_attack(folder):
            return {"run": folder, "report": write_attack_report(folder)}

        # 1. Read: an evaluation, and the training run in whose folder its checkpoint lies; or a training run alone.
        evaluation, made_in = None, folder
        if not is_training_run(folder):
            evaluation = read_evaluation(folder)
            made_in = Path(evaluation.models["after"].get("checkpoint", folder)).parent
        training = read_training_run(made_in) if is_training_run(made_in) else None

        # 2. Write.
        about = training if evaluation is None else evaluation
        assert about is not None
        shown = bool(about.config.get("show_unsafe_pictures", False))
        report = write_report(
            folder / REPORT_NAME, evaluation=evaluation, training=training, show_unsafe=shown
        )
    except MuError:
        raise
    except (ValueError, yaml.YAMLError, SafetensorError) as error:
        raise ReportError(f"{folder}: a file of the run is damaged ({error})") from error
    return {"run": folder, "report": report}


if __name__ == "__main__":
    raise SystemExit(main())
