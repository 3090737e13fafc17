"""Convert a checkpoint to another format: convert INPUT OUTPUT [--key value ...]. No bit changes, but by --dtype."""

from __future__ import annotations

from collections.abc import Sequence

from mu.cli import run_door
from mu.commands.convert_config import ConvertConfig

MODULE = "mu.algorithms.saliency_unlearning.scripts.convert"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Its first words, up to two, are the input and the output."""
    return run_door(
        ConvertConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        argv=argv,
        first_words=("input_path", "output_path"),
    )


def _run(config: ConvertConfig) -> object:
    from mu.config import resolve_path
    from mu.ldm.convert import convert_checkpoint

    assert config.output_path is not None
    source = config.checkpoint()  # once: the output may be the newest in a folder of runs
    base = resolve_path(config.base_ckpt_path) if config.base_ckpt_path is not None else None
    type_ = f", {config.written_dtype}" if config.written_dtype != "source" else ""
    description = convert_checkpoint(
        source,
        config.output_path,
        model_config_path=resolve_path(config.model_config_path),
        format=config.output_kind,
        use_ema=config.use_ema,
        base=base,
        dtype=config.written_dtype,
        variant=config.variant,
        overwrite=config.overwrite,
    )
    return {
        "read": f"{source} ({description})",
        "wrote": f"{config.output_path} ({config.output_kind}{type_})",
    }


if __name__ == "__main__":
    raise SystemExit(main())
