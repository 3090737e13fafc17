"""The console script `unlearn_diff`: `unlearn_diff COMMAND ...` runs the door of that command.

A door is imported when its command is called, so that `unlearn_diff --help` loads nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import mu
from mu.config_names import METHOD_NAMES, nearest
from mu.console import OutputClosed, named, say

_SALUN = "mu.algorithms.saliency_unlearning.scripts"
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Make a model forget": {
        "forget": (
            "mu.commands.forget",
            "a style, an object or a prompt, from its name alone: all in one command",
        ),
        "mask": (f"{_SALUN}.generate_mask", "find the weights that matter for a concept (SalUn, stage 1)"),
        "train": (f"{_SALUN}.train", "forget it: SalUn under that mask; --method esd and uce need none"),
    },
    "Look at what became of it": {
        "sample": (f"{_SALUN}.sample", "draw images of prompts"),
        "evaluate": (f"{_SALUN}.evaluate", "measure what was forgotten and what was kept"),
        "attack": (
            "mu.commands.attack",
            "try to bring back what was forgotten, and count how often it works",
        ),
        "report": ("mu.commands.report", "write the report of a finished run again: one HTML file"),
    },
    "Take it elsewhere": {
        "convert": (f"{_SALUN}.convert", "a checkpoint for another tool: CompVis, diffusers, or its UNet"),
        "patch": (f"{_SALUN}.apply_patch", "put the small patch of a run on a checkpoint, or take it off"),
    },
    "Set up": {
        "download-model": ("mu.commands.download_model", "Stable Diffusion, or the classifiers"),
        "download-data": ("mu.commands.download_data", "UnlearnCanvas or I2P, whole or a sample"),
        "create-env": ("mu.commands.create_env", "the environment of a method, by conda or venv"),
        "debug-report": (
            "mu.commands.debug_report",
            "what a bug report needs: machine, versions, a run's log",
        ),
    },
}
"""Group -> command -> the module of its door, and what it does."""
ALIASES = {"generate-mask": "mask", "apply-patch": "patch"}
METHOD = "saliency_unlearning"
"""The method of `train` where none is named; other names of methods."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code of the command, 2 where there is no such command."""
    command, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    program = program_name()
    with contextlib.suppress(OutputClosed):
        if command in ("--help", "-h", "help"):
            say(help_text(program))
            return 0
        if command in ("--version", "-V"):
            say(f"unlearn_diff {mu.__version__}")
            return 0
    doors = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    command = command.replace("_", "-")
    command = ALIASES.get(command, command)
    if command not in doors:
        known = [*doors, *ALIASES]
        print(
            f"{command!r} is no command; there are: {', '.join(doors)}.{nearest(command, known)}",
            file=sys.stderr,
        )
        return 2

    # Each door names itself, and others, as they are called here.
    methods = train_doors()
    names = {module: f"{program} {name}" for name, module in doors.items()}
    names |= {
        module: f"{program} train --method {name}" for name, module in methods.items() if name != METHOD
    }
    module = doors[command]
    if command == "train":
        method, words = method_of(words)
        if method not in methods:
            known = [*methods, *METHOD_NAMES]
            print(f"method: {method!r} is not one of: {', '.join(known)}.{nearest(method, known)} (--method)",
                  file=sys.stderr)  # fmt: skip
            return 2
        module = methods[method]
    try:
        with named(names):
            code = int(importlib.import_module(module).main(words))
    except SystemExit as ended:  # argparse's way to end, with --help or a mistake
        code = int(ended.code or 0)
    if command == "train" and ("--help" in words or "-h" in words):
        others = ", ".join(f"{program} train --method {name} --help" for name in methods if name != method)
        with contextlib.suppress(OutputClosed):
            say(f"\nThese are the keys of --method {method}. Those of the others: {others}")
    return code


def help_text(program: str) -> str:
    """What `unlearn_diff --help` prints."""
    lines = [
        "Make a Stable Diffusion model forget a concept, keep the rest, and measure both.",
        "",
        "Try it on the bundled model, which needs no download and no GPU:",
        f"  {program} forget Noto",
    ]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<16}{line}" for name, (_, line) in commands.items()]
    lines += [
        "",
        f"{program} COMMAND --help tells all of a command, and opens with one that runs as it stands.",
        "Every command takes --quiet (paths alone), --json (the result as one JSON object) and --log_level.",
    ]
    return "\n".join(lines)


def train_doors() -> dict[str, str]:
    """Method -> the module of its door `train`, the default one first."""
    folder = Path(mu.__file__).parent / "algorithms"
    found = sorted(path.parent.parent.name for path in folder.glob("*/scripts/train.py"))
    found.sort(key=lambda name: name != METHOD)
    return {name: f"mu.algorithms.{name}.scripts.train" for name in found}


def method_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """What `--method` names among the arguments of `train`, and the other arguments."""
    method, rest, left = METHOD, [], list(words)
    while left:
        name, equals, value = (word := left.pop(0)).partition("=")
        if name != "--method":
            rest.append(word)
        elif equals:
            method = value
        else:
            method = left.pop(0) if left else ""
    return METHOD_NAMES.get(method, method), rest


def program_name() -> str:
    """How this program was called: by its name, or by its path where the name alone would not lead to it."""
    called = Path(sys.argv[0])
    if called.stem != "unlearn_diff":
        return "unlearn_diff"
    found = shutil.which("unlearn_diff")
    return "unlearn_diff" if found is not None and Path(found).resolve() == called.resolve() else sys.argv[0]


if __name__ == "__main__":
    raise SystemExit(main())
