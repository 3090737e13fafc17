"""Write docs/keys.md, a table of keys for each command, from the config classes.

python scripts/keys_page.py            # writes
python scripts/keys_page.py --check    # exit code 1 when the page says something else
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mu.algorithms.esd.configs import ESDConfig
from mu.algorithms.saliency_unlearning.configs import MaskConfig, TrainConfig
from mu.algorithms.uce.configs import UCEConfig
from mu.commands.apply_patch import ApplyPatchConfig
from mu.commands.convert import ConvertConfig
from mu.commands.report import ReportConfig
from mu.config import Config, keys_of
from mu.config_keys import Key
from mu.evaluation.attacks.config import AttackConfig
from mu.evaluation.config import EvaluateConfig, SampleConfig
from mu.forgetting.config import ForgetConfig

PAGE = Path(__file__).resolve().parent.parent / "docs/keys.md"
COMMANDS: dict[str, tuple[str, type[Config]]] = {
    "forget": ("from a word to an unlearned checkpoint, all stages in one command", ForgetConfig),
    "mask": ("saliency unlearning, stage 1: the mask of a concept", MaskConfig),
    "train": ("saliency unlearning, stage 2: training under the mask", TrainConfig),
    "esd": ("Erased Stable Diffusion: training without images", ESDConfig),
    "uce": ("Unified Concept Editing: a closed form, without training", UCEConfig),
    "sample": ("images from a checkpoint", SampleConfig),
    "evaluate": ("what a checkpoint forgot, and what it kept", EvaluateConfig),
    "attack": ("whether what it forgot can be brought back", AttackConfig),
    "report": ("the report of a finished run, written again", ReportConfig),
    "convert": ("a checkpoint in another format", ConvertConfig),
    "patch": ("patches put on a checkpoint, or taken off", ApplyPatchConfig),
}
"""Command -> what it is, and the class of its keys."""
_TOP = """# Keys

All keys of each command, made from the config classes by `make keys`; `--help` of a command says the same. A key is
given in a YAML file (`lr: 2e-5`), as a flag (`--lr 2e-5`) or from Python (`lr=2e-5`). Defaults come first, then the
file, then flags. They are for Stable Diffusion v1 and UnlearnCanvas; the files in `configs/emoji_canvas` set what the
bundled model needs.
"""


def page() -> str:
    """The whole page."""
    parts = [_TOP]
    for command, (title, cls) in COMMANDS.items():
        parts.append(f"## {command}\n\n{title[0].upper()}{title[1:]}.\n\n{_table(keys_of(cls))}\n")
    return "\n".join(parts)


def _table(keys: Iterable[Key]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        if key.rule.choices is not None:
            value = ", ".join(f"`{choice}`" for choice in key.rule.choices)
        else:
            value = _escaped(key.type_words + (f", {key.rule.limits}" if key.rule.limits else ""))
        default = f"`{key.default_text}`" if key.default_text else "empty"
        lines.append(f"| `{key.name}` | {value} | {default} | {_escaped(key.rule.help)} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, inside a table."""
    for sign, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;")):
        text = text.replace(sign, shown)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing, tell whether the page is right")
    made = page()
    if parser.parse_args(arguments).check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
            print("docs/keys.md is not what the config classes say; run: make keys", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
