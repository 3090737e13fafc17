"""Read a flat YAML file, `key: value` or `key: [list]`, without giving its text a type.

What a scalar *is* depends on the key it is given to (`mu.config`), not on how it looks: `wandb: off` is the word "off",
`template_name: 007` a name. YAML's usual loaders, and OmegaConf's, have made false and 7 of them before a key is asked;
so the file is taken as YAML's nodes, which keep the text and the line. There are no tags, anchors or aliases, and
nothing is interpolated or imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from mu.errors import MuError

MAX_BYTES = 1_000_000
_NULLS = ("null", "Null", "NULL", "~", "")


class ConfigFileError(MuError, ValueError):
    """The file cannot be read as a flat YAML file at all."""


class Text(str):
    """A scalar as it was written."""

    is_null: bool

    def __new__(cls, text: str, *, quoted: bool = False) -> Text:
        """`quoted` tells the word "null" from a null."""
        made = super().__new__(cls, text)
        made.is_null = not quoted and text in _NULLS
        return made


Value = Text | list[Text]


class FlatFile(NamedTuple):
    """The entries of a file: key -> value, key -> line (from 1), and what is wrong with it."""

    values: dict[str, Value]
    lines: dict[str, int]
    mistakes: list[str]


def read_flat_file(path: Path) -> FlatFile:
    """Reads a YAML file. Raises ConfigFileError when it cannot be opened, is not UTF-8 or is not YAML."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigFileError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise ConfigFileError(f"{path}: larger than {MAX_BYTES} bytes; this is no configuration file")
    try:
        return _read_flat(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigFileError(f"{path}: not a YAML file ({error})") from error


def read_list(text: str) -> list[Text]:
    """The scalars of a YAML list such as `[a, "b, c"]`. Raises ValueError when it is something else."""
    try:
        values, _, mistakes = _read_flat(f"list: {text}\n")
    except ValueError as error:
        raise ValueError(f"not a YAML list ({error})") from error
    value = values.get("list")
    if mistakes or len(values) != 1 or not isinstance(value, list):
        raise ValueError("not a YAML list of plain values")
    return value


def _read_flat(text: str) -> FlatFile:
    """The entries of YAML text. Raises ValueError where the text is not YAML."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        odd = [event for event in yaml.parse(text, Loader=yaml.SafeLoader) if _is_odd(event)]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, OverflowError) as error:  # the latter from "\UFFFFFFFF"
        raise ValueError(" ".join(str(error).split())) from error
    flat = FlatFile({}, {}, [f"line {_line(event)}: tags and anchors are not read" for event in odd])
    if root is None:  # an empty file: nothing is set
        return flat
    if not isinstance(root, yaml.MappingNode):
        flat.mistakes.append(f"line {_line(root)}: write `key: value` lines")
        return flat
    for key, node in root.value:
        line = _line(key)
        if not isinstance(key, yaml.ScalarNode):
            flat.mistakes.append(f"line {line}: a key must be a plain word")
        elif key.value in flat.lines:
            flat.mistakes.append(f"{key.value}: given twice (lines {flat.lines[key.value]} and {line})")
        else:
            flat.lines[key.value] = line
            items = node.value if isinstance(node, yaml.SequenceNode) else [node]
            if not all(isinstance(item, yaml.ScalarNode) for item in items):
                flat.mistakes.append(
                    f"{key.value}: must be one value or a list of values, without further levels (line {line})"
                )
                continue
            texts = [Text(item.value, quoted=item.style is not None) for item in items]
            flat.values[key.value] = texts if isinstance(node, yaml.SequenceNode) else texts[0]
    return flat


def _is_odd(event: yaml.Event) -> bool:
    """Whether something in the file has a tag or an anchor, or is an alias (whose anchor it names)."""
    return getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None


def _line(part: yaml.Node | yaml.Event) -> int:
    return int(part.start_mark.line) + 1
