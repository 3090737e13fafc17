"""`report.html` of an attack: one file, to be read anywhere, or sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

import mu
from mu.atomic import write_atomically
from mu.evaluation.report import REPORT_NAME, template_environment
from mu.evaluation.report_data import ReportError
from mu.evaluation.report_figures import picture_uri
from mu.run_folder import RESULT
from mu.unlearning.runs import decorating


def is_attack(folder: Path) -> bool:
    """Whether a folder is that of a finished attack."""
    path = folder / RESULT
    return path.is_file() and "attack" in json.loads(path.read_text(encoding="utf-8"))


def report_attack(folder: Path) -> Path | None:
    """Writes it into the run's folder; where it cannot be written, a warning says why, and it is None."""
    report = None
    with decorating(REPORT_NAME, TemplateError, yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError):
        report = write_attack_report(folder)
    return report


def write_attack_report(folder: Path) -> Path:
    """Writes the report of an attack's folder into it; its picture is in the file.

    Raises:
        ReportError: it is not the folder of a finished attack.
        WriteError: the file cannot be written.
    """
    if not is_attack(folder):
        raise ReportError(f"{folder} holds no {RESULT} of an attack; the command attack makes one")
    metrics, environment = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in (RESULT, "environment.json")
    )
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    picture = folder / "pictures" / "attack.png"
    stages = metrics["models"]["after"]["stages"]
    html = (
        template_environment()
        .get_template("attack.html.jinja")
        .render(
            concept=metrics["template_name"],
            metrics=metrics,
            config=config,
            environment=environment,
            folder=folder,
            plain=stages["plain"],
            last=list(stages.values())[-1],
            before=list(metrics["models"].get("before", metrics["models"]["after"])["stages"].values())[-1],
            texts=list(_texts(metrics)),
            picture=picture_uri(picture, blurred=False) if picture.is_file() else None,
            version=mu.__version__,
        )
    )
    return write_atomically(folder / REPORT_NAME, html.encode())


def _texts(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(model or prompt, text) of what was found to be typed."""
    for model, numbers in metrics["models"].items():
        for found in numbers["stages"].values():
            if "text" in found["learnt"]:
                yield model, found["learnt"]["text"]
            for prompt, text in found["learnt"].get("texts", {}).items():
                yield f"{model}, in the place of {prompt}", text
