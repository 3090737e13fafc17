"""Attack a checkpoint, to see whether a concept that it forgot can be brought back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mu.bars import loading
from mu.cli import run_door
from mu.console import UCE_EXAMPLE, Answer, duration
from mu.evaluation.attacks.config import AttackConfig
from mu.run_folder import RESULT

MODULE = "mu.commands.attack"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Its first word is the attack."""
    return run_door(
        AttackConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[
            UCE_EXAMPLE,
            (MODULE, "inversion --config_path emoji_canvas/attack_style.yaml --ckpt_path outputs/uce"),
        ],
        argv=argv,
        first_words={"attack": "ATTACK"},
        answer=attacked,
    )


def _run(config: AttackConfig) -> object:
    with loading():
        from mu.evaluation.attacks import attack

    return attack.run(config)


def attacked(config: AttackConfig, result: Mapping[str, Any], config_path: str | None) -> Answer:  # noqa: ARG001
    """What is said at the end: the numbers as a table, a line a model and stage."""
    columns = ("success", "both")
    shares = {key: result[key] for key in columns}
    rows = [name for name in shares["success"] if name != "meaning"]
    width = max(len(name) for name in rows) - 3
    lines = [
        f"Attacked {config.template} {config.template_name.replace('_', ' ')} by {config.attack}, "
        f"{result['images of each stage']:,} images of each model, in {duration(result['seconds'])}.",
        *(f"{key}: {share['meaning']}" for key, share in shares.items()),
        f"{'':{width}}" + "".join(f"{key:>10}" for key in columns),
    ]
    for name in rows:
        numbers = "".join(f"{shares[key][name]:>8.1f} %" for key in columns)
        lines.append(f"{name.removesuffix(', %'):<{width}}{numbers}")
    run = Path(result["run"])
    return Answer(
        lines,
        made={"report": result.get("report"), "picture": result["picture"], "numbers": run / RESULT},
    )


if __name__ == "__main__":
    raise SystemExit(main())
