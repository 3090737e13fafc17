"""Dictionaries of tensors on disk: `.safetensors`, and what `torch.save` writes. Read safely, written atomically.

A file is recognised by its first bytes, so a wrong suffix does no harm. What is written here carries a SHA-256 of its
tensors, which is checked when it is read again.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mu.atomic import WriteError, written_beside
from mu.errors import MuError, first_line
from mu.ldm.safe_pickle import UnsafePickleError, load_pickle

PICKLE_SUFFIXES = (".ckpt", ".pth", ".pt")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
FINGERPRINT_KEY = "mu.fingerprint"
"""Metadata key of the SHA-256 that files written here carry."""
Reader = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
"""`read_state_dict`; or `open_state_dict` or `read_layout`, which do not read all values."""
_STATE_DICT_KEYS = ("state_dict", "model_state_dict")
MOST_DIMENSIONS = 64
"""Of a tensor with which torch and numpy can do anything."""
_MOST_DECLARED = 16
"""Bytes of tensors for each byte of a pickled file: several names may share a storage, but not a terabyte's worth."""
_AGAIN = "get the file again, and compare its size and SHA-256 with those of its source"


class CheckpointError(MuError, ValueError):
    """A checkpoint is missing, damaged, unsafe, of another model, or could not be written."""


def fingerprint(
    named_tensors: Mapping[str, Tensor], *, dtypes: Mapping[str, torch.dtype] | None = None
) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names.

    Args:
        named_tensors: name -> tensor, on any device.
        dtypes: name -> dtype to hash the values in, as a rule a model's `file_dtypes`: then a model that was
            loaded into fp32 from an fp16 file has the fingerprint of what was in the file. Names that it lacks
            keep their tensor's dtype.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(named_tensors):
        tensor = named_tensors[name].detach()
        tensor = tensor.to(device="cpu", dtype=(dtypes or {}).get(name, tensor.dtype)).contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # the tensor's memory, not a copy
    return f"sha256:{digest.hexdigest()}"


def is_shape(value: object) -> bool:
    """Whether a value that was read as JSON is the shape of a tensor that can be, with or without entries."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_DIMENSIONS
        and all(type(side) is int and side >= 0 for side in value)
        and math.prod(side or 1 for side in value) < 2**63
    )


# ---- read


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a checkpoint, on the CPU, in the file's dtypes.

    Args:
        path: `.safetensors`, or a file of `torch.save` (zip or old format) that holds a state dict, bare or under
            `state_dict` or `model_state_dict`.

    Returns:
        The tensors by name, and the file's metadata: safetensors' own, or the plain values beside `state_dict`.

    Raises:
        CheckpointError: there is no such file; it is empty, truncated, a web page, a Git-LFS pointer or otherwise no
            checkpoint; its pickle asks for a name that is not known to be harmless (nothing of it is run); it holds no
            state dict; its content differs from the SHA-256 it carries.
    """
    path = Path(path)
    tensors, metadata = _opened(path, mapped=False)
    expected = metadata.get(FINGERPRINT_KEY)
    if expected is not None and fingerprint(tensors) != expected:
        raise CheckpointError(
            f"{path}: the tensors do not have the SHA-256 that the file carries ({expected}): it is damaged, or "
            f"was edited by a program that kept the old metadata; {_AGAIN}"
        )
    return tensors, metadata


def read_layout(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names, shapes and dtypes of a checkpoint's tensors, which are on the meta device: their values are not read.

    Raises:
        CheckpointError: see `open_state_dict`.
    """
    tensors, metadata = open_state_dict(path)
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}, metadata


def open_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_state_dict`, but a value is read from the disk when it is used, and no SHA-256 is compared.

    Only a file in torch's old format, which cannot be read otherwise, is read whole.

    Raises:
        CheckpointError: as `read_state_dict`, but for values that are not those that were written.
    """
    return _opened(Path(path), mapped=True)


def _opened(path: Path, *, mapped: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata; `mapped` matters for torch's zip format, safetensors always are."""
    try:
        if _recognise(path) == "safetensors":
            return _read_safetensors(path)
        return _read_pickle(path, mapped=mapped and zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _recognise(path: Path) -> str:
    """The kind, "safetensors" or "pickle", by the first bytes. An error says what else the file is."""
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; give the path of a checkpoint file ({', '.join(SUFFIXES)})"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file")
    if not path.is_file():  # to read a pipe might wait for ever
        raise CheckpointError(f"{path} is a pipe or device, not a file")
    with path.open("rb") as file:
        head = file.read(512)
    # First the length of the header in 8 bytes, whose lower ones may look like any other format; then the header.
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes): a copy or download did not finish; {_AGAIN}")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointError(
            f"{path} is a Git-LFS pointer of {path.stat().st_size} bytes, not the file it stands for; "
            "run `git lfs pull` in its repository, or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise CheckpointError(
            f"{path} is a web page (HTML or XML), not a checkpoint: the download got a login, quota or error page; "
            "open the link in a browser to see it, and get the file itself"
        )
    if text.startswith((b'{"', b"{'")):
        raise CheckpointError(
            f"{path} is JSON text, not a checkpoint: perhaps a server's error message; {_AGAIN}"
        )
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in PICKLE_SUFFIXES and head[:1] in b"(}]c":  # pickle's protocols 0 and 1
        return "pickle"
    raise CheckpointError(f"{path} is not a checkpoint: it begins with {head[:16]!r}; {_AGAIN}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    missing = _missing_bytes(path)
    if missing:
        raise CheckpointError(f"{path} is truncated: {missing:,} bytes are missing at its end; {_AGAIN}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}; {_AGAIN}") from error


def _missing_bytes(path: Path) -> int:
    """How many bytes a safetensors file is shorter than its header says; 0 where the header itself is not sound."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return 8 - len(prefix)
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > 100_000_000:  # safetensors' own limit
            return 0
        if 8 + header_bytes > size:
            return int(8 + header_bytes - size)
        try:
            entries = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
            return 0
    if not all(isinstance(end, int) for end in ends):
        return 0
    return max(0, 8 + int(header_bytes) + max(ends, default=0) - size)


def _read_pickle(path: Path, *, mapped: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        content = load_pickle(path, mapped=mapped)
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{path} is refused, and nothing of it was run: its pickle asks for {error}, which no weights need and "
            "which could run code. Get the checkpoint as .safetensors; or, if you trust its author, load it "
            "elsewhere and write its bare state dict with torch.save"
        ) from None
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()
        raise CheckpointError(
            f"{path} is not a checkpoint that is read here: {reason}; needed is a state dict, written with torch.save"
        ) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is truncated: the end of its zip archive is missing; {_AGAIN}"
        ) from error
    # all of them seen from zipfile or torch.load on damaged content
    except (
        EOFError,
        MemoryError,
        OverflowError,
        struct.error,
        zlib.error,
        lzma.LZMAError,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({first_line(error)}); {_AGAIN}") from error
    return _tensors_of(content, path)


def _flat(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Two forms that are no state dict, as one: module -> its state dict, as ESD writes what it trained; and the words
    of a textual inversion, which lie under `string_to_param`.
    """
    words = content.get("string_to_param")
    if isinstance(words, Mapping):
        return {f"string_to_param.{word}": vector for word, vector in words.items()}
    if content and all(
        isinstance(name, str)
        and name not in _STATE_DICT_KEYS
        and isinstance(module, Mapping)
        and module
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in module.items())
        for name, module in content.items()
    ):
        return {f"{name}.{key}": tensor for name, module in content.items() for key, tensor in module.items()}
    return content


def _tensors_of(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict inside a pickled object, and the plain values beside it as strings."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict (name -> tensor)")
    content = _flat(content)
    nested = next((key for key in _STATE_DICT_KEYS if key in content), None)
    state_dict = content if nested is None else content[nested]
    if not (isinstance(state_dict, Mapping) and any(isinstance(v, Tensor) for v in state_dict.values())):
        keys = ", ".join(repr(key) for key in list(content)[:5])
        raise CheckpointError(f"{path} holds no state dict; its top-level keys are {keys or 'none'}")
    metadata = {
        key: str(value)
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, (str, int, float))
    }
    tensors: dict[str, Tensor] = {}
    size, declared = path.stat().st_size, 0
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            if value.is_meta or value.layout is not torch.strided:
                raise CheckpointError(f"{path}: {name} is not a dense tensor with values")
            tensors[name] = value.detach()
            declared += value.nbytes
            if declared > _MOST_DECLARED * size:
                raise CheckpointError(
                    f"{path}: its tensors claim more than {_MOST_DECLARED} times the {size:,} bytes that the file has; "
                    f"{_AGAIN}"
                )
        elif state_dict is not content or not isinstance(value, (str, int, float)):
            raise CheckpointError(
                f"{path}: the state dict's entry {name!r} is a {type(value).__name__}, not a tensor"
            )
    return tensors, metadata


# ---- write


def write_state_dict(
    state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors so that `path` is always whole: the old file or the new one, also after a kill or on a full disk.

    See `mu.atomic.written_beside`. The same tensors and metadata give the same safetensors file, to the byte.

    Args:
        state_dict: name -> dense tensor, on any device; written in its own dtype.
        path: `.safetensors`, or `.ckpt`, `.pth`, `.pt` (then under the key `state_dict`).
        metadata: written into safetensors' header, or beside `state_dict`.

    Raises:
        CheckpointError: unknown suffix; a tensor without data; the file could not be written (then the
            temporary file is removed and the previous file is as it was).
    """
    path = Path(path)
    _check_suffix(path, SUFFIXES)
    if "state_dict" in (metadata or {}):
        raise CheckpointError(f"{path}: metadata must not have a key `state_dict`")
    tensors = _own_storages(state_dict, path)
    described = {"format": "pt", **(metadata or {}), FINGERPRINT_KEY: fingerprint(tensors)}
    _write(tensors, path, described, pickled={"state_dict": tensors, **described})


def write_bare_state_dict(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors and nothing else, as programs expect that load a file straight into a network.

    A `.pt`, `.pth` or `.bin` file holds the dictionary itself, a `.safetensors` file no metadata but its format.

    Raises:
        CheckpointError: as `write_state_dict`.
    """
    path = Path(path)
    _check_suffix(path, (".pt", ".pth", ".bin", ".safetensors"))
    tensors = _own_storages(state_dict, path)
    _write(tensors, path, {"format": "pt"}, pickled=tensors)


def _check_suffix(path: Path, known: tuple[str, ...]) -> None:
    if path.suffix not in known:
        raise CheckpointError(f"{path}: the suffix {path.suffix!r} is not known; known: {', '.join(known)}")


def _write(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str], *, pickled: Mapping[str, Any]
) -> None:
    """Write safetensors with their metadata, or `pickled`, as the suffix says."""
    try:
        with written_beside(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
            try:
                if path.suffix == ".safetensors":
                    save_file(dict(tensors), temporary, metadata=metadata)
                    _sort_metadata(temporary)
                else:
                    torch.save(dict(pickled), temporary)
            except (RuntimeError, SafetensorError) as error:  # so they tell of a disk that is full
                raise OSError(str(error)) from error
    except WriteError as error:
        raise CheckpointError(str(error)) from error


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file into the order of its names: safetensors leaves it to chance.

    Then files of equal content are equal to the byte. The header is as long as before.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
        entries = json.loads(header)
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        ordered = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise OSError("the header of the safetensors file changed its length")
        file.seek(8)
        file.write(ordered.ljust(length))


def _own_storages(state_dict: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, and none is a part of more."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state_dict.items():
        if tensor.is_meta or tensor.layout is not torch.strided:
            what = "on the meta device, without values" if tensor.is_meta else f"{tensor.layout}, not dense"
            raise CheckpointError(f"{path}: cannot write {name}: the tensor is {what}")
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    return tensors
