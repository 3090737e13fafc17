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
# torch.save compresses nothing, so even a zip that was packed again unpacks to little more than its size.
_MOST_UNPACKED = 16
# Tuples within tuples; real checkpoints have three or four. To hash a million of them overflows the C stack.
_DEEPEST = 100
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


def load_pickle(path: Path, *, mapped: bool = False) -> Any:
    """The object in a file of `torch.save`, in its zip or its old format, on the CPU.

    Args:
        mapped: the values of tensors stay on disk until they are read; for the zip format alone.

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
    # The file object keeps torch from going by the suffix; to map a file, it needs the name.
    with path.open("rb") as file, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols and TorchScript: errors say that afterwards
        try:
            source = str(path) if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
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
    """Every `module.name` that the pickles of a file ask for, read off the opcodes without running them.

    Raises:
        pickle.UnpicklingError: the file is another kind of zip archive, would unpack to far more than its size, claims
            a text longer than itself, or nests tuples so deep that hashing them would end the process.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
                if unpacked > _MOST_UNPACKED * size:
                    raise pickle.UnpicklingError(
                        f"its {size:,} bytes would unpack to {unpacked:,}: a zip bomb"
                    )
                pickles = [member for member in archive.namelist() if member.endswith(".pkl")]
                if not pickles:
                    raise pickle.UnpicklingError("it is another kind of zip archive: unpack it first")
                if any(member.endswith("/constants.pkl") for member in pickles):
                    raise pickle.UnpicklingError("it is a TorchScript program")
                for member in pickles:
                    with archive.open(member) as content:
                        yield from _names_of_one(content, unpacked)
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            yield from _names_of_one(file, size)


def _names_of_one(file: IO[bytes], size: int) -> Iterator[str]:
    strings = ["?", "?"]  # STACK_GLOBAL takes two strings pushed before it, as a rule the last ones
    tuples = _TupleDepths()
    try:
        for opcode, argument, _ in pickletools.genops(_Bounded(file, size)):  # type: ignore[arg-type]
            tuples.see(opcode, argument)
            if opcode.name in ("GLOBAL", "INST"):
                yield _modern_name(*str(argument).split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                yield _modern_name(*strings)
            elif isinstance(argument, str):
                strings = [strings[1], argument]
    except (ValueError, EOFError, UnicodeDecodeError):
        return  # not a whole pickle: torch finds the same, and runs nothing either


class _Bounded:
    """A stream for pickletools that is not asked for more bytes than there can be: Python would allocate them first."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise pickle.UnpicklingError(
                f"its pickle claims a value of {count:,} bytes, more than the file has"
            )
        return self._file.read(count)


class _TupleDepths:
    """How deep tuples lie in tuples, followed on the stack of a pickle's opcodes without building anything."""

    def __init__(self) -> None:
        self._stack: list[int | None] = []  # the depth of each object, 0 for what is no tuple; None: a mark
        self._memo: dict[Any, int | None] = {}

    def see(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Raises pickle.UnpicklingError beyond the deepest that is read."""
        name, taken, left = opcode.name, opcode.stack_before, opcode.stack_after
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            key = len(self._memo) if name == "MEMOIZE" else argument
            self._memo[key] = self._stack[-1] if self._stack else 0
            return
        if name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo.get(argument, 0))
            return
        items: list[int | None] = []
        if pickletools.markobject in taken:
            while self._stack and (item := self._stack.pop()) is not None:
                items.append(item)
            below = taken.index(pickletools.markobject)
        else:
            below = len(taken)
        for _ in range(min(below, len(self._stack))):
            items.append(self._stack.pop())
        depth = max((item or 0 for item in items), default=0)
        if name == "MARK":
            self._stack.append(None)
        elif name.startswith("TUPLE"):
            self._stack.append(depth + 1)
        else:
            self._stack += [depth if name == "DUP" else 0] * len(left)
        if depth > _DEEPEST:
            raise pickle.UnpicklingError(f"its pickle has tuples in tuples, more than {_DEEPEST} deep")


def _modern_name(module: str, name: str) -> str:
    """Names are pickled as Python 2 wrote them (`__builtin__ eval`)."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
