"""The results table: every style and every object forgotten in turn by one recipe each, and measured.

A row is a concept, a method (the recipe, or a control of it) and a threshold. Goes on where it stopped: a finished row
is noted in a `made.json` below `<output_dir>/runs/<concept>`, and images that exist are not sampled again, those of the
base model once for all rows. Nothing is chosen by what comes out: each row is unlearned once, and counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import BenchmarkConfig, TrainConfig
from mu.algorithms.saliency_unlearning.results_table import (
    SCORES,
    Row,
    by_method,
    label,
    markdown,
    mean_of,
    reading,
    scores_of,
)
from mu.algorithms.saliency_unlearning.variants import Variant, concept_folder, variants
from mu.algorithms.saliency_unlearning.workers import at_work, claimed
from mu.arithmetic import CUBLAS_WORKSPACE, run_arithmetic
from mu.atomic import write_atomically
from mu.config import override, require_paths, resolve_path
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.generated_images import SampleSettings
from mu.devices import resolve_devices
from mu.evaluation.classifier import EmojiClassifier, load_classifier
from mu.evaluation.distances import fid
from mu.evaluation.evaluate import Grid, MeasuredModel, measure
from mu.evaluation.features import ClassifierFeatures, features_of
from mu.evaluation.metrics import table_csv, unlearning_scores
from mu.ldm import load_model
from mu.run_folder import environment

_log = logging.getLogger(__name__)


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Make the rows that are missing, and the table.

    Returns:
        `styles` and `objects`, the means of their rows in percent, with several methods or thresholds as
        `styles, salun 0.5` and so on; `cra_prompts` and `left_out`, how the scores are
        read; `table`, path of `table.md`, `.csv` and `.json`.

    Raises:
        ConfigError: a path or a recipe is missing or wrong.
        MuError: a run failed; the rows made before it stay.
    """
    require_paths(config)
    return Benchmark(config).run()


class Benchmark:
    """One table: its recipes, its grid of images, and the folder it is made in."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.grid = Grid(STYLES, OBJECTS, config.seeds)
        # A recipe may ask for deterministic kernels, when CUDA has long begun; cuBLAS reads this once.
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        self.device = resolve_devices(config.devices[0])
        self.classifier: EmojiClassifier = load_classifier(resolve_path(config.classifier_path), self.device)
        self._bases: dict[tuple[Path, tuple[int, ...]], MeasuredModel] = {}
        self._features = features_of(ClassifierFeatures(self.classifier, Path(config.classifier_path).name))

    def run(self) -> dict[str, Any]:
        config = self.config
        wanted = config.concepts or (*STYLES, *OBJECTS)
        rows: dict[str, list[Row]] = {}
        with self._workers(wanted) as wait_for:
            for wait in (False, True):  # concepts that another command is at come last
                for number, name in enumerate(wanted):
                    if name in rows:
                        continue
                    wait_for(name)
                    _log.info("concept %d of %d: %s", number + 1, len(wanted), name)
                    with claimed(concept_folder(self.config, name), wait=wait) as mine:
                        if mine:
                            rows[name] = self.rows(name)
                            self.write([row for name in wanted for row in rows.get(name, ())])
        every = [row for name in wanted for row in rows[name]]
        return {
            **_summary(every),
            "cra_prompts": config.cra_prompts,
            "left_out": ", ".join(config.left_out) or "none",
            "table": self.folder / f"{config.table_name}.md",
        }

    @contextmanager
    def _workers(self, wanted: Sequence[str]) -> Iterator[Callable[[str], None]]:
        """Processes that make the concepts; the function that is yielded waits for one. With one worker, none."""
        config = self.config
        workers = config.workers or len(config.devices)
        if workers == 1:
            yield lambda _: None
            return
        with at_work(
            _make, wanted, start=partial(_start, config), devices=config.devices, workers=workers
        ) as wait_for:
            # Here they are only gathered: what the workers have made anew is not made anew again.
            self.config = override(config, resume=True)
            yield wait_for

    @run_arithmetic()
    def rows(self, name: str) -> list[Row]:
        """The rows of one concept: each unlearned once, its images sampled once, scored now."""
        found = variants(self.config, name)
        base = self.base(found[0].train)
        masked = [v for v in found if v.train.masking == "saliency" and self._kept(v, base) is None]
        thresholds = tuple(dict.fromkeys(t for variant in masked for t in variant.mask.thresholds))
        seconds = {}
        if masked:  # one pass of gradients for all masks that are missing
            made = MaskingAlgorithm(override(masked[0].mask, threshold=thresholds)).run()
            seconds["mask"] = round(made["seconds"], 1)
        return [self.row(variant, base, seconds if variant in masked else {}) for variant in found]

    def row(self, variant: Variant, base: MeasuredModel, seconds: Mapping[str, float]) -> Row:
        """One row; what an earlier call made with the same settings is kept. `seconds` are those of its mask."""
        train = variant.train
        made = self._kept(variant, base) or self._unlearn(variant, base, seconds)
        after = self._measure(train, self.folder / made["checkpoint"])
        row: Row = {
            "template": train.template,
            "template_name": train.template_name,
            "method": variant.method,
            "threshold": variant.threshold,
        }
        reference = (
            self.base(train, self.config.fid_reference_seeds) if self.config.fid_reference_seeds else None
        )
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

    def _kept(self, variant: Variant, base: MeasuredModel) -> Row | None:
        """What an earlier call made with the same settings."""
        path = variant.folder / "made.json"
        if not self.config.resume or not path.exists():
            return None
        kept: Row = json.loads(path.read_text(encoding="utf-8"))
        same = kept["settings_sha256"] == variant.settings(base.manifest["model"])
        return kept if same and (self.folder / kept["checkpoint"]).is_file() else None

    def _unlearn(self, variant: Variant, base: MeasuredModel, seconds: Mapping[str, float]) -> Row:
        made = SaliencyUnlearningAlgorithm(variant.train).run()
        row: Row = {
            "settings_sha256": variant.settings(base.manifest["model"]),
            "checkpoint": str(made["checkpoint"].relative_to(self.folder)),
            "steps": made["steps"],
            "seconds": {**seconds, "train": round(made["seconds"], 1)},
            "weights_selected": made["weights_selected"],
            "weights_changed": made["weights_changed"],
            "weights_total": made["weights_total"],
        }
        write_atomically(variant.folder / "made.json", json.dumps(row, indent=2).encode())
        return row

    def _fid(self, train: TrainConfig, measured: MeasuredModel, reference: MeasuredModel) -> dict[str, Any]:
        """FID of the images of retained prompts, which are of other seeds than the reference's."""
        sets = (
            [
                image
                for image in images
                if image.asked(train.template) != train.template_name
                and not {image.style, image.object} & set(self.config.left_out)
            ]
            for images in (measured.asked, reference.asked)
        )
        return asdict(fid(*map(self._features, sets), paired=False, resamples=0))

    def base(self, train: TrainConfig, seeds: tuple[int, ...] | None = None) -> MeasuredModel:
        """The recipe's model before unlearning, measured once, with the table's seeds or others."""
        key = train.checkpoint(), seeds or self.config.seeds
        if key not in self._bases:
            # The first of several processes samples its images.
            with claimed(self.folder / "runs", wait=True):
                self._bases[key] = self._measure(train, key[0], seeds=key[1], use_ema=train.use_ema)
        return self._bases[key]

    def _measure(
        self,
        train: TrainConfig,
        checkpoint: Path,
        *,
        seeds: tuple[int, ...] | None = None,
        use_ema: bool = False,
    ) -> MeasuredModel:
        model = load_model(
            resolve_path(train.model_config_path), checkpoint, device=self.device, use_ema=use_ema
        )
        settings = SampleSettings(
            self.config.sample_steps, self.config.guidance_scale, model.image_size, self.config.precision
        )
        return measure(
            model,
            self.classifier,
            self.grid if seeds is None else replace(self.grid, seeds=seeds),
            settings=settings,
            batch_size=self.config.batch_size,
            folder=self.folder,
        )

    def write(self, rows: Sequence[Row]) -> None:
        """`<table_name>`.json, .csv and .md."""
        groups = by_method(rows)
        means = [{kind: mean_of(own, kind) for kind in ("style", "object")} for own in groups.values()]
        content = {
            "seeds": list(self.grid.seeds),
            "sample_steps": self.config.sample_steps,
            "guidance_scale": self.config.guidance_scale,
            "classifier": Path(self.config.classifier_path).name,
            "cra_prompts": self.config.cra_prompts,
            "left_out": list(self.config.left_out),
            "fid_reference_seeds": list(self.config.fid_reference_seeds),
            "environment": environment(),
            "means_percent": means[0],
            "methods": [
                {"method": method, "threshold": threshold, "means_percent": mean}
                for (method, threshold), mean in zip(groups, means, strict=True)
            ],
            "rows": list(rows),
        }
        path = self.folder / self.config.table_name
        write_atomically(f"{path}.json", f"{json.dumps(content, indent=2)}\n".encode())
        identity = ("template", "template_name", "method", "threshold")
        scores = scores_of(rows)
        columns = [*identity, *scores, *(f"base_{key}" for key in scores), "seconds"]
        cells = [
            [
                *(row[key] for key in identity),
                *(row[moment][key]["value"] for moment in ("after", "before") for key in scores),
                sum(row["seconds"].values()),
            ]
            for row in rows
        ]
        write_atomically(f"{path}.csv", table_csv(columns, cells))
        text = markdown(rows) + reading(self.config.cra_prompts, self.config.left_out)
        write_atomically(f"{path}.md", text.encode())


_worker: Benchmark | None = None
"""The table, in a process of `at_work`."""


def _start(config: BenchmarkConfig, device: str) -> None:
    global _worker
    _worker = Benchmark(override(config, devices=(device,)))


def _make(name: str) -> None:
    """Make the rows of a concept, unless another command is at it."""
    assert _worker is not None
    with claimed(concept_folder(_worker.config, name), wait=False) as mine:
        if mine:
            _worker.rows(name)


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
