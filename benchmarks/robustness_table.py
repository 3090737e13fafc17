"""Attacks on the models of the results table, on their base, and on the oracles; goes on where it stopped.

What a method unlearned is shared with the results table in the same folder. A finished attack is noted below
`<output_dir>/attacked`; what it learnt and drew is kept by the attack itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.robustness_config import RobustnessConfig
from benchmarks.robustness_text import BASE, OTHER_NAME, Row, markdown
from benchmarks.table_config import CONCEPTS
from benchmarks.table_rows import concept_folder, deciding, kind_of
from benchmarks.table_text import label
from benchmarks.unlearned import Unlearned, claimed
from mu.atomic import write_atomically
from mu.config import override, require_paths, resolve_path
from mu.evaluation.attacks import attack
from mu.evaluation.attacks.config import AttackConfig
from mu.run_folder import environment

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model that is attacked.

    Attributes:
        name: `salun 0.1`, `uce`, `oracle`.
        identity: of what its weights are, or what they were made from.
    """

    name: str
    checkpoint: Path
    identity: str


def run(config: RobustnessConfig) -> dict[str, Any]:
    """Make the attacks that are missing, and the table.

    Returns:
        `rows`, their number; `table`, path of `robustness.md`, beside `robustness.json`.

    Raises:
        ConfigError: a path or a recipe is missing or wrong.
        MuError: a run failed; what was made before it stays.
    """
    require_paths(config)
    unlearned = Unlearned(config)
    rows: list[Row] = []
    wanted = config.concepts or CONCEPTS
    for number, concept in enumerate(wanted):
        _log.info("concept %d of %d: %s", number + 1, len(wanted), concept)
        with claimed(concept_folder(config, concept), wait=True):
            subjects = list(_subjects(config, unlearned, concept))
            for name in config.attacks:
                rows += _attacked(config, name, concept, subjects)
                _write(config, rows)
    return {"rows": len(rows), "table": Path(config.output_dir) / f"{config.table_name}.md"}


def _subjects(config: RobustnessConfig, unlearned: Unlearned, concept: str) -> Iterator[Subject]:
    """The oracle where there is one, and a model of each method and size of mask."""
    if config.oracles is not None:
        path = resolve_path(config.oracles) / f"{concept}.safetensors"
        if path.is_file():
            yield Subject("oracle", path, hashlib.sha256(path.read_bytes()).hexdigest())
    for planned, made in unlearned.made(concept):
        checkpoint = Path(config.output_dir) / made["checkpoint"]
        yield Subject(label(planned.name, planned.threshold), checkpoint, made["settings_sha256"])


def _attacked(config: RobustnessConfig, name: str, concept: str, subjects: list[Subject]) -> list[Row]:
    """The rows of one attack on one concept: of the base first, then of each subject."""
    rows: dict[str, list[Row]] = {}
    for subject in subjects:
        asked = override(
            config.attack(kind_of(concept)),
            attack=name,
            template=kind_of(concept),
            template_name=concept,
            ckpt_path=str(subject.checkpoint),
            devices=config.devices,
            report=False,
            output_dir=str(Path(config.output_dir) / "attacks"),
        )
        for row in _kept(config, asked, subject) or _make(config, asked, subject):
            rows.setdefault(row["subject"], []).append(row)
    for of_base in (OTHER_NAME, BASE):  # each run attacks it too, to the same numbers
        if found := rows.pop(of_base, None):
            rows = {of_base: found[: len(found) // len(subjects)], **rows}
    return [row for found in rows.values() for row in found]


def _path(config: RobustnessConfig, asked: AttackConfig, subject: Subject) -> Path:
    decides = json.dumps([deciding(asked), subject.identity], sort_keys=True)
    digest = hashlib.sha256(decides.encode()).hexdigest()[:12]
    name = f"{asked.template_name}-{subject.name}-{asked.attack}-{digest}".replace(" ", "-")
    return Path(config.output_dir) / "attacked" / f"{name}.json"


def _kept(config: RobustnessConfig, asked: AttackConfig, subject: Subject) -> list[Row] | None:
    """What an earlier call made with the same settings."""
    path = _path(config, asked, subject)
    if not config.resume or not path.is_file():
        return None
    found: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _make(config: RobustnessConfig, asked: AttackConfig, subject: Subject) -> list[Row]:
    """A row a model and stage of a finished attack."""
    result = attack.run(asked)
    metrics = json.loads((Path(str(result["run"])) / "metrics.json").read_text(encoding="utf-8"))
    names = {"after": subject.name, "before": BASE, attack.OTHER_NAME: OTHER_NAME}
    rows = [
        {
            "template": asked.template,
            "template_name": asked.template_name,
            "attack": asked.attack,
            "subject": names[model],
            "stage": stage,
            **{key: counted[key] for key in ("success", "both", "learnt")},
        }
        for model, found in metrics["models"].items()
        for stage, counted in found["stages"].items()
    ]
    write_atomically(_path(config, asked, subject), json.dumps(rows, indent=2).encode())
    return rows


def _write(config: RobustnessConfig, rows: list[Row]) -> None:
    """`<table_name>`.json and .md."""
    path = Path(config.output_dir) / config.table_name
    content = {
        "seeds": {kind: list(config.attack(kind).seeds) for kind in ("style", "object")},
        "attacks": {kind: deciding(config.attack(kind)) for kind in ("style", "object")},
        "environment": environment(),
        "rows": rows,
    }
    write_atomically(f"{path}.json", f"{json.dumps(content, indent=2)}\n".encode())
    write_atomically(f"{path}.md", markdown(rows).encode())
