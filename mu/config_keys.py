"""What one key of a config class allows. Pydantic checks types and ranges; what it says of a mistake is put into words.

A key holds one value or a tuple of them. Values from Python are taken strictly ("1e-5" is no number); those of a YAML
file or a flag are `Text`, which the key reads as its own type.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import types
import typing
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from mu.config_file import PACKAGE_PREFIX, Text
from mu.config_names import nearest

_ITEM_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(
    r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,5})?|[-+]?\.?(?:inf|nan)",
    re.ASCII | re.IGNORECASE,
)
"""Whole texts that are numbers: Python's own reading takes blanks, `1_0` and the digits of other scripts too."""
_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of")


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
        return " and ".join(f"{_LIMITS[name]} {limit}" for name, limit in self.bounds.items())

    @property
    def bounds(self) -> dict[str, float]:
        """The limits that there are, by pydantic's names."""
        return {name: limit for name in _LIMITS if (limit := getattr(self, name)) is not None}

    def __get_pydantic_core_schema__(self, annotation: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """One value is checked as a tuple of one: each item's type strictly, its range, and its text."""
        key = Key.of("", annotation, self)
        checks: dict[str, Any] = {**self.bounds, "strict": True}
        if key.item is float:
            checks["allow_inf_nan"] = False
        item: Any = Annotated[key.item, Field(**checks)]
        if key.item is str:
            item = Annotated[item, AfterValidator(self.checked_text)]
        items = handler.generate_schema(tuple[item, ...])
        return core_schema.no_info_wrap_validator_function(key.read, items)

    def checked_text(self, text: str) -> str:
        """The text, in paths with the home folder for `~`. Raises ValueError."""
        if not text and not self.may_be_empty:
            raise ValueError("must not be empty")
        if "${" in text:
            raise ValueError(f"{shown(text)}: values are not interpolated; write the value itself")
        if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
            raise ValueError(f"{shown(text)} contains a control character")
        if self.choices is not None and text not in self.choices:
            listed = ", ".join(self.choices)
            raise ValueError(f"{shown(text)} is not one of: {listed}.{nearest(text, self.choices)}")
        if self.pattern is not None and not re.fullmatch(self.pattern, text):
            raise ValueError(f"{shown(text)} is not what this key takes: {self.help}")
        if self.kind == "name":
            _check_name(text)
        if self.kind != "path":
            return text
        if text.startswith(PACKAGE_PREFIX) and ".." in Path(text).parts:
            raise ValueError(f"{shown(text)} leaves the package's folder")
        return os.path.expanduser(text)


def setting(default: Any, help: str, **rule: Any) -> Any:
    """A key of a config class: a pydantic field with its `Rule`."""
    made = Field(default=default, description=help)
    made.metadata.append(Rule(help, **rule))
    return made


@dataclass(frozen=True)
class Key:
    """A key of a config class, with its type taken apart: `item`, or a tuple of it, or null."""

    name: str
    item: type
    scalar: bool
    listed: bool
    optional: bool
    default: Any
    rule: Rule

    @classmethod
    def of(cls, name: str, annotation: Any, rule: Rule, default: Any = None) -> Key:
        """Raises TypeError for what is no type of a setting."""
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        forms = set(typing.get_args(annotation)) if union else {annotation}
        lists = {form for form in forms if typing.get_origin(form) is tuple}
        scalars = forms - lists - {types.NoneType}
        items = scalars | {typing.get_args(form)[0] for form in lists}
        if len(items) != 1 or not items <= set(_ITEM_WORDS):
            raise TypeError(f"{name}: {annotation} is no type of a setting")
        optional = types.NoneType in forms
        return cls(name, items.pop(), bool(scalars), bool(lists), optional, default, rule)

    @property
    def type_words(self) -> str:
        """The type in words, such as `a number, a list of numbers or null`."""
        one = _ITEM_WORDS[self.item] if self.rule.kind == "text" else f"a {self.rule.kind}"
        forms = [one] if self.scalar else []
        if self.listed:
            forms.append(f"a list of {one.removeprefix('a ')}{'' if one == 'text' else 's'}")
        if self.optional:
            forms.append("null")
        return " or ".join([", ".join(forms[:-1]), forms[-1]] if len(forms) > 1 else forms)

    @property
    def allowed(self) -> str:
        """What a mistake names instead: the type in words, or the choices."""
        if self.rule.choices is None:
            return self.type_words + (f": {self.rule.help}" if self.rule.pattern is not None else "")
        many = "a list of these" if not self.scalar else "one of these"
        return f"{many}: {', '.join(self.rule.choices)}{', or null' if self.optional else ''}"

    @property
    def default_text(self) -> str:
        return as_text(self.default)

    def read(self, given: object, check: core_schema.ValidatorFunctionWrapHandler) -> object:
        """The value, once pydantic has checked its items. Raises ValueError."""
        if is_null(given):
            if self.optional:
                return None
            none = ", or [] for none" if self.listed and self.rule.may_be_empty else ""
            raise ValueError(f"must not be null; give {self.allowed}{none}")
        if isinstance(given, str) and self.listed and self.rule.split and "," in given:
            given = [type(given)(part.strip()) for part in given.split(",")]
        if not isinstance(given, (list, tuple)):
            items = check((self._item(given),))
            return items[0] if self.scalar else items
        if not self.listed:
            raise ValueError(f"takes one value, {self.allowed}, not a list")
        if not given and not self.rule.may_be_empty:
            raise ValueError("the list is empty; give at least one")
        items = check(tuple(self._item(item) for item in given))
        if twice := sorted({as_text(item) for item in items if items.count(item) > 1}):
            raise ValueError(f"given more than once: {', '.join(twice)}")
        return items

    def _item(self, given: object) -> object:
        """The item in its key's type where it can be one; else as it is, which pydantic refuses."""
        if is_null(given):
            raise ValueError("an item of the list must not be null")
        if self.rule.kind == "path" and isinstance(given, os.PathLike):
            return os.fspath(given)
        if self.item is bool and isinstance(given, Text):
            return {"true": True, "false": False}.get(given.lower(), given)
        if self.item not in (int, float) or isinstance(given, bool):
            return given
        try:
            if isinstance(given, Text):
                form = _INTEGER if self.item is int else _NUMBER
                text = given.lower().replace(".inf", "inf").replace(".nan", "nan")
                return self.item(text) if form.fullmatch(given) else given
            wanted = numbers.Integral if self.item is int else numbers.Real
            return self.item(typing.cast(float, given)) if isinstance(given, wanted) else given  # numpy's too
        except OverflowError:
            return math.inf

    def explain(self, error: ErrorDetails) -> str:
        """What pydantic found wrong with a value, in our words."""
        given = error["input"]
        if error["type"] == "value_error":
            return str(error["ctx"]["error"])
        if error["type"] == "finite_number":
            return f"must be finite, got {given}"
        if error["type"] in _RANGE_ERRORS:
            return f"must be {self.rule.limits}, got {shown(given).removesuffix('.0')}"
        return f"must be {self.allowed}, got {shown(given)}"


def is_null(value: object) -> bool:
    """Whether a value, as it was given, means none."""
    return value is None or (isinstance(value, Text) and value.is_null)


def as_text(value: object, *, split: bool = True) -> str:
    """A value as a flag takes it: `null`, `true`, `0.5`, `a,b`, or a YAML list where an item has a comma.

    A key whose text is not cut at commas (`split` false) always takes a list as a YAML list.
    """
    if isinstance(value, tuple):
        items = [as_text(item) for item in value]
        plain = all("," not in item and not item.startswith("[") and not Text(item).is_null for item in items)
        if split and items and plain:
            return ",".join(items)
        return yaml.safe_dump(
            list(value), default_flow_style=True, allow_unicode=True, width=math.inf
        ).strip()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _check_name(text: str) -> None:
    """A name becomes a folder or file name: it must not lead out of the folder it stands in."""
    if "/" in text or "\\" in text or ".." in text or text == ".":
        raise ValueError(f"{shown(text)} is used as a folder's name: no '/', '\\' or '..'")
    if not text.isprintable() or text != text.strip():
        raise ValueError(f"{shown(text)} is used as a folder's name: no blanks around it, no invisible signs")
    if len(text.encode()) > 100:
        raise ValueError(f"{shown(text)} is used as a folder's name: at most 100 bytes")


def shown(value: object) -> str:
    """The value in a message, cut where it is long."""
    try:
        text = repr(str(value) if isinstance(value, Text) else value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return f"a value of type {type(value).__name__} that is too long to be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."
