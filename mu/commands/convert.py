"""Write a checkpoint in the format of another tool. No bit of a weight changes, unless --dtype asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mu.bars import loading, waiting
from mu.cli import run_door
from mu.commands.answers import converted
from mu.config import Config, resolve_path, setting
from mu.console import called
from mu.run_folder import writable_problem
from mu.unlearning.config import SD_MODEL_CONFIG
from mu.unlearning.find_checkpoint import (
    Problem,
    checkpoint_file,
    checkpoint_problems,
    model_config_problems,
)

MODULE = "mu.algorithms.saliency_unlearning.scripts.convert"
_BUNDLED = "package:assets/emoji_canvas"
_SUFFIXES = {"compvis": (".safetensors", ".ckpt", ".pth"), "unet": (".pt", ".bin", ".safetensors")}


class ConvertConfig(Config):
    """From which checkpoint to which, and how."""

    input_path: str | None = setting(
        None,
        "Checkpoint to read: CompVis' (.ckpt, .pth, .safetensors), a diffusers folder or file, or the folder of a "
        "training run. The first argument, without its name.",
        kind="path",
    )
    output_path: str | None = setting(
        None, "File or folder to write. The second argument, without its name.", kind="path"
    )
    model_config_path: str = setting(
        SD_MODEL_CONFIG,
        "CompVis YAML with the structure of the model; the default is SD v1's. Packaged beside it: sd_v2_base.yaml "
        "(512 px) and sd_v2_v.yaml (768 px).",
        kind="path",
    )
    format: str = setting(
        "auto",
        "compvis: one file, .safetensors, .ckpt or .pth. diffusers: a folder for StableDiffusionPipeline. unet: a file "
        "with the UNet alone in diffusers' names. auto: by the output's name; .pt and .bin mean unet, no suffix of a "
        "checkpoint diffusers.",
        choices=("auto", "compvis", "diffusers", "unet"),
    )
    use_ema: bool = setting(
        False,
        "Take the EMA copy of the UNet in the checkpoint, not its raw weights; an error where it has none.",
    )
    base_ckpt_path: str | None = setting(
        None,
        "For an input that is a part of a model (a UNet, or only the weights of it that were trained, as ESD writes "
        "them; a checkpoint without its VAE or text encoder): the whole checkpoint that all the rest is taken from.",
        kind="path",
    )
    dtype: str = setting(
        "source",
        "Type of the written weights; source: each in the type that it has. Others are rounded to the nearest; a value "
        "that is too large for fp16 is an error.",
        choices=("source", "fp32", "fp16", "bf16"),
    )
    variant: str | None = setting(
        None,
        "diffusers: write the weights in this type, and name their files after it (model.fp16.safetensors), as "
        'from_pretrained(variant="fp16") expects them.',
        choices=("fp32", "fp16", "bf16"),
    )
    overwrite: bool = setting(False, "Replace an output that is there already.")

    @property
    def output_kind(self) -> str:
        """`format`, with auto decided by the name of the output."""
        if self.format != "auto" or self.output_path is None:
            return self.format
        suffix = Path(self.output_path).suffix
        return next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), "diffusers")

    @property
    def written_dtype(self) -> str:
        """`dtype`, or that of the variant."""
        return self.variant or self.dtype

    def checkpoint(self) -> Path:
        """The file or folder that `input_path` leads to."""
        assert self.input_path is not None
        return checkpoint_file(self.input_path)

    def conflicts(self) -> Iterator[Problem]:
        for key in ("input_path", "output_path"):
            if getattr(self, key) is None:
                yield (key,), f"is missing; write: {called(MODULE)} INPUT OUTPUT"
        if self.variant is not None and self.dtype not in ("source", self.variant):
            yield (
                ("variant", "dtype"),
                f"variant {self.variant} says what type the files hold, dtype {self.dtype} another; leave one out",
            )
        if self.output_path is None:
            return
        if self.variant is not None and self.output_kind != "diffusers":
            yield (
                ("variant", "output_path", "format"),
                f"a variant is for format diffusers, not {self.output_kind}; leave it out (dtype is for all formats)",
            )
        kind, suffix = self.output_kind, Path(self.output_path).suffix
        known = {own for suffixes in _SUFFIXES.values() for own in suffixes}
        if suffix not in known and suffix.lower() in known:
            yield ("output_path", "format"), f"write the suffix {suffix} in small letters: {suffix.lower()}"
        if kind in _SUFFIXES and suffix not in _SUFFIXES[kind]:
            yield (
                ("output_path", "format"),
                f"format {kind} is written to a file with one of the suffixes {', '.join(_SUFFIXES[kind])}",
            )
        elif kind == "diffusers" and suffix in known:
            yield (
                ("output_path", "format"),
                f"format diffusers is a folder; {self.output_path} looks like a file",
            )

    def disk_problems(self) -> Iterator[Problem]:
        for key in ("input_path", "base_ckpt_path"):
            if getattr(self, key) is not None:
                yield from checkpoint_problems(key, getattr(self, key))
        yield from model_config_problems(self.model_config_path)
        if self.output_path is not None:
            output = Path(self.output_path)
            if output.exists() and not self.overwrite:
                yield ("output_path", "overwrite"), f"{output} is there already; --overwrite true replaces it"
            elif (problem := writable_problem(str(output.parent))) is not None:
                yield ("output_path",), problem


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Its first words, up to two, are the input and the output."""
    return run_door(
        ConvertConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[
            (
                MODULE,
                f"{_BUNDLED}/model.safetensors emoji_diffusers --model_config_path {_BUNDLED}/model_config.yaml",
            )
        ],
        argv=argv,
        answer=converted,
        first_words={"input_path": "INPUT", "output_path": "OUTPUT"},
    )


def _run(config: ConvertConfig) -> object:
    with loading():
        from mu.ldm.convert import convert_checkpoint

    assert config.output_path is not None
    source = config.checkpoint()  # once: the output may be the newest in a folder of runs
    base = resolve_path(config.base_ckpt_path) if config.base_ckpt_path is not None else None
    with waiting(f"reading {source.name} and writing {config.output_path}"):
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
        "read": source,
        "kind": description,
        "wrote": Path(config.output_path),
        "format": config.output_kind,
        "dtype": config.written_dtype,
    }


if __name__ == "__main__":
    raise SystemExit(main())
