"""Settings of a run as checked, immutable dataclasses, built from defaults < YAML < overrides.

A config class derives from `Config`, is a frozen dataclass, and declares each key with `setting`: its default, a line
of help, and what is allowed. However it is built, by constructor, `load_config`, `override` or from the command line
(`mu.cli`), all its mistakes are found together and raised as one `ConfigError`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from mu.config_file import ConfigFileError, Text, read_flat_file
from mu.config_names import hint, meant
from mu.config_values import (
    ITEM_WORDS,
    PACKAGE_PREFIX,
    Key,
    Rule,
    WrongValue,
    as_text,
    checked,
    is_null,
    nearest,
)
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
    "find_config",
    "keys_of",
    "load_config",
    "nearest",
    "override",
    "plain",
    "require_paths",
    "resolve_path",
    "setting",
    "upon",
]

_PACKAGE_FOLDER = Path(__file__).parent
_MODEL_YAMLS = ("model_config.yaml", "sd_v2_base.yaml", "sd_v2_v.yaml")
"""Packaged YAML files that describe a model, and are no settings of a command."""

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


def setting(default: Any, help: str, **rule: Any) -> Any:
    """A key of a config class: a dataclass field with its `Rule`."""
    return field(default=default, metadata={"rule": Rule(help, **rule)})


class _ConfigType(type):
    """What config classes do otherwise than other frozen dataclasses: two messages that say the way out."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        own = typing.cast("type[Config]", cls)
        if not given.keys() <= {fld.name for fld in dataclasses.fields(own)}:
            given = as_dict(assemble(own, [(name, value, "") for name, value in given.items()]))
        return super().__call__(*args, **given)

    def __setattr__(cls, name: str, value: Any) -> None:
        # A frozen dataclass brings its own, which says only that it is frozen.
        super().__setattr__(name, _refuse_assignment if name == "__setattr__" else value)


def _refuse_assignment(_: Config, name: str, value: object) -> None:
    raise FrozenInstanceError(
        f"{name}: a config is never changed. Give the key where the config is used, as in "
        f"SaliencyUnlearningAlgorithm(config, {name}={value!r}), or make another config: "
        f"mu.config.override(config, {name}={value!r})"
    )


@dataclass(frozen=True, kw_only=True)
class Config(metaclass=_ConfigType):
    """Base of the config classes. Immutable: lists are tuples, and `override` makes a new object."""

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Of keys of which one is given instead of another: key -> those whose values from further below it takes away."""
    without_effect: ClassVar[tuple[str, ...]] = ()
    """Keys of other programs' files that are taken, with a note, and mean nothing here."""
    gone: ClassVar[Mapping[str, str]] = {}
    """Keys that were removed -> their default, with which files of older runs are still taken."""

    def __post_init__(self) -> None:
        given = [(key.name, getattr(self, key.name), "") for key in keys_of(type(self))]
        same = assemble(type(self), given)
        for key in keys_of(type(self)):
            object.__setattr__(self, key.name, getattr(same, key.name))

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong between keys: (the keys, message). Asked only when the keys are right by themselves."""
        yield from ()

    def disk_problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is missing on disk, as `conflicts`, of keys without one; names the command that makes it."""
        yield from ()


C = TypeVar("C", bound=Config)
Entry = tuple[str, object, str]
"""A key, the value given to it, and where (`train.yaml line 3`, `--lr`, or nothing)."""


def keys_of(cls: type[Config]) -> tuple[Key, ...]:
    """The keys of a config class, in order."""
    hints = typing.get_type_hints(cls)
    return tuple(_key(fld, hints[fld.name]) for fld in dataclasses.fields(cls))


def load_config(
    cls: type[C],
    *,
    config_path: str | os.PathLike[str] | None = None,
    base: Config | Mapping[str, object] | None = None,
    overrides: Mapping[str, object] | None = None,
    packaged: Path | None = None,
    on_disk: bool = False,
) -> C:
    """A checked config: defaults < `base` < the YAML file < `overrides`, see `upon`.

    Args:
        base, overrides: OmegaConf's containers are taken too, see `plain`.
        config_path: a YAML file, or the name of one in the folder `packaged`.
        on_disk: also check that the files and folders it names are there.
    Raises ConfigError with all mistakes.
    """
    entries: list[Entry] = []
    mistakes: list[str] = []
    if base is not None:
        values = as_dict(base) if isinstance(base, Config) else plain(base)
        if not isinstance(values, Mapping):
            raise ConfigError([f"the config must be a mapping of keys to values, got {values!r}"])
        entries += [(str(key), value, "") for key, value in values.items()]
    read: Sequence[Entry] | None = ()
    if config_path is not None:
        read = file_entries(config_path, packaged=packaged, mistakes=mistakes)
        entries = upon(cls, entries, read or ())
    entries = upon(cls, entries, [(str(key), value, "") for key, value in plain(overrides or {}).items()])
    return assemble(cls, entries, mistakes=mistakes, on_disk=on_disk, whole=read is not None)


def upon(cls: type[Config], below: Sequence[Entry], above: Sequence[Entry]) -> list[Entry]:
    """The entries of two levels, such as a file and flags, where the upper one wins.

    It wins also over the other of a pair, see `Config.replaces`: prompts of a file go where a flag names a file of
    prompts. Both on one level stay, and are at odds.
    """
    gone = {
        other
        for name, value, _ in above
        if not is_null(value) and not (isinstance(value, (list, tuple)) and not value)
        for other in cls.replaces.get(name, ())
    }
    return [*(entry for entry in below if entry[0] not in gone), *above]


def config_of(cls: type[C], given: Config | Mapping[str, object], **overrides: object) -> C:
    """A `cls` with some keys changed, from one, or from a mapping of keys over the defaults. Raises ConfigError."""
    if isinstance(given, cls):
        return override(given, **overrides)
    return load_config(cls, base=given, overrides=overrides)


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


def override(config: C, **overrides: object) -> C:
    """A new config with some keys changed; `config` stays as it is. Raises ConfigError."""
    return load_config(type(config), base=config, overrides=overrides)


def check_paths(config: Config) -> list[str]:
    """What `config` needs and is not on disk; one message each, naming the command that makes it."""
    return [f"{keys[0]}: {message}" for keys, message in config.disk_problems()]


def require_paths(config: Config) -> None:
    """Raises ConfigError with everything that `check_paths` finds."""
    if problems := check_paths(config):
        raise ConfigError(problems)


def as_dict(config: Config) -> dict[str, Any]:
    """Key -> value, in order."""
    return {key.name: getattr(config, key.name) for key in keys_of(type(config))}


def dump(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in as_dict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=math.inf)


def resolve_path(path: str) -> Path:
    """A path key's value as the path that is read.

    `package:x` is the file x inside the installed package, `~` the home folder. What begins with `mu/` or `configs/`
    and is not in the working folder is looked up in the package, as if that were a checkout. Others are as they are.
    """
    if path.startswith(PACKAGE_PREFIX):
        return _PACKAGE_FOLDER / path.removeprefix(PACKAGE_PREFIX)
    found = Path(os.path.expanduser(path))
    return found if os.path.lexists(found) else _in_package(found) or found


def _in_package(path: Path) -> Path | None:
    """What the package has at a path that begins as in a checkout."""
    top, *rest = path.parts or ("",)
    if ".." in rest or top not in ("mu", "configs"):
        return None
    folders = [_PACKAGE_FOLDER] if top == "mu" else sorted(_PACKAGE_FOLDER.glob("algorithms/*/configs"))
    return next((at for folder in folders if (at := folder.joinpath(*rest)).exists()), None)


def packaged_configs(folder: Path) -> list[str]:
    """Names of the YAML configs below a folder, as `--config_path` takes them."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    return [name for name in paths if Path(name).name not in _MODEL_YAMLS]


def find_config(path: str | os.PathLike[str], packaged: Path | None) -> Path:
    """The file at `path`, else the packaged one of that name (`configs/` before it and `.yaml` after may differ).

    Raises ConfigError, with the packaged names, when there is neither.
    """
    name = os.path.expanduser(path)
    if os.path.exists(name):
        return Path(name)
    names = packaged_configs(packaged) if packaged is not None else []
    short = name.rpartition("configs/")[2].removesuffix(".yaml") + ".yaml"
    if packaged is not None and short in names:
        return packaged / short
    listed = f" The packaged ones: {', '.join(names)}.{nearest(short, names)}" if names else ""
    raise ConfigError([f"config_path: there is no file {name!r}.{listed}"])


def file_entries(
    path: str | os.PathLike[str], *, packaged: Path | None, mistakes: list[str]
) -> list[Entry] | None:
    """The entries of a YAML file, None when it cannot be read; what is wrong with it is added to `mistakes`."""
    try:
        found = find_config(path, packaged)
        flat = read_flat_file(found)
    except ConfigError as error:
        mistakes += error.mistakes
        return None
    except ConfigFileError as error:
        mistakes.append(f"config_path: {error}")
        return None
    mistakes += [f"{mistake} in {found.name}" for mistake in flat.mistakes]
    return [(key, value, f"{found.name} line {flat.lines[key]}") for key, value in flat.values.items()]


def assemble(
    cls: type[C],
    entries: Iterable[Entry],
    *,
    mistakes: Iterable[str] = (),
    on_disk: bool = False,
    whole: bool = True,
    unsure: Iterable[str] = (),
    notes: list[str] | None = None,
) -> C:
    """A config from entries, of which a later one replaces an earlier one of the same key.

    Args:
        whole: false: entries are missing, because their file could not be read, and `mistakes` says so; only what is
            wrong with those that are here is told beside it.
        unsure: keys whose values are not known, because `mistakes` names what probably stands for them.
        notes: what is to be said of keys without effect is added to it; None: it is logged.

    Raises ConfigError with `mistakes`, the unknown keys, wrong values, conflicts and, on demand, missing files.
    """
    found = list(mistakes)
    known = {key.name: key for key in keys_of(cls)}
    given: dict[str, tuple[object, str]] = {}
    unused: dict[str, None] = {}
    wrong = set(unsure)
    for name, value, where in entries:
        if name in known:
            given[name] = (plain(value), where)
        elif name in cls.without_effect or (name in cls.gone and _text(value) == cls.gone[name]):
            unused[name] = None
        else:
            found.append(f"{name}: there is no such key.{hint(name, known)}{_at(where)}")
            wrong |= {key for key in [meant(name, known)] if key is not None}
    config = object.__new__(cls)
    for name, key in known.items():
        value, where = given.get(name, (key.default, ""))
        try:
            good = checked(key, value)
        except WrongValue as error:
            found.append(f"{name}: {error}{_at(where)}")
            wrong.add(name)
            good = key.default
        object.__setattr__(config, name, good)
    for keys, message in config.conflicts() if whole else ():
        if wrong.isdisjoint(keys):
            found.append(f"{keys[0]}: {message}")
            wrong.add(keys[0])
    if on_disk and whole:
        found += [
            f"{keys[0]}: {message}" for keys, message in config.disk_problems() if wrong.isdisjoint(keys)
        ]
    if found:
        raise ConfigError(found)
    if unused:
        note = f"{', '.join(unused)}: taken because existing files have it, without any effect"
        if notes is not None:
            notes.append(note)
        elif started_rank() == 0:
            _log.warning("%s", note)
    return config


def _text(value: object) -> object:
    return value.raw if isinstance(value, Text) else value


def _key(fld: dataclasses.Field[Any], hint: Any) -> Key:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    forms = set(typing.get_args(hint)) if union else {hint}
    optional = types.NoneType in forms
    forms -= {types.NoneType}
    lists = {form for form in forms if typing.get_origin(form) is tuple}
    items = {typing.get_args(form)[0] for form in lists} | (forms - lists)
    if len(items) != 1 or not items <= set(ITEM_WORDS):
        raise TypeError(f"{fld.name}: {hint} is no type of a setting")
    return Key(
        name=fld.name,
        item=items.pop(),
        scalar=bool(forms - lists),
        listed=bool(lists),
        optional=optional,
        default=fld.default,
        rule=fld.metadata["rule"],
    )


def _at(where: str) -> str:
    return f" ({where})" if where else ""
