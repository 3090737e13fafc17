"""Settings of a run as checked, immutable pydantic models, built from defaults < YAML < overrides.

A config class derives from `Config` and declares each key with `setting`: its default, a line of help, and what is
allowed (`mu.config_keys`). However it is built, by constructor, `load_config`, `override` or from the command line
(`mu.cli`), all its mistakes are found together and raised as one `ConfigError`. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError
from numbers import Number
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mu.config_file import ConfigFileError, find_config, path_problem, read_flat_file, resolve_path
from mu.config_keys import Key, Rule, as_text, is_null, setting
from mu.config_names import hint, meant, nearest
from mu.errors import MuError
from mu.ranks import started_rank

__all__ = [
    "Config",
    "ConfigError",
    "as_dict",
    "as_text",
    "assemble",
    "check_paths",
    "config_of",
    "dump",
    "keys_of",
    "load_config",
    "nearest",
    "override",
    "plain",
    "require_paths",
    "resolve_path",
    "setting",
]

_log = logging.getLogger(__name__)


class ConfigError(MuError, ValueError):
    """The settings cannot be used. One message lists every mistake; `mistakes` holds them singly."""

    exit_code = 2

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(mistakes)
        count = f"{len(self.mistakes)} mistakes" if len(self.mistakes) > 1 else "1 mistake"
        lines = "\n".join([f"{count} in the configuration:", *self.mistakes])
        super().__init__(lines.replace("\n", "\n  "))  # also the lines of a mistake that has several

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigError, (self.mistakes,)


class Config(BaseModel):
    """Base of the config classes. Immutable: lists are tuples, and `override` makes a new object."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, protected_namespaces=())

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Of keys of which one is given instead of another: key -> those whose values from further below it takes away."""
    without_effect: ClassVar[tuple[str, ...]] = ()
    """Keys of other programs' files that are taken, with a note, and mean nothing here."""
    gone: ClassVar[Mapping[str, str]] = {}
    """Keys that were removed -> their default, with which files of older runs are still taken."""

    def __init__(self, /, **given: Any) -> None:
        _fill(self, [entries_of(given)])

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(
            f"{name}: a config is never changed. Give the key where the config is used, as in "
            f"SaliencyUnlearningAlgorithm(config, {name}={value!r}), or make another config: "
            f"mu.config.override(config, {name}={value!r})"
        )

    def model_copy(self: C, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> C:
        """Pydantic's, but what is changed is checked."""
        return override(self, **(update or {})) if update else super().model_copy(deep=deep)

    @classmethod
    def of_another(cls, name: str) -> str | None:  # noqa: ARG003
        """A sentence on a key that is not of this class but of a command that is easily taken for it; else None."""
        return None

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong between keys: (the keys, message). Asked only when the keys are right by themselves."""
        yield from ()

    def disk_problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is missing on disk, as `conflicts`, of keys without one; names the command that makes it."""
        yield from ()


C = TypeVar("C", bound=Config)
Entry = tuple[str, object, str]
"""A key, the value given to it, and where (`train.yaml line 3`, `--lr`, or nothing)."""


@functools.cache
def keys_of(cls: type[Config]) -> tuple[Key, ...]:
    """The keys of a config class, in order."""
    return tuple(
        Key.of(name, field.annotation, rule, field.default)
        for name, field in cls.model_fields.items()
        for rule in field.metadata
        if isinstance(rule, Rule)
    )


# ---- building a config


def load_config(
    cls: type[C],
    *,
    config_path: str | os.PathLike[str] | None = None,
    base: Config | Mapping[str, object] | None = None,
    overrides: Mapping[str, object] | None = None,
    on_disk: bool = False,
) -> C:
    """A checked config: defaults < `base` < the YAML file < `overrides`, see `assemble`.

    Args:
        base, overrides: OmegaConf's containers are taken too, see `plain`.
        config_path: a YAML file, or the name of a packaged one, see `find_config`.
        on_disk: also check that the files and folders it names are there.
    Raises ConfigError with all mistakes.
    """
    mistakes: list[str] = []
    read: Sequence[Entry] | None = ()
    if config_path is not None:
        read = file_entries(config_path, mistakes)
    return assemble(cls, entries_of(base), read, entries_of(overrides), mistakes=mistakes, on_disk=on_disk)


def config_of(cls: type[C], given: Config | Mapping[str, object], **overrides: object) -> C:
    """A `cls` with some keys changed, from one, or from a mapping of keys over the defaults. Raises ConfigError."""
    if isinstance(given, cls):
        return override(given, **overrides)
    return load_config(cls, base=given, overrides=overrides)


def override(config: C, **overrides: object) -> C:
    """A new config with some keys changed; `config` stays as it is. Raises ConfigError."""
    return load_config(type(config), base=config, overrides=overrides)


def entries_of(values: Config | Mapping[str, object] | None) -> list[Entry]:
    """Values from Python, as a level of `assemble`. Raises ConfigError for what is no mapping."""
    given = as_dict(values) if isinstance(values, Config) else plain(values or {})
    if not isinstance(given, Mapping):
        raise ConfigError([f"the config must be a mapping of keys to values, got {given!r}"])
    return [(str(key), value, "") for key, value in given.items()]


def file_entries(path: str | os.PathLike[str], mistakes: list[str]) -> list[Entry] | None:
    """The entries of a YAML file, None when it cannot be read; what is wrong with it is added to `mistakes`."""
    try:
        found = find_config(path)
        flat = read_flat_file(found)
    except ConfigFileError as error:
        mistakes.append(f"config_path: {error}")
        return None
    mistakes += [f"{mistake} in {found.name}" for mistake in flat.mistakes]
    return [(key, value, f"{found.name} line {flat.lines[key]}") for key, value in flat.values.items()]


def plain(value: Any) -> Any:
    """An OmegaConf DictConfig or ListConfig as the dict or list of what is written in it; other values as they are.

    Nothing is interpolated: `${...}` stays that text, which no key takes, so that a config cannot reach outside itself.

    Raises ConfigError for a value that is still missing (`???`).
    """
    if "omegaconf" not in sys.modules:  # then there is no such object, and no need to load the package
        return value
    from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf

    if not isinstance(value, (DictConfig, ListConfig)):
        return value
    try:
        return OmegaConf.to_container(value, resolve=False, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError([f"{error.full_key}: the value is missing ('???')"]) from error


def assemble(
    cls: type[C],
    *levels: Sequence[Entry] | None,
    mistakes: Iterable[str] = (),
    on_disk: bool = False,
    unsure: Iterable[str] = (),
    notes: list[str] | None = None,
) -> C:
    """A config from levels of entries, such as a file and flags, of which a later one wins.

    It wins also over the other of a pair, see `Config.replaces`: prompts of a file go where a flag names a file of
    prompts. Both on one level stay, and are at odds.

    Args:
        levels: None for a file that could not be read, as `mistakes` says: then only what is wrong with the entries
            that are here is told beside it.
        unsure: keys whose values are not known, because `mistakes` names what probably stands for them.
        notes: what is to be said of keys without effect is added to it; None: it is logged.

    Raises ConfigError with `mistakes`, the unknown keys, wrong values, conflicts and, on demand, missing files.
    """
    config = cls.__new__(cls)
    _fill(config, levels, mistakes=mistakes, on_disk=on_disk, unsure=unsure, notes=notes)
    return config


def _fill(
    config: Config,
    levels: Iterable[Sequence[Entry] | None],
    *,
    mistakes: Iterable[str] = (),
    on_disk: bool = False,
    unsure: Iterable[str] = (),
    notes: list[str] | None = None,
) -> None:
    """Sets the values of a config that has none yet, as `assemble` says."""
    cls = type(config)
    levels = tuple(levels)
    keys = {key.name: key for key in keys_of(cls)}
    found = list(mistakes)
    wrong = set(unsure)

    # 1. The value of each key; what is no key.
    given: dict[str, object] = {}
    where: dict[str, str] = {}
    unused: dict[str, None] = {}
    for name, value, place in _merged(cls, levels):
        at = f" ({place})" if place else ""
        if name in keys:
            given[name], where[name] = plain(value), at
        elif name in cls.without_effect or (name in cls.gone and _is_text(value, cls.gone[name])):
            unused[name] = None
        else:
            other = cls.of_another(name)
            found.append(f"{name}: there is no such key.{hint(name, keys, of_another=other)}{at}")
            wrong |= {key for key in [meant(name, keys, of_another=other)] if key is not None}

    # 2. Types, ranges and texts. Where one is wrong, the key's default stands in while the rest is checked.
    try:
        BaseModel.__init__(config, **given)
    except ValidationError as error:
        said: set[str] = set()
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0])
            if name not in said:
                found.append(f"{name}: {keys[name].explain(problem)}{where[name]}")
                said.add(name)
        wrong |= said
        BaseModel.__init__(config, **{name: value for name, value in given.items() if name not in said})

    # 3. Paths that cannot be looked for: their defaults stand in too.
    if on_disk and (refused := _refused_paths(config)):
        found += [f"{name}: {message}{where[name]}" for name, message in refused.items()]
        wrong |= refused.keys()
        BaseModel.__init__(
            config, **{name: value for name, value in as_dict(config).items() if name not in refused}
        )

    # 4. What is at odds between keys, and what is not on disk; not where a mistake is told of the keys already.
    if None not in levels:
        for names, message in config.conflicts():
            if wrong.isdisjoint(names):
                found.append(f"{names[0]}: {message}")
                wrong.add(names[0])
        if on_disk:
            found += [
                f"{names[0]}: {message}"
                for names, message in config.disk_problems()
                if wrong.isdisjoint(names)
            ]
    if found:
        raise ConfigError(found)
    if unused:
        note = f"{', '.join(unused)}: taken because existing files have it, without any effect"
        if notes is not None:
            notes.append(note)
        elif started_rank() == 0:
            _log.warning("%s", note)


def _refused_paths(config: Config) -> dict[str, str]:
    """Key -> why the file system does not look for its path, and what to do; a path that is not there is none."""
    found = {}
    for key in keys_of(type(config)):
        given = getattr(config, key.name)
        if key.rule.kind != "path" or given in (None, key.default):
            continue
        for path in given if isinstance(given, tuple) else (given,):
            if (problem := path_problem(path)) is not None:
                found[key.name] = problem
    return found


def _is_text(value: object, text: str) -> bool:
    """Whether a value, from a file or from Python, is one that a flag takes as this text; no container is."""
    value = plain(value)
    return isinstance(value, (str, Number, types.NoneType)) and as_text(value) == text


def _merged(cls: type[Config], levels: Iterable[Sequence[Entry] | None]) -> list[Entry]:
    """The entries of all levels, the lowest first, without those that an upper level replaces."""
    merged: list[Entry] = []
    for level in levels:
        replaced = {
            other
            for name, value, _ in level or ()
            if not is_null(value) and value not in ((), [])
            for other in cls.replaces.get(name, ())
        }
        merged = [entry for entry in merged if entry[0] not in replaced] + list(level or ())
    return merged


# ---- reading a config


def as_dict(config: Config) -> dict[str, Any]:
    """Key -> value, in order."""
    return dict(config)


def dump(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in config}
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf))


class _Dumper(yaml.SafeDumper):
    """Writes a list of numbers on one line, and any other list a line for each."""

    def represent_list(self, data: list[object]) -> yaml.Node:
        numbers = all(isinstance(value, int | float) for value in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=numbers)


_Dumper.add_representer(list, _Dumper.represent_list)


def check_paths(config: Config) -> list[str]:
    """What `config` needs and is not on disk; one message each, naming the command that makes it."""
    refused = _refused_paths(config)
    if refused:  # their defaults stand in while the rest is looked for
        given = {name: value for name, value in config if name not in refused}
        config = type(config).__new__(type(config))
        BaseModel.__init__(config, **given)
    return [f"{name}: {message}" for name, message in refused.items()] + [
        f"{keys[0]}: {message}" for keys, message in config.disk_problems() if refused.keys().isdisjoint(keys)
    ]


def require_paths(config: Config) -> None:
    """Raises ConfigError with everything that `check_paths` finds."""
    if problems := check_paths(config):
        raise ConfigError(problems)
