"""The results table: every style and every object forgotten in turn by one recipe each, and measured.

Goes on where it stopped: a finished concept is noted in `<output_dir>/runs/<concept>/made.json`, and images that exist
are not sampled again, those of the base model once for all rows. Nothing is chosen by what comes out: each concept is
unlearned once, and counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import PACKAGED, BenchmarkConfig, MaskConfig, TrainConfig
from mu.algorithms.saliency_unlearning.results_table import SCORES, Row, markdown, mean_of, reading
from mu.atomic import write_atomically
from mu.config import Config, keys_of, load_config, override, require_paths, resolve_path
from mu.datasets.emoji_canvas import OBJECTS, STYLES
from mu.datasets.generated import SampleSettings
from mu.devices import resolve_devices
from mu.evaluation.classifier import EmojiClassifier, load_classifier
from mu.evaluation.evaluate import Grid, MeasuredModel, measure
from mu.evaluation.metrics import table_csv, unlearning_scores
from mu.ldm import load_model
from mu.run_folder import environment

_log = logging.getLogger(__name__)

_PLACES = [
    "output_dir",
    "processed_dataset_dir",
    "mask_path",
    "ckpt_path",
    "model_config_path",
    "use_ema",
    "devices",
    "resume",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "keep_checkpoints",
]
"""Keys that do not decide what a concept becomes, or (of the model) decide it through the model's fingerprint."""
_FIRST_KEYS = """
alpha batch_size c_guidance dataset_type draws_per_image epochs guidance_scale image_size images_per_prompt lr
lr_schedule mask_seed masking num_timesteps objects output_format pool precision raw_dataset_dir
retain_batch_size retain_images_per_prompt sample_prompts sample_seeds sample_steps seed styles substitute
target template template_name threshold train_method use_sample wandb wandb_project
"""
"""Keys that always count among a row's settings. One that came later counts where it is not at its default, so that
the rows of older tables stay."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Make the rows that are missing, and the table.

    Returns:
        `styles` and `objects`, the means of their rows in percent; `cra_prompts` and `left_out`, how the scores are
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
        self.device = resolve_devices(config.devices)
        self.classifier: EmojiClassifier = load_classifier(resolve_path(config.classifier_path), self.device)
        self._bases: dict[Path, MeasuredModel] = {}

    def run(self) -> dict[str, Any]:
        wanted = self.config.concepts or (*STYLES, *OBJECTS)
        rows = []
        for number, name in enumerate(wanted):
            _log.info("concept %d of %d: %s", number + 1, len(wanted), name)
            rows.append(self.row(name))
            self.write(rows)
        means = {f"{kind}s": mean_of(rows, kind) for kind in ("style", "object")}
        return {
            **{name: mean for name, mean in means.items() if mean},
            "cra_prompts": self.config.cra_prompts,
            "left_out": ", ".join(self.config.left_out) or "none",
            "table": self.folder / "table.md",
        }

    def recipes(self, name: str) -> tuple[MaskConfig, TrainConfig]:
        """The mask and training config of a concept: its kind's recipes, with everything below this table's folder."""
        kind = "style" if name in STYLES else "object"
        runs = self.folder / "runs" / f"{kind}-{name}"
        shared = {
            "template": kind,
            "template_name": name,
            "devices": self.config.devices,
            "processed_dataset_dir": str(self.folder / "processed"),
        }
        paths = {key: getattr(self.config, f"{kind}_{key}") for key in ("mask", "train")}
        mask = load_config(MaskConfig, config_path=paths["mask"], packaged=PACKAGED)
        train = load_config(TrainConfig, config_path=paths["train"], packaged=PACKAGED)
        return (
            override(mask, **shared, output_dir=str(runs / "masks")),
            override(
                train, **shared, output_dir=str(runs / "finetuned_models"), mask_path=str(runs / "masks")
            ),
        )

    def row(self, name: str) -> Row:
        """One concept: unlearned once, its images sampled once, scored now."""
        mask, train = self.recipes(name)
        base = self.base(train)
        made = self.unlearn(name, mask, train, base)
        after = self._measure(train, self.folder / made["checkpoint"])
        row: Row = {"template": train.template, "template_name": name}
        for moment, measured in (("before", base), ("after", after)):
            counted = unlearning_scores(
                measured.predictions,
                template=train.template,
                template_name=name,
                cra_prompts=self.config.cra_prompts,
                left_out=self.config.left_out,
            ).as_dict()
            row[moment] = {key: counted[key] for key in SCORES}
        return {**row, **made}

    def unlearn(self, name: str, mask: MaskConfig, train: TrainConfig, base: MeasuredModel) -> Row:
        """Mask and training of a concept; what an earlier call made with the same settings is kept."""
        settings = self._settings(mask, train, base)
        path = self.folder / "runs" / f"{train.template}-{name}" / "made.json"
        if self.config.resume and path.exists():
            kept: Row = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings_sha256"] == settings and (self.folder / kept["checkpoint"]).is_file():
                _log.info("kept: %s", path.parent)
                return kept
        made_mask = MaskingAlgorithm(mask).run()
        made = SaliencyUnlearningAlgorithm(train).run()
        row: Row = {
            "settings_sha256": settings,
            "checkpoint": str(made["checkpoint"].relative_to(self.folder)),
            "steps": made["steps"],
            "seconds": {"mask": round(made_mask["seconds"], 1), "train": round(made["seconds"], 1)},
            "weights_changed": made["weights_changed"],
            "weights_total": made["weights_total"],
        }
        write_atomically(path, json.dumps(row, indent=2).encode())
        return row

    def base(self, train: TrainConfig) -> MeasuredModel:
        """The recipe's model before unlearning, measured once."""
        checkpoint = train.checkpoint()
        if checkpoint not in self._bases:
            self._bases[checkpoint] = self._measure(train, checkpoint, use_ema=train.use_ema)
        return self._bases[checkpoint]

    def _measure(self, train: TrainConfig, checkpoint: Path, *, use_ema: bool = False) -> MeasuredModel:
        model = load_model(
            resolve_path(train.model_config_path), checkpoint, device=self.device, use_ema=use_ema
        )
        settings = SampleSettings(
            self.config.sample_steps, self.config.guidance_scale, model.image_size, self.config.precision
        )
        return measure(
            model,
            self.classifier,
            self.grid,
            settings=settings,
            batch_size=self.config.batch_size,
            folder=self.folder,
        )

    @staticmethod
    def _settings(mask: MaskConfig, train: TrainConfig, base: MeasuredModel) -> str:
        """SHA-256 of all that decides how a concept is unlearned, but for where its files lie."""
        decides = [[_deciding(mask), _deciding(train)], base.manifest["model"]]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def write(self, rows: Sequence[Row]) -> None:
        """table.json, table.csv and table.md."""
        self.folder.mkdir(parents=True, exist_ok=True)
        means = {kind: mean_of(rows, kind) for kind in ("style", "object")}
        content = {
            "seeds": list(self.grid.seeds),
            "sample_steps": self.config.sample_steps,
            "guidance_scale": self.config.guidance_scale,
            "classifier": Path(self.config.classifier_path).name,
            "cra_prompts": self.config.cra_prompts,
            "left_out": list(self.config.left_out),
            "environment": environment(),
            "means_percent": means,
            "rows": list(rows),
        }
        write_atomically(self.folder / "table.json", f"{json.dumps(content, indent=2)}\n".encode())
        columns = ["template", "template_name", *SCORES, *(f"base_{key}" for key in SCORES), "seconds"]
        cells = [
            [
                row["template"],
                row["template_name"],
                *(row[moment][key]["value"] for moment in ("after", "before") for key in SCORES),
                sum(row["seconds"].values()),
            ]
            for row in rows
        ]
        write_atomically(self.folder / "table.csv", table_csv(columns, cells))
        text = markdown(rows) + reading(self.config.cra_prompts, self.config.left_out)
        write_atomically(self.folder / "table.md", text.encode())


def _deciding(config: Config) -> dict[str, Any]:
    """The keys that decide what a concept becomes."""
    return {
        key.name: value
        for key in keys_of(type(config))
        if key.name not in _PLACES
        and ((value := getattr(config, key.name)) != key.default or key.name in _FIRST_KEYS.split())
    }
