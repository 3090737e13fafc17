"""Load the tensors of a pickled checkpoint without running anything from it.

`torch.load(weights_only=True)` builds tensors and plain containers alone. Checkpoints of training frameworks
also pickle objects of their own (callbacks, configs), which it refuses: those are replaced by inert stand-ins.
Every other name that a file asks for is refused before anything is built. There is no second, unsafe attempt.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

# The pickles of torch.save's old format: magic number, protocol, system, the object, the names of its storages.
_LEGACY_PICKLES = 5
# Names of these packages become inert stand-ins. Nothing of them is imported.
_INERT_PACKAGES = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "lightning_utilities.",
    "omegaconf.",
)
_INERT_NAMES = {
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "typing.Any",
    "pathlib.PosixPath",
    "builtins.dict",
    "builtins.list",
    "builtins.tuple",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
}
# What tensors and state dicts are made of; of the names under `torch.`, torch itself admits only harmless ones.
_PLAIN_NAMES = {
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.set",
    "builtins.bytearray",
    "builtins.complex",
}


class UnsafePickleError(ValueError):
    """A pickle asks for names that are not on the list of harmless ones."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class Inert:
    """Stands for any object of a training framework: takes every argument and state, keeps and does nothing."""

    def __new__(cls, *_args: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def _plain_dict(*_args: object) -> dict[Any, Any]:
    return {}


def load_pickle(path: Path) -> Any:
    """The object in a file of `torch.save`, in its zip or its old format, on the CPU.

    Raises:
        UnsafePickleError: the file asks for a name that is neither a tensor's nor a known framework's.
        pickle.UnpicklingError, RuntimeError, EOFError, ...: torch could not read the file.
    """
    names = sorted(set(pickled_names(path)))
    refused = [name for name in names if not (_is_inert(name) or _is_plain(name))]
    if refused:
        raise UnsafePickleError(refused)
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_stand_in(name), name) for name in names if _is_inert(name)
    ]
    # The file object keeps torch from going by the suffix.
    with path.open("rb") as file, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols and TorchScript: errors say that afterwards
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named:  # a name under `torch.` that torch does not admit
                raise UnsafePickleError([named[1]]) from None
            raise


def _is_plain(name: str) -> bool:
    return name in _PLAIN_NAMES or name.startswith("torch.")


def _is_inert(name: str) -> bool:
    return name.startswith(_INERT_PACKAGES) or name in _INERT_NAMES or name == "collections.defaultdict"


def _stand_in(name: str) -> Callable[..., Any]:
    # Entries are put only into real dicts, so what derives from dict gets one.
    if name == "collections.defaultdict":
        return _plain_dict
    return OrderedDict if name.endswith(".AttributeDict") else Inert


def pickled_names(path: Path) -> Iterator[str]:
    """Every `module.name` that the pickles of a file ask for, read off the opcodes without running them."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                pickles = [member for member in archive.namelist() if member.endswith(".pkl")]
                if not pickles:
                    raise pickle.UnpicklingError("it is another kind of zip archive: unpack it first")
                if any(member.endswith("/constants.pkl") for member in pickles):
                    raise pickle.UnpicklingError("it is a TorchScript program")
                for member in pickles:
                    with archive.open(member) as content:
                        yield from _names_of_one(content)
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            yield from _names_of_one(file)


def _names_of_one(file: IO[bytes]) -> Iterator[str]:
    strings = ["?", "?"]  # STACK_GLOBAL takes two strings pushed before it, as a rule the last ones
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                yield _modern_name(*str(argument).split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                yield _modern_name(*strings)
            elif isinstance(argument, str):
                strings = [strings[1], argument]
    except (ValueError, EOFError, UnicodeDecodeError):
        return  # not a whole pickle: torch finds the same, and runs nothing either


def _modern_name(module: str, name: str) -> str:
    """Names are pickled as Python 2 wrote them (`__builtin__ eval`)."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
