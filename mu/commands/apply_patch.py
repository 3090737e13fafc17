"""Put patches on a checkpoint, or take them off again. A patch is what a training run changed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mu.bars import loading, waiting
from mu.cli import run_door
from mu.commands.answers import patched
from mu.config import Config, resolve_path, setting
from mu.console import UCE_EXAMPLE, called
from mu.run_folder import space_problem, writable_problem
from mu.unlearning.config import SD_MODEL_CONFIG
from mu.unlearning.find_checkpoint import (
    PATCH_NAME,
    Problem,
    checkpoint_bytes,
    checkpoint_file,
    checkpoint_problems,
    is_checkpoint,
    model_config_problems,
)

MODULE = "mu.algorithms.saliency_unlearning.scripts.apply_patch"


class ApplyPatchConfig(Config):
    """Which patches, to or from which checkpoint."""

    input_path: str | None = setting(
        None,
        "Checkpoint to read, a CompVis file or a diffusers folder: to apply, the one that the patches were made from. "
        "The first argument, without its name.",
        kind="path",
    )
    output_path: str | None = setting(
        None, "File or folder to write, of the same form. The second argument, without its name.", kind="path"
    )
    patches: tuple[str, ...] | None = setting(
        None,
        "Patch files, or folders of training runs; of a folder of runs, the newest. Several must be of the same base; "
        "their order makes no difference.",
        kind="path",
    )
    remove: bool = setting(False, "Take the patches off again, to the bit, instead of applying them.")
    overlap: str = setting(
        "refuse",
        "What becomes of a weight that several of the patches change. refuse: an error that counts them. add: its "
        "value in the base plus the sum of the changes; the patch that takes the result back is written beside it.",
        choices=("refuse", "add"),
    )
    use_ema: bool = setting(
        False,
        "Put the EMA copy of the UNet in the place of its raw weights first: for patches of runs with use_ema.",
    )
    model_config_path: str = setting(
        SD_MODEL_CONFIG,
        "For a diffusers folder: CompVis YAML of its model; the default is SD v1's.",
        kind="path",
    )
    overwrite: bool = setting(False, "Replace an output that is there already; it may be the input.")

    def checkpoint(self) -> Path:
        """The file or folder that `input_path` leads to."""
        assert self.input_path is not None
        return checkpoint_file(self.input_path)

    def patch_files(self) -> list[Path]:
        """The patch files that `patches` leads to."""
        return [_patch_file(path) for path in self.patches or ()]

    def conflicts(self) -> Iterator[Problem]:
        for key in ("input_path", "output_path", "patches"):
            if getattr(self, key) is None:
                yield (key,), f"is missing; write: {called(MODULE)} INPUT OUTPUT --patches PATCH"
        if self.remove and self.overlap != "refuse":
            yield (
                ("overlap", "remove"),
                "removing adds nothing up; to take back what overlap add made, remove the patch that it wrote",
            )

    def disk_problems(self) -> Iterator[Problem]:
        if self.input_path is not None:
            yield from checkpoint_problems("input_path", self.input_path)
        files = self.patch_files()
        for given, path in zip(self.patches or (), files, strict=True):
            if not path.is_file():
                yield ("patches",), f"there is no file {path if resolve_path(given).is_dir() else given}"
        places = [path.resolve() for path in files if path.is_file()]
        if twice := next((path for path in places if places.count(path) > 1), None):
            yield ("patches",), f"{twice} is given twice; once is enough"
        yield from model_config_problems(self.model_config_path)
        if self.output_path is None:
            return
        output = Path(self.output_path)
        folder = str(output.parent)
        if output.exists() and not self.overwrite:
            yield ("output_path", "overwrite"), f"{output} is there already; --overwrite true replaces it"
        elif (problem := writable_problem(folder)) is not None or (
            self.input_path is not None
            and is_checkpoint(checkpoint := self.checkpoint())
            and (problem := space_problem(folder, checkpoint_bytes(checkpoint))) is not None
        ):
            yield ("output_path",), problem


def _patch_file(path: str) -> Path:
    """The file itself; of a run folder its patch; of a folder of runs that of the newest."""
    resolved = resolve_path(path)
    if not resolved.is_dir() or (resolved / PATCH_NAME).is_file():
        return resolved / PATCH_NAME if resolved.is_dir() else resolved
    found = resolved.glob(f"*/{PATCH_NAME}")
    return max(found, key=lambda patch: patch.stat().st_mtime_ns, default=resolved / PATCH_NAME)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Its first words, up to two, are the input and the output."""
    return run_door(
        ApplyPatchConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[
            UCE_EXAMPLE,
            (
                MODULE,
                "package:assets/emoji_canvas/model.safetensors forgotten.safetensors --patches outputs/uce",
            ),
        ],
        argv=argv,
        answer=patched,
        first_words={"input_path": "INPUT", "output_path": "OUTPUT"},
    )


def _run(config: ApplyPatchConfig) -> object:
    with loading():
        from mu.ldm.patch import patch_checkpoint

    assert config.output_path is not None
    with waiting(f"reading {config.checkpoint().name} and writing {config.output_path}"):
        return patch_checkpoint(
            config.checkpoint(),
            config.output_path,
            config.patch_files(),
            remove=config.remove,
            overlap=config.overlap,
            use_ema=config.use_ema,
            model_config_path=resolve_path(config.model_config_path),
            overwrite=config.overwrite,
        )


if __name__ == "__main__":
    raise SystemExit(main())
