"""What one key of a config allows, and a given value as that key takes it, or why not."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
import typing
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mu.config_file import Text

PACKAGE_PREFIX = "package:"
_NULLS = ("null", "Null", "NULL", "~", "")
_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(
    r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,5})?|[-+]?\.?(?:inf|nan)", re.I
)
ITEM_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class WrongValue(Exception):
    """A value that its key does not take; the text says what it takes."""


@dataclass(frozen=True)
class Rule:
    """What a key means and allows; for a list, of each item."""

    help: str
    choices: tuple[str, ...] | None = None
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    multiple_of: int | None = None
    kind: Literal["text", "name", "path"] = "text"
    split: bool = True
    """The text of a list key is cut at commas (prompts contain them, so theirs is not)."""
    may_be_empty: bool = False
    """The empty text or the empty list is a value."""
    pattern: str | None = None
    """Regular expression that the whole text must match; `help` says it in words."""

    @property
    def limits(self) -> str:
        """The range in words, such as `> 0 and <= 1`."""
        signs = ((">", self.gt), (">=", self.ge), ("<", self.lt), ("<=", self.le))
        parts = [f"{sign} {limit}" for sign, limit in signs if limit is not None]
        if self.multiple_of is not None:
            parts.append(f"a multiple of {self.multiple_of}")
        return " and ".join(parts)


@dataclass(frozen=True)
class Key:
    """A key of a config class, with its type taken apart: `item`, or a list of it, or null."""

    name: str
    item: type
    scalar: bool
    listed: bool
    optional: bool
    default: Any
    rule: Rule

    @property
    def type_words(self) -> str:
        """The type in words, such as `a number, a list of numbers or null`."""
        one = ITEM_WORDS[self.item] if self.rule.kind == "text" else f"a {self.rule.kind}"
        forms = [one] if self.scalar else []
        if self.listed:
            forms.append(f"a list of {one.removeprefix('a ')}{'' if one == 'text' else 's'}")
        if self.optional:
            forms.append("null")
        return " or ".join([", ".join(forms[:-1]), forms[-1]] if len(forms) > 1 else forms)

    @property
    def default_text(self) -> str:
        return as_text(self.default)


def is_null(value: object) -> bool:
    """Whether a value, as it was given, means none."""
    return value is None or (isinstance(value, Text) and not value.quoted and value.raw in _NULLS)


def checked(key: Key, value: object) -> object:
    """The value in its key's type; in paths, `~` is the home folder. Raises WrongValue."""
    if is_null(value):
        if key.optional:
            return None
        none = ", or [] for none" if key.listed and key.rule.may_be_empty else ""
        raise WrongValue(f"must not be null; give {key.type_words}{none}")
    if isinstance(value, (Text, str)) and key.listed and key.rule.split:
        raw = value.raw if isinstance(value, Text) else value
        if "," in raw:
            value = [type(value)(part.strip()) for part in raw.split(",")]
    if not isinstance(value, (list, tuple)):
        item = _item(key, value)
        return item if key.scalar else (item,)
    if not key.listed:
        raise WrongValue(f"takes one value, {key.type_words}, not a list")
    if not value and not key.rule.may_be_empty:
        raise WrongValue("the list is empty; give at least one")
    items = tuple(_item(key, item) for item in value)
    twice = sorted({as_text(item) for item in items if items.count(item) > 1})
    if twice:
        raise WrongValue(f"given more than once: {', '.join(twice)}")
    return items


def _item(key: Key, value: object) -> object:
    if is_null(value):
        raise WrongValue("an item of the list must not be null")
    raw = value.raw if isinstance(value, Text) else None
    result: object = None
    if key.item is bool:
        result = {"true": True, "false": False}.get(raw.lower()) if raw is not None else value
        right = isinstance(result, bool)
    elif key.item is str:
        result = raw if raw is not None else value
        if key.rule.kind == "path" and isinstance(result, os.PathLike):
            result = os.fspath(result)
        right = isinstance(result, str)
    else:
        result, right = _number(key.item, raw, value)
    if not right:
        shown = raw if raw is not None else value
        raise WrongValue(f"must be {key.type_words}, got {_shown(shown)}")
    if isinstance(result, str):
        _check_text(key.rule, result)
        if key.rule.kind == "path":
            return os.path.expanduser(result)
    elif not isinstance(result, bool):
        _check_range(key.rule, typing.cast(float, result))
    return result


def _number(item: type, raw: str | None, value: object) -> tuple[object, bool]:
    """The value as `item`, int or float, and whether it is one."""
    if raw is not None:
        form = _INTEGER if item is int else _NUMBER
        return (
            (item(raw.replace(".inf", "inf").replace(".nan", "nan")), True)
            if form.fullmatch(raw)
            else (raw, False)
        )
    wanted = numbers.Integral if item is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        return value, False
    try:
        return item(value), True
    except OverflowError:
        return math.inf, True


def _check_range(rule: Rule, number: float) -> None:
    if not math.isfinite(number):
        raise WrongValue(f"must be finite, got {number}")
    right = (
        (rule.gt is None or number > rule.gt)
        and (rule.ge is None or number >= rule.ge)
        and (rule.lt is None or number < rule.lt)
        and (rule.le is None or number <= rule.le)
        and (rule.multiple_of is None or number % rule.multiple_of == 0)
    )
    if not right:
        raise WrongValue(f"must be {rule.limits}, got {number:g}")


def _check_text(rule: Rule, text: str) -> None:
    if not text and not rule.may_be_empty:
        raise WrongValue("must not be empty")
    if "${" in text:
        raise WrongValue(f"{_shown(text)}: values are not interpolated; write the value itself")
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
        raise WrongValue(f"{_shown(text)} contains a control character")
    if rule.choices is not None and text not in rule.choices:
        raise WrongValue(
            f"{_shown(text)} is not one of: {', '.join(rule.choices)}.{nearest(text, rule.choices)}"
        )
    if rule.pattern is not None and not re.fullmatch(rule.pattern, text):
        raise WrongValue(f"{_shown(text)} is not what this key takes: {rule.help}")
    if rule.kind == "name":
        _check_name(text)
    if rule.kind == "path" and text.startswith(PACKAGE_PREFIX) and ".." in Path(text).parts:
        raise WrongValue(f"{_shown(text)} leaves the package's folder")


def _check_name(text: str) -> None:
    """A name becomes a folder or file name: it must not lead out of the folder it stands in."""
    if "/" in text or "\\" in text or ".." in text or text == ".":
        raise WrongValue(f"{_shown(text)} is used as a folder's name: no '/', '\\' or '..'")
    if not text.isprintable() or text != text.strip():
        raise WrongValue(
            f"{_shown(text)} is used as a folder's name: no blanks around it, no invisible signs"
        )
    if len(text.encode()) > 100:
        raise WrongValue(f"{_shown(text)} is used as a folder's name: at most 100 bytes")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_text(value: object, *, split: bool = True) -> str:
    """A value as a flag takes it: `null`, `true`, `0.5`, `a,b`, or a YAML list where an item has a comma.

    A key whose text is not cut at commas (`split` false) always takes a list as a YAML list.
    """
    if isinstance(value, tuple):
        items = [as_text(item) for item in value]
        if (
            split
            and items
            and not any("," in item or item.startswith("[") or item in _NULLS for item in items)
        ):
            return ",".join(items)
        return yaml.safe_dump(
            list(value), default_flow_style=True, allow_unicode=True, width=math.inf
        ).strip()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def nearest_name(word: str, known: Iterable[str]) -> str | None:
    """The known word that is nearest to another one, None when none is near."""
    by_case = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), by_case, n=1, cutoff=0.55)
    return by_case[near[0]] if near else None


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is near."""
    near = nearest_name(word, known)
    return f" Did you mean {near!r}?" if near is not None else ""
