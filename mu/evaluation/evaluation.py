"""Measures what a model forgot and what it kept: images of every prompt of the grid, classified and counted.

Images are sampled from a checkpoint and kept in `<output_dir>/grids`, see `mu.evaluation.grid`, or lie in a folder, see
`mu.evaluation.asked_images`. The results go into a new run folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mu import ranks
from mu.atomic import write_atomically
from mu.bars import waiting
from mu.config import resolve_path
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.index import concept_label
from mu.datasets.seen_prompts import cut_notes
from mu.devices import peak_memory_bytes, resolve_devices
from mu.errors import nothing_begun
from mu.evaluation.asked_images import (
    AskedImage,
    any_images,
    folder_images,
    has_concepts,
    of_rows,
    paired,
    rebased,
)
from mu.evaluation.classifiers import Classifier
from mu.evaluation.config import EvaluateConfig
from mu.evaluation.grid import EvaluationError, Grid, MeasuredModel, check_classifier, classify
from mu.evaluation.measures import Quality, Reference, interpolation, load_scorer
from mu.evaluation.metrics import (
    Prediction,
    UnlearningScores,
    memorised,
    predictions_csv,
    unlearning_scores,
)
from mu.evaluation.report import report_evaluation
from mu.evaluation.results import draw, image_table, sentence, summary, write_metrics
from mu.launch import on_ranks
from mu.ldm import load_model
from mu.run_folder import RunFolder, shared_folder


def run(config: EvaluateConfig) -> dict[str, object]:
    """A whole evaluation into a new run folder.

    Its files: `metrics.json` and `metrics.csv`; of each model `predictions_<model>.csv` and `images_<model>.csv` (a row
    an image); `pictures/before_after.png`, `config.yaml`, `environment.json`, `log.txt`, `report.html`. The model
    "before" is that of `base_ckpt_path` or `base_images_dir` and is left out without one. docs/evaluation.md lists all
    fields.

    With several `devices`, as many processes share the sampling; the main one measures. The numbers are those of one.

    Returns:
        What is printed at the end: for each score its meaning and its numbers, how they are read, then paths, `seconds`
        and `peak_memory_bytes` (of the main process so far). With `report: true` the path `report`, None where a
        warning says why it could not be written.

    Raises:
        MuError: a file is missing or wrong, or the settings do not fit each other; the message says which.
    """
    return on_ranks(_run, config, config.devices)


def _run(config: EvaluateConfig) -> dict[str, object]:
    """In each process of the run: all sample, and the main one has what measures."""
    started = time.monotonic()
    made: list[_Evaluation] = []

    def open_folder() -> RunFolder:
        with nothing_begun():
            device = resolve_devices(config.devices)
            made.append(_Evaluation(config, load_scorer(config, device), device))
        return RunFolder.create(config.output_dir, concept_label(config.template_name))

    with shared_folder(open_folder) as folder:
        wanted = ranks.on_main(lambda: list(made[0].wanted()))
        sampled = {each.name: _sample(config, each, folder) for each in wanted}
        for note in dict.fromkeys(note for each in sampled.values() for note in each.notes):
            folder.logger.warning(note)
        return ranks.on_main(lambda: made[0].finish(folder, sampled, started=started))


@dataclass(frozen=True)
class _Wanted:
    """The images of a checkpoint that are to be sampled; `others`, with other seeds, are for comparison alone."""

    name: str
    checkpoint: Path
    images: tuple[AskedImage, ...]
    others: tuple[AskedImage, ...] = ()


@dataclass(frozen=True)
class _Sampled:
    """Where they are, and what they were sampled with."""

    folder: Path
    manifest: Mapping[str, str]
    images: tuple[AskedImage, ...]
    others: tuple[AskedImage, ...]
    notes: tuple[str, ...]


def _sample(config: EvaluateConfig, wanted: _Wanted, folder: RunFolder) -> _Sampled:
    folder.logger.info("%s unlearning: %s", wanted.name, wanted.checkpoint)
    with ranks.in_step():
        with waiting(f"reading {wanted.checkpoint.name}"):
            model = load_model(
                resolve_path(config.model_config_path),
                wanted.checkpoint,
                device=resolve_devices(config.devices),
                use_ema=config.use_ema,
            )
        settings = SampleSettings(
            config.sample_steps, config.guidance_scale, model.image_size, config.precision
        )
        generated = GeneratedImages(model, config.output_dir, settings, subfolder="grids")
    rows, others = (list(rebased(images, generated.path)) for images in (wanted.images, wanted.others))
    generated.sample_missing([*rows, *others], batch_size=config.batch_size, of=wanted.name)
    notes = cut_notes(model.params, [row.prompt for row in (*rows, *others)])
    return _Sampled(generated.path, generated.manifest, of_rows(rows), of_rows(others), tuple(notes))


@dataclass
class _Evaluation:
    """Where the images of each model come from, what the classifier sees in them, and what else is measured."""

    config: EvaluateConfig
    classifier: Classifier | None
    device: str
    sources: dict[str, Path] = field(init=False)
    given: dict[str, tuple[AskedImage, ...]] = field(init=False, default_factory=dict)
    reference_folder: tuple[AskedImage, ...] = field(init=False, default=())
    notes: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Finds checkpoints and folders, and looks at the folders' images, before anything is sampled."""
        config = self.config
        self.styles, self.objects = config.all_names()
        if self.classifier is not None:
            if ":" in config.classifier:
                self.styles = config.styles or self.classifier.styles
                self.objects = config.objects or self.classifier.objects
            if config.images_dir is None:
                check_classifier(self.classifier, Grid(self.styles, self.objects, config.seeds))
        after = config.checkpoint() if config.images_dir is None else resolve_path(config.images_dir)
        base = config.base_ckpt_path if config.base_images_dir is None else config.base_images_dir
        self.sources = {"after": after} if base is None else {"before": resolve_path(base), "after": after}
        folders = {"before": config.base_images_dir, "after": config.images_dir}
        for name, key in (("before", "base_images_dir"), ("after", "images_dir")):
            if folders[name] is not None:
                self.given[name] = self._read(key, self.sources[name])
        if config.fid_reference_dir is not None:
            folder = resolve_path(config.fid_reference_dir)
            self.reference_folder = self._read("fid_reference_dir", folder)
        if len(self.given) == 2 and self.given["before"][0].style and not paired(*self.given.values()):
            keys = [{image.key for image in images} for images in self.given.values()]
            lacking = sorted(keys[0] ^ keys[1])
            style, object, seed = lacking[0]
            raise EvaluationError(
                "base_images_dir and images_dir must have images of the same styles, objects and seeds; "
                f"{len(lacking)} are in one of them alone, such as {style}, {object}, {seed}"
            )

        self.quality = Quality(config, self.classifier, self.device)

    def wanted(self) -> Iterator[_Wanted]:
        """What is to be sampled of each model; nothing of one whose images are given."""
        config = self.config
        if "after" in self.given:
            images = self.given["after"]
        else:
            images = of_rows(list(Grid(self.styles, self.objects, config.seeds).rows(Path())))
        for name, source in self.sources.items():
            others: tuple[AskedImage, ...] = ()
            if name == "before" and config.fid_reference == "base_other_seeds":
                prompts = {(image.style, image.object): image for image in images}
                others = tuple(
                    replace(image, seed=seed)
                    for image in prompts.values()
                    for seed in config.fid_reference_seeds
                )
            if name not in self.given:
                yield _Wanted(name, source, images, others)

    def finish(self, run: RunFolder, sampled: Mapping[str, _Sampled], *, started: float) -> dict[str, object]:
        """Measure, and write the files of the run; returns what is printed at the end."""
        config = self.config
        run.save_config(config)
        run.save_environment()
        for note in self.notes:
            run.logger.warning(note)
        measured = {name: self._measured(run, name, sampled.get(name)) for name in self.sources}
        reference = self._reference(sampled, measured)
        scores: dict[str, UnlearningScores] = {}
        numbers: dict[str, dict[str, object]] = {}
        for name, found in measured.items():
            write_atomically(run.path / f"images_{name}.csv", image_table(found.asked))
            # The base's images are at no distance from themselves.
            itself = reference is not None and reference.images == found.asked
            numbers[name] = self.quality.measure(found.asked, None if itself else reference)
            if self.classifier is None:
                continue
            write_atomically(run.path / f"predictions_{name}.csv", predictions_csv(found.predictions))
            scores[name] = unlearning_scores(
                found.predictions,
                template=config.template,
                template_name=config.template_name,
                cra_prompts=config.cra_prompts,
                left_out=config.left_out,
            )
            sure = memorised(
                found.predictions,
                template=config.template,
                template_name=config.template_name,
                threshold=config.memorised_threshold,
                left_out=config.left_out,
            )
            numbers[name]["memorised"] = asdict(sure)
            run.logger.info("%s: %s", name, sentence(scores[name]))
        write_metrics(
            run,
            config,
            sources=self.sources,
            measured=measured,
            scores=scores,
            numbers=numbers,
            classifier=self.classifier,
            seconds=time.monotonic() - started,
        )
        picture = draw(run.path / "pictures" / "before_after.png", config, measured)
        result = {
            **summary(config, scores, numbers),
            "images of each model": len(measured["after"].asked),
            "checkpoint" if config.images_dir is None else "images": str(self.sources["after"]),
            **({} if picture is None else {"picture": str(picture)}),
            "run": str(run.path),
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if config.report:
            checkpoint = None if config.images_dir is not None else self.sources["after"]
            report = report_evaluation(
                run.path, checkpoint=checkpoint, show_unsafe=config.show_unsafe_pictures
            )
            result["report"] = None if report is None else str(report)
        return result

    def _measured(self, run: RunFolder, name: str, sampled: _Sampled | None) -> MeasuredModel:
        """The images of a model, classified."""
        manifest: Mapping[str, str] = {}
        path, asked = self.sources[name], self.given.get(name, ())
        if sampled is not None:
            path, manifest, asked = sampled.folder, sampled.manifest, sampled.images
        else:
            run.logger.info("%s unlearning: %s", name, path)
            if gaps := _gaps(asked):
                run.logger.warning("%s has no images of %d of its styles x objects x seeds", path, gaps)
        predictions: tuple[Prediction, ...] = ()
        if self.classifier is not None:
            found = classify(
                asked,
                self.classifier,
                batch_size=self.config.batch_size,
                interpolation=interpolation(self.config),
            )
            predictions = tuple(found)
        return MeasuredModel(path, manifest, predictions, asked)

    def _reference(
        self, sampled: Mapping[str, _Sampled], measured: Mapping[str, MeasuredModel]
    ) -> Reference | None:
        """What FID and KID compare with."""
        config = self.config
        if config.fid_reference == "none":
            return None
        if config.fid_reference == "base":
            return Reference("base", measured["before"].asked)
        if config.fid_reference == "base_other_seeds":
            seeds = ", ".join(map(str, config.fid_reference_seeds))
            return Reference(f"base, seeds {seeds}", sampled["before"].others)
        return Reference(str(config.fid_reference_dir), self.reference_folder)

    def _read(self, key: str, folder: Path) -> tuple[AskedImage, ...]:
        names = {"styles": self.styles, "objects": self.objects}
        if self.classifier is None or (key == "fid_reference_dir" and not has_concepts(folder, **names)):
            return any_images(key, folder, notes=self.notes)
        # What is not chosen may lie there too, if the classifier knows it.
        return folder_images(
            key,
            folder,
            styles=self.classifier.styles,
            objects=self.classifier.objects,
            chosen_styles=self.config.styles,
            chosen_objects=self.config.objects,
            notes=self.notes,
        )


def _gaps(images: Sequence[AskedImage]) -> int:
    """How many images a full grid of the same styles, objects and seeds has beside these."""
    if not images[0].style:
        return 0
    parts = zip(*(image.key for image in images), strict=True)
    return math.prod(len(set(part)) for part in parts) - len(images)
