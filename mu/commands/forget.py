"""Make a model forget a style, an object or a prompt, from its name alone: images, mask, training, pictures, report.

unlearn_diff forget Noto
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mu.cli import run_door
from mu.console import Answer
from mu.forgetting.answer import Forgotten
from mu.forgetting.config import ForgetConfig
from mu.forgetting.forget import forget, plan

MODULE = "mu.commands.forget"
_SUMMARY = (
    "Make a model forget a style, an object or a prompt, from its name alone: it draws the images, finds the mask, "
    "trains, draws before and after from the written file, and writes a report. Given again, it goes on where it "
    "stopped. "
    'WHAT comes first: unlearn_diff forget "Van Gogh" "Claude Monet" --kind style --ckpt_path sd-v1-4.ckpt'
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        ForgetConfig,
        _run,
        module=MODULE,
        summary=_SUMMARY,
        examples=[(MODULE, "Noto")],
        argv=_named(argv),
        plan=plan,
        answer=_answer,
        first_words={"what": "WHAT ..."},
    )


def _named(argv: Sequence[str] | None) -> list[str]:
    """Arguments, in which the first words that are no flags are those of `--what`."""
    words = list(sys.argv[1:] if argv is None else argv)
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    what = ["--what", json.dumps(words[:count], ensure_ascii=False)] if count else []
    return [*what, *words[count:]]


def _run(config: ForgetConfig) -> dict[str, Any]:
    return {**vars(forget(config))}


def _answer(config: ForgetConfig, result: Mapping[str, Any], config_path: str | None) -> Answer:  # noqa: ARG001
    return Forgotten(**result).answer()


if __name__ == "__main__":
    raise SystemExit(main())
