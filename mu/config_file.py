"""Read a flat YAML file, `key: value` or `key: [list]`, without giving its text a type.

A run's configuration is one level of keys. So the file is read from the parser's events instead of being built by a
general loader: there are no tags, anchors or aliases, nothing is interpolated or imported, nothing outside the
file is read, a repeated key is noticed, and each value knows its line. What a scalar *is* depends on the key it is
given to (`mu.config`), not on how it looks: `wandb: off` is the word "off", `template_name: 1` is a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from mu.errors import MuError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20


class ConfigFileError(MuError, ValueError):
    """The file cannot be read as a flat YAML file at all."""


@dataclass(frozen=True)
class Text:
    """A scalar as it was written. `quoted` tells the word "null" from a null."""

    raw: str
    quoted: bool = False


Value = Text | list[Text]


@dataclass(frozen=True)
class FlatFile:
    """The entries of a file: key -> value, key -> line (from 1), and what is wrong with it."""

    values: dict[str, Value]
    lines: dict[str, int]
    mistakes: tuple[str, ...]


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
        return read_flat_text(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ConfigFileError(f"{path}: not a YAML file ({_one_line(error)})") from error


def read_flat_text(text: str) -> FlatFile:
    """The entries of YAML text. Raises yaml.YAMLError where the text is not YAML."""
    reader = _Reader(yaml.parse(text, Loader=yaml.SafeLoader))
    return reader.read()


def read_list(text: str) -> list[Text]:
    """The scalars of a YAML list such as `[a, "b, c"]`. Raises ValueError when it is something else."""
    try:
        flat = read_flat_text(f"list: {text}\n")
    except yaml.YAMLError as error:
        raise ValueError(f"not a YAML list ({_one_line(error)})") from error
    value = flat.values.get("list")
    if flat.mistakes or len(flat.values) != 1 or not isinstance(value, list):
        raise ValueError("not a YAML list of plain values")
    return value


class _Reader:
    """One pass over the parser's events. Depth is counted, not recursed into."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._values: dict[str, Value] = {}
        self._lines: dict[str, int] = {}
        self._mistakes: list[str] = []

    def read(self) -> FlatFile:
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents == 1:
                    self._document()
                else:
                    self._mistakes.append(f"line {_line(event)}: a second document; write one")
                    self._skip(next(self._events))
        return FlatFile(self._values, self._lines, tuple(self._mistakes))

    def _document(self) -> None:
        event = next(self._events)
        if isinstance(event, yaml.ScalarEvent) and event.value == "":
            return  # an empty file: nothing is set
        if not isinstance(event, yaml.MappingStartEvent):
            self._mistakes.append(f"line {_line(event)}: write `key: value` lines")
            self._skip(event)
            return
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            self._entry(event)

    def _entry(self, event: yaml.Event) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            self._mistakes.append(f"line {_line(event)}: a key must be a plain word")
            self._skip(event)
            self._skip(next(self._events))
            return
        key, line = event.value, _line(event)
        value = self._value(next(self._events), key)
        if key in self._lines:
            self._mistakes.append(f"{key}: given twice (lines {self._lines[key]} and {line})")
            return
        self._lines[key] = line
        if value is not None:
            self._values[key] = value

    def _value(self, event: yaml.Event, key: str) -> Value | None:
        """A scalar or a list of scalars; None after noting a mistake."""
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, key)
        if not isinstance(event, yaml.SequenceStartEvent):
            self._mistakes.append(f"{key}: {_unsupported(event)} (line {_line(event)})")
            self._skip(event)
            return None
        items: list[Text] = []
        whole = True
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            item = self._scalar(event, key) if isinstance(event, yaml.ScalarEvent) else None
            if item is not None:
                items.append(item)
                continue
            if not isinstance(event, yaml.ScalarEvent) and whole:
                self._mistakes.append(f"{key}: {_unsupported(event)} (line {_line(event)})")
            whole = False
            self._skip(event)
        return items if whole else None

    def _scalar(self, event: yaml.ScalarEvent, key: str) -> Text | None:
        if event.anchor is not None or event.tag is not None:
            self._mistakes.append(f"{key}: tags and anchors are not read (line {_line(event)})")
            return None
        return Text(event.value, quoted=event.style is not None)

    def _skip(self, event: yaml.Event) -> None:
        """Passes over the node that begins with `event`."""
        depth = 0
        while True:
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
                if depth > MAX_DEPTH:  # the scanner takes quadratic time there
                    raise ValueError(f"line {_line(event)}: nested too deeply")
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
            if depth == 0:
                return
            event = next(self._events)


def _unsupported(event: yaml.Event) -> str:
    if isinstance(event, yaml.AliasEvent):
        return "aliases (*name) are not read; write the value"
    return "must be one value or a list of values, without further levels"


def _line(event: yaml.Event) -> int:
    return int(event.start_mark.line) + 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
