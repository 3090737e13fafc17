"""Files of settings: where they are, and how a flat one, `key: value` or `key: [list]`, is read as text.

What a scalar *is* depends on the key it is given to (`mu.config`), not on how it looks: `wandb: off` is the word "off",
`template_name: 007` a name. YAML's usual loaders, and OmegaConf's, have made false and 7 of them before a key is asked;
so the file is taken as YAML's nodes, which keep the text and the line. There are no tags, anchors or aliases, and
nothing is interpolated or imported.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

import yaml

from mu.config_names import nearest
from mu.errors import MuError

PACKAGE_PREFIX = "package:"
_PACKAGE = Path(__file__).parent
_MODEL_YAMLS = ("model_config.yaml", "sd_v2_base.yaml", "sd_v2_v.yaml")
"""Packaged YAML files that describe a model, and are no settings of a command."""
_REFUSED = {
    errno.ENAMETOOLONG: "most file systems take 255 bytes for a name and 4095 for the whole; give a shorter path",
    errno.EACCES: "give another path, or change the permissions of its folders",
    errno.ELOOP: "the links in it lead in a circle; mend them, or give another path",
}
"""Why a file system does not even look for a path -> what to do."""
MAX_BYTES = 1_000_000
_NULLS = ("null", "Null", "NULL", "~", "")


class ConfigFileError(MuError, ValueError):
    """The file is not there, or cannot be read as a flat YAML file at all."""


# ---- where they are


def config_folders() -> list[Path]:
    """Where the packaged YAML files are: `configs/` (in a checkout beside the package), and each method's own.

    The first is not there where `mu/` was copied alone.
    """
    shared = [folder for at in (_PACKAGE, _PACKAGE.parent) if (folder := at / "configs").is_dir()]
    return [*shared[:1], *sorted(_PACKAGE.glob("algorithms/*/configs"))]


def packaged_configs() -> dict[str, Path]:
    """Name, as `--config_path` takes it -> packaged YAML file with settings."""
    found: dict[str, Path] = {}
    for folder in config_folders():
        for path in sorted(folder.rglob("*.yaml")):
            if path.name not in _MODEL_YAMLS:
                found.setdefault(path.relative_to(folder).as_posix(), path)
    return found


def find_config(path: str | os.PathLike[str]) -> Path:
    """The file at `path`, see `resolve_path`, else the packaged one of that name.

    Of a packaged name, what leads up to `configs/` and the `.yaml` after it may differ.
    Raises ConfigFileError, with the packaged names, when there is neither.
    """
    found = resolve_path(os.fspath(path))
    if os.path.exists(found):
        return found
    packaged = packaged_configs()
    name = found.as_posix()
    short = name.rpartition("configs/")[2].removesuffix(".yaml") + ".yaml"
    if short in packaged:
        return packaged[short]
    known = f" The packaged ones: {', '.join(packaged)}.{nearest(short, packaged)}"
    raise ConfigFileError(f"there is no file {name!r}.{known}")


def resolve_path(path: str) -> Path:
    """A path key's value as the path that is read.

    `package:x` is the file x inside the installed package, `~` the home folder. What begins with `mu/` or `configs/`
    and is not in the working folder is looked up in the package, as if that were a checkout. Others are as they are.
    """
    if path.startswith(PACKAGE_PREFIX):
        return _PACKAGE / path.removeprefix(PACKAGE_PREFIX)
    found = Path(os.path.expanduser(path))
    top, *rest = found.parts or ("",)
    if os.path.lexists(found) or ".." in rest or top not in ("mu", "configs"):
        return found
    folders = [_PACKAGE] if top == "mu" else config_folders()
    return next((at for folder in folders if os.path.exists(at := folder.joinpath(*rest))), found)


def path_problem(path: str) -> str | None:
    """Why the file system does not even look for a path, and what to do; None: it does, be something there or not."""
    try:
        os.stat(resolve_path(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        shown = repr(path) if len(path) <= 200 else f"{path[:57]!r}..."
        return f"{shown} cannot be looked for ({error.strerror}); {_REFUSED.get(error.errno or 0, 'give another path')}"
    return None


# ---- how they are read


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
    braces = "; an item with { or } needs quotes: ['{concept}', 'art by {concept}']" if "{" in text else ""
    try:
        values, _, mistakes = _read_flat(f"list: {text}\n")
    except ValueError as error:
        raise ValueError(f"not a YAML list ({error}){braces}") from error
    value = values.get("list")
    if mistakes or len(values) != 1 or not isinstance(value, list):
        raise ValueError(f"not a YAML list of plain values{braces}")
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
