"""Draw images of prompts from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from mu.bars import loading
from mu.cli import run_door
from mu.commands.answers import sampled
from mu.evaluation.config import SampleConfig

MODULE = "mu.algorithms.saliency_unlearning.scripts.sample"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_door(
        SampleConfig,
        _run,
        module=MODULE,
        summary=str(__doc__),
        examples=[(MODULE, "--config_path emoji_canvas/sample.yaml")],
        argv=argv,
        answer=sampled,
        shares_work=True,
    )


def _run(config: SampleConfig) -> object:
    with loading():
        from mu.commands import sampling

    return sampling.run(config)


if __name__ == "__main__":
    raise SystemExit(main())
