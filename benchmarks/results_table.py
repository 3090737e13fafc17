"""The results table: every style and every object forgotten in turn by each method, and measured.

A row is a concept, a method with its recipe, and the size of its mask where it has one. Goes on where it stopped: a
finished row is noted in a `made.json` below `<output_dir>/runs/<concept>`, and images that exist are not sampled again,
those of the base model once for all rows. Nothing is chosen by what comes out: each row is unlearned once, and counted.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.table_config import CONCEPTS, TableConfig
from benchmarks.table_rows import PlannedRow, concept_folder, planned_rows
from benchmarks.table_text import SCORES, Row, by_method, label, markdown, mean_of, reading
from mu.arithmetic import CUBLAS_WORKSPACE, run_arithmetic
from mu.atomic import write_atomically
from mu.config import override, require_paths, resolve_path
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.generated_images import SampleSettings
from mu.devices import resolve_devices
from mu.evaluation.distances import fid
from mu.evaluation.emoji_classifier import EmojiClassifier, load_classifier
from mu.evaluation.features import ClassifierFeatures, features_of
from mu.evaluation.grid import Grid, MeasuredModel, measure
from mu.evaluation.metrics import unlearning_scores
from mu.ldm import load_model
from mu.run_folder import environment

_log = logging.getLogger(__name__)
_COUNTS = ("steps", "weights_selected", "weights_changed", "weights_total")
"""What a row keeps of an algorithm's result, where it has it."""


def run(config: TableConfig) -> dict[str, Any]:
    """Make the rows that are missing, and the table.

    Returns:
        `styles` and `objects`, the means of their rows in percent, with several methods or thresholds as
        `styles, salun 0.5` and so on; `cra_prompts` and `left_out`, how the scores are
        read; `table`, path of `table.md`, beside `table.json`.

    Raises:
        ConfigError: a path or a recipe is missing or wrong.
        MuError: a run failed; the rows made before it stay.
    """
    require_paths(config)
    return ResultsTable(config).run()


class ResultsTable:
    """One table: its grid of images, and the folder it is made in."""

    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.grid = Grid(STYLES, OBJECTS, config.seeds)
        # A recipe may ask for deterministic kernels, when CUDA has long begun; cuBLAS reads this once.
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        self.device = resolve_devices(config.devices)
        self.classifier: EmojiClassifier = load_classifier(resolve_path(config.classifier_path), self.device)
        self._bases: dict[tuple[Path, tuple[int, ...]], MeasuredModel] = {}
        self._features = features_of(ClassifierFeatures(self.classifier, Path(config.classifier_path).name))

    def run(self) -> dict[str, Any]:
        """See `run`."""
        config = self.config
        wanted = config.concepts or CONCEPTS
        rows: dict[str, list[Row]] = {}
        for wait in (False, True):  # concepts that another command is at come last
            for number, name in enumerate(wanted):
                if name in rows:
                    continue
                _log.info("concept %d of %d: %s", number + 1, len(wanted), name)
                with claimed(concept_folder(config, name), wait=wait) as mine:
                    if mine:
                        rows[name] = self.rows(name)
                        self.write([row for name in wanted for row in rows.get(name, ())])
        return {
            **_summary([row for name in wanted for row in rows[name]]),
            "cra_prompts": config.cra_prompts,
            "left_out": ", ".join(config.left_out) or "none",
            "table": self.folder / f"{config.table_name}.md",
        }

    @run_arithmetic()
    def rows(self, concept: str) -> list[Row]:
        """The rows of one concept: each unlearned once, its images sampled once, scored now."""
        # 1. What there is, and what an earlier call has made of it
        planned = planned_rows(self.config, concept)
        bases = [self.base(row.train) for row in planned]
        kept = [self._kept(row, base) for row, base in zip(planned, bases, strict=True)]

        # 2. Masks: one pass of gradients for all that are missing
        missing = [
            row for row, made in zip(planned, kept, strict=True) if made is None and row.mask is not None
        ]
        seconds = self._make_masks(missing) if missing else {}

        # 3. Each row: unlearn, sample, count
        return [
            self.row(row, base, made or self._unlearn(row, base, seconds if row in missing else {}))
            for row, base, made in zip(planned, bases, kept, strict=True)
        ]

    def _make_masks(self, rows: Sequence[PlannedRow]) -> dict[str, float]:
        """The masks of all sizes, for the method that has them; the seconds of the pass."""
        first, stage = rows[0].mask, rows[0].method.mask
        assert first is not None
        assert stage is not None
        thresholds = tuple(dict.fromkeys(row.threshold for row in rows))
        started = time.monotonic()
        stage.run(override(first, threshold=thresholds))
        return {"mask": round(time.monotonic() - started, 1)}

    def _kept(self, row: PlannedRow, base: MeasuredModel) -> Row | None:
        """What an earlier call made with the same settings."""
        path = row.folder / "made.json"
        if not self.config.resume or not path.exists():
            return None
        kept: Row = json.loads(path.read_text(encoding="utf-8"))
        same = kept["settings_sha256"] == row.settings(base.manifest["model"])
        return kept if same and (self.folder / kept["checkpoint"]).exists() else None

    def _unlearn(self, row: PlannedRow, base: MeasuredModel, seconds: Mapping[str, float]) -> Row:
        """Make the checkpoint of a row; `seconds` are those of its mask."""
        started = time.monotonic()
        made = row.method.train.run(row.train)
        took = round(time.monotonic() - started, 1)
        found: Row = {
            "settings_sha256": row.settings(base.manifest["model"]),
            "checkpoint": str(Path(made["checkpoint"]).relative_to(self.folder)),
            "seconds": {**seconds, "train": took},
            **{key: made[key] for key in _COUNTS if key in made},
        }
        write_atomically(row.folder / "made.json", json.dumps(found, indent=2).encode())
        return found

    def row(self, planned: PlannedRow, base: MeasuredModel, made: Row) -> Row:
        """One row of the table, of a checkpoint that is there."""
        train = planned.train
        after = self._measure(train, self.folder / made["checkpoint"])
        row: Row = {
            "template": train.template,
            "template_name": train.template_name,
            "method": planned.name,
            "recipe": planned.recipe,
            "threshold": planned.threshold,
        }
        reference = None
        if self.config.fid_reference_seeds:
            reference = self.base(train, self.config.fid_reference_seeds)
        for moment, measured in (("before", base), ("after", after)):
            counted = unlearning_scores(
                measured.predictions,
                template=train.template,
                template_name=train.template_name,
                cra_prompts=self.config.cra_prompts,
                left_out=self.config.left_out,
            ).as_dict()
            row[moment] = {key: counted[key] for key in SCORES}
            if reference is not None:
                row[moment]["FID"] = self._fid(train, measured, reference)
        return {**row, **made}

    def _fid(self, train: Any, measured: MeasuredModel, reference: MeasuredModel) -> dict[str, Any]:
        """FID of the images of retained prompts, which are of other seeds than the reference's."""
        left_out = set(self.config.left_out)
        sets = (
            [
                image
                for image in images
                if image.asked(train.template) != train.template_name
                and not {image.style, image.object} & left_out
            ]
            for images in (measured.asked, reference.asked)
        )
        return asdict(fid(*map(self._features, sets), paired=False, resamples=0))

    def base(self, train: Any, seeds: tuple[int, ...] | None = None) -> MeasuredModel:
        """The recipe's model before unlearning, measured once, with the table's seeds or others."""
        key = train.checkpoint(), seeds or self.config.seeds
        if key not in self._bases:
            # The first of several processes samples its images.
            with claimed(self.folder / "runs", wait=True):
                self._bases[key] = self._measure(train, key[0], seeds=key[1], use_ema=train.use_ema)
        return self._bases[key]

    def _measure(
        self, train: Any, checkpoint: Path, *, seeds: tuple[int, ...] | None = None, use_ema: bool = False
    ) -> MeasuredModel:
        """The images of a checkpoint, sampled where they are missing, and what the classifier sees in them."""
        config = self.config
        yaml = resolve_path(train.model_config_path)
        model = load_model(yaml, checkpoint, device=self.device, use_ema=use_ema)
        return measure(
            model,
            self.classifier,
            self.grid if seeds is None else replace(self.grid, seeds=seeds),
            settings=SampleSettings(
                config.sample_steps, config.guidance_scale, model.image_size, config.precision
            ),
            batch_size=config.batch_size,
            folder=self.folder,
        )

    def write(self, rows: Sequence[Row]) -> None:
        """`<table_name>`.json and .md."""
        config, path = self.config, self.folder / self.config.table_name
        groups = by_method(rows)
        means = [{kind: mean_of(own, kind) for kind in ("style", "object")} for own in groups.values()]
        content = {
            "seeds": list(self.grid.seeds),
            "sample_steps": config.sample_steps,
            "guidance_scale": config.guidance_scale,
            "classifier": Path(config.classifier_path).name,
            "cra_prompts": config.cra_prompts,
            "left_out": list(config.left_out),
            "fid_reference_seeds": list(config.fid_reference_seeds),
            "environment": environment(),
            "means_percent": means[0],
            "methods": [
                {"method": method, "threshold": threshold, "means_percent": mean}
                for (method, threshold), mean in zip(groups, means, strict=True)
            ],
            "rows": list(rows),
        }
        write_atomically(f"{path}.json", f"{json.dumps(content, indent=2)}\n".encode())
        text = markdown(rows) + reading(config.cra_prompts, config.left_out)
        write_atomically(f"{path}.md", text.encode())


@contextmanager
def claimed(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the folder for itself; the lock goes with its process, also when that is killed.

    Args:
        wait: until another process has let go of it; else False is yielded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    with lock:
        yield True


def _summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Means by kind, and by method and threshold where there are several."""
    groups = by_method(rows)
    means = {}
    for (method, threshold), own in groups.items():
        which = f", {label(method, threshold)}" if len(groups) > 1 else ""
        for kind in ("style", "object"):
            if mean := mean_of(own, kind):
                means[f"{kind}s{which}"] = mean
    return means
