"""Write the tables of config keys in README.md from the config classes, between the markers of that page.

python scripts/readme_keys.py            # writes
python scripts/readme_keys.py --check    # exit code 1 when README.md says something else
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import readme_section

from mu.algorithms.saliency_unlearning.configs import (
    BenchmarkConfig,
    MaskConfig,
    TrainConfig,
)
from mu.commands.convert_config import ConvertConfig
from mu.commands.patch_config import ApplyPatchConfig
from mu.config import Config, keys_of
from mu.config_keys import Key
from mu.evaluation.config import (
    EvaluateConfig,
    SampleConfig,
)
from mu.unlearning.config import (
    DataKeys,
    ModelKeys,
)


def tables() -> str:
    """All tables, each folded under a line that names the commands it is for."""
    shared = keys_of(DataKeys)
    sections = [
        ("<code>generate_mask</code> and <code>train</code>: the model, the concept, the images", shared),
        ("<code>generate_mask</code>", _own(MaskConfig, shared)),
        ("<code>train</code>", _own(TrainConfig, shared)),
        ("<code>sample</code>, beside the model's keys", _own(SampleConfig, keys_of(ModelKeys))),
        ("<code>evaluate</code>", keys_of(EvaluateConfig)),
        ("<code>convert</code>", keys_of(ConvertConfig)),
        ("<code>apply_patch</code>", keys_of(ApplyPatchConfig)),
        ("<code>benchmark_unlearning</code> (<code>make table</code>)", keys_of(BenchmarkConfig)),
    ]
    return "\n\n".join(
        f"<details>\n<summary>{title}</summary>\n\n{_table(keys)}\n\n</details>" for title, keys in sections
    )


def _own(cls: type[Config], shared: Sequence[Key]) -> list[Key]:
    """The keys of a class that are not, just as they are, among `shared`."""
    return [key for key in keys_of(cls) if key not in shared]


def _table(keys: Iterable[Key]) -> str:
    lines = ["| key | meaning | value | default |", "|---|---|---|---|"]
    for key in keys:
        if key.rule.choices is not None:
            value = ", ".join(f"`{choice}`" for choice in key.rule.choices)
        else:
            value = _escaped(key.type_words + (f", {key.rule.limits}" if key.rule.limits else ""))
        default = f"`{key.default_text}`" if key.default_text else "empty"
        lines.append(f"| `{key.name}` | {_escaped(key.rule.help)} | {value} | {default} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, inside a table."""
    for sign, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;")):
        text = text.replace(sign, shown)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    return readme_section.run(
        "keys",
        tables,
        description=__doc__,
        advice="what the config classes say; run: make readme-keys",
        arguments=arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
