"""Attacks a checkpoint: can a concept that it forgot be brought back? The same attack on its base, to compare with.

Images are kept in `<output_dir>/grids`, what is learnt in `<output_dir>/learnt`, and the results go into a new run
folder. A run that was stopped is given again, and goes on.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mu.bars import waiting
from mu.config import resolve_path
from mu.datasets.canvas import CANVAS_TEMPLATE
from mu.datasets.generated_images import GeneratedImages, SampleSettings
from mu.datasets.index import Row
from mu.devices import peak_memory_bytes, resolve_devices
from mu.errors import nothing_begun
from mu.evaluation.asked_images import AskedImage
from mu.evaluation.attacks.config import ATTACKS, WITHOUT_IMAGES, AttackConfig
from mu.evaluation.attacks.images import concept_rows, digest_of, drawn_targets, encoded, given_targets
from mu.evaluation.attacks.report import report_attack
from mu.evaluation.attacks.results import PLAIN, Stage, Success, draw, meanings, write_results
from mu.evaluation.attacks.target import Attack, Drawing, DrawnImages, Target, around_name
from mu.evaluation.classifiers import Classifier
from mu.evaluation.grid import Grid, check_classifier, classify
from mu.evaluation.measures import interpolation, load_scorer
from mu.evaluation.results import percent
from mu.launch import on_ranks
from mu.ldm import LatentDiffusion, load_model
from mu.run_folder import RunFolder

OTHER_NAME = "before_other_name"
"""The base, asked for the concept by a name that it has never seen."""


def run(config: AttackConfig) -> dict[str, object]:
    """A whole attack into a new run folder.

    Its files: `metrics.json` and `metrics.csv`; of each model and stage `images_<model>_<stage>.csv` and
    `predictions_<model>_<stage>.csv`; `pictures/attack.png`, `config.yaml`, `environment.json`, `log.txt`,
    `report.html`. docs/attacks.md lists all fields.

    Returns:
        What is printed at the end: for each number its meaning and its value in percent, then paths, `seconds` and
        `peak_memory_bytes`.

    Raises:
        MuError: a file is missing or wrong, or the settings do not fit each other; the message says which.
    """
    return on_ranks(_run, config, config.devices)


def _run(config: AttackConfig) -> dict[str, object]:
    started = time.monotonic()

    # 1. Who is attacked, and who scores it.
    with nothing_begun():
        device = resolve_devices(config.devices)
        classifier = load_scorer(config, device)
        assert classifier is not None
        styles, objects = (tuple(dict.fromkeys(names)) for names in zip(*config.cells(), strict=True))
        check_classifier(classifier, Grid(styles, objects, config.seeds))
        sources = {"after": config.checkpoint()}
        base = None if config.base_ckpt_path is None else resolve_path(config.base_ckpt_path)
        if base is not None and base.resolve() != sources["after"].resolve():
            sources = {"before": base, **sources}
        if base is not None and config.attack == "relearn" and config.relearn_other_name is not None:
            sources = {OTHER_NAME: base, **sources}
    folder = Path(config.output_dir)
    with RunFolder.create(folder, f"{config.attack}-{config.template_name}") as run:
        run.save_config(config)
        run.save_environment()

        # 2. The images to learn from.
        targets = _targets(config, base, classifier, device)

        # 3. Each model: its plain images, and those under the attack.
        stages: list[Stage] = []
        for name, source in sources.items():
            run.logger.info("%s: %s", name, source)
            called = config.template_name
            if name == OTHER_NAME:
                called = str(config.relearn_other_name)
            model = _loaded(config, source, device)
            of_base = None if base is None else partial(_loaded, config, base, device)
            stages += _stages(
                config, name, model, called=called, targets=targets, classifier=classifier, base=of_base
            )
            del model

        # 4. Count, and write.
        asked = tuple(AskedImage(row.image, row.prompt, row.style, row.object) for row in targets)
        found = write_results(
            run,
            config,
            sources=sources,
            stages=stages,
            targets=asked,
            classifier=classifier,
            seconds=time.monotonic() - started,
        )
        picture = draw(run.path / "pictures" / "attack.png", config, stages, asked)
        report = None
        if config.report:
            report = report_attack(run.path)
        return {
            **_summary(config, found),
            "images of each stage": len(stages[0].images),
            "checkpoint": str(sources["after"]),
            "picture": str(picture),
            "report": None if report is None else str(report),
            "run": str(run.path),
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def attack_of(config: AttackConfig) -> Attack:
    """The attack that `attack` names."""
    module, _, name = ATTACKS[config.attack].partition(":")
    made: Attack = getattr(importlib.import_module(module), name)(config)
    return made


def _loaded(config: AttackConfig, source: Path, device: str) -> LatentDiffusion:
    with waiting(f"reading {source.name}"):
        model = load_model(
            resolve_path(config.model_config_path), source, device=device, use_ema=config.use_ema
        )
    return model.requires_grad_(False)


def _settings(config: AttackConfig, model: LatentDiffusion) -> SampleSettings:
    return SampleSettings(config.sample_steps, config.guidance_scale, model.image_size, config.precision)


def _targets(config: AttackConfig, base: Path | None, classifier: Classifier, device: str) -> list[Row]:
    if config.attack in WITHOUT_IMAGES:
        return []
    if config.target_images_dir is not None:
        return given_targets(config, classifier)
    assert base is not None
    model = _loaded(config, base, device)
    images = GeneratedImages(model, config.output_dir, _settings(config, model), subfolder="grids")
    return drawn_targets(config, images)


def _stages(
    config: AttackConfig,
    name: str,
    model: LatentDiffusion,
    *,
    called: str,
    targets: Sequence[Row],
    classifier: Classifier,
    base: Callable[[], LatentDiffusion] | None,
) -> Iterator[Stage]:
    """The plain images of a model, and then those of each drawing of the attack."""
    folder, settings = Path(config.output_dir), _settings(config, model)
    renamed = called != config.template_name

    def rows_in(images: GeneratedImages) -> list[Row]:
        return concept_rows(config, config.seeds, images.path, called=called)

    def stage(images: GeneratedImages, drawing: Drawing | None) -> Stage:
        started = time.monotonic()
        rows = rows_in(images)
        of_stage = PLAIN if drawing is None else drawing.stage
        images.sample_missing(rows, batch_size=config.batch_size, of=f"{name}, {of_stage}")
        seconds = time.monotonic() - started
        asked = tuple(
            AskedImage(row.image, row.prompt, row.style, row.object, int(row.image.stem)) for row in rows
        )
        seen = classify(asked, classifier, batch_size=config.batch_size, interpolation=interpolation(config))
        return Stage(
            model=name,
            stage=of_stage,
            folder=images.path,
            images=asked,
            predictions=tuple(seen),
            learnt={} if drawing is None else drawing.learnt,
            seconds=seconds,
        )

    # Without an attack: the images that `evaluate` draws too.
    prompt = f"{CANVAS_TEMPLATE} with {called} for its {config.template}" if renamed else CANVAS_TEMPLATE
    plain = GeneratedImages(model, folder, settings, subfolder="grids", prompt=prompt)
    yield stage(plain, None)

    def is_drawn(label: str) -> bool:
        images = DrawnImages(model, folder, settings, Drawing(label=label, model=model))
        return all(row.image.exists() for row in rows_in(images))

    named = [replace(row, prompt=_renamed(row, config, called)) for row in targets] if renamed else targets
    target = Target(
        config=config,
        model=model,
        model_fingerprint=plain.manifest["model"],
        called=called,
        rows=rows_in(plain),
        images=encoded(named, model, folder) if named else None,
        images_digest=digest_of(named),
        base=base,
        folder=folder,
        is_drawn=is_drawn,
    )
    for drawing in attack_of(config).drawings(target):
        yield stage(DrawnImages(model, folder, settings, drawing), drawing)


def _renamed(row: Row, config: AttackConfig, called: str) -> str:
    before, after = around_name(row, config.template)
    return f"{before} {called} {after}"


def _summary(config: AttackConfig, found: dict[str, dict[str, Success]]) -> dict[str, object]:
    """Each number with its meaning, a column a model and stage, in percent."""
    lines: dict[str, object] = {}
    for key, meaning in meanings(config).items():
        lines[key] = {
            "meaning": meaning,
            **{
                f"{name}, {stage}, %": percent(getattr(counted, key))
                for name, stages in found.items()
                for stage, counted in stages.items()
            },
        }
    return lines
