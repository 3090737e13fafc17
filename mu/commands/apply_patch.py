"""Apply patches to a checkpoint, or remove them: apply_patch INPUT OUTPUT --patches PATCH [--key value ...]."""

from __future__ import annotations

from collections.abc import Sequence

from mu.cli import run_door
from mu.commands.patch_config import ApplyPatchConfig

MODULE = "mu.algorithms.saliency_unlearning.scripts.apply_patch"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Its first words, up to two, are the input and the output."""
    return run_door(
        ApplyPatchConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        argv=argv,
        first_words=("input_path", "output_path"),
    )


def _run(config: ApplyPatchConfig) -> object:
    from mu.config import resolve_path
    from mu.ldm.patching import patch_checkpoint

    assert config.output_path is not None
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
