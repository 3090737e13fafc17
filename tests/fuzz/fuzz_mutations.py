"""Damage to files: by chance, and by somebody who knows the formats. Everything follows from the generator given."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

CANARY = "fuzz_canary"
"""A module that does not exist: who tries to import it obeys the file."""
INTEGERS = [
    0,
    1,
    2,
    7,
    8,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    2**70,
]
VALUES: list[Any] = [
    *INTEGERS,
    -1,
    -(2**63),
    1.5,
    1e308,
    True,
    None,
    "",
    "x",
    [],
    {},
    [[]],
    [0, 2**62, 2**62],
    "ü" * 99,
]
DTYPES = ["BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "C64"]
DTYPES += ["F4", "F6_E2M3", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F99", "", "float32", 7, None]


def _string(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def _call(module: str, name: str, argument: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + argument + b"\x85R"


TEXT = _string(f"import {CANARY}".encode())
SNIPPETS: list[bytes] = [
    _call("posix", "system", _string(b"touch fuzz_canary")),
    _call("os", "system", _string(b"touch fuzz_canary")),
    _call("builtins", "exec", TEXT),
    _call("__builtin__", "eval", _string(f"__import__('{CANARY}')".encode())),
    _call(CANARY, "run", TEXT),
    _call(f"torch.{CANARY}", "run", TEXT),
    _call(f"pytorch_lightning.{CANARY}", "Callback", TEXT),
    _call("torch.serialization", "load", TEXT),
    _call("torch", "load", TEXT),
    _call("torch.hub", "load", TEXT),
    _call("_codecs", "encode", TEXT),
    _call("collections", "Counter", TEXT),
    b"(S'import " + CANARY.encode() + b"'\nibuiltins\nexec\n",  # INST
    b"(cbuiltins\nexec\n" + TEXT + b"o",  # OBJ
    b"\x8c\x08builtins\x8c\x04exec\x93" + TEXT + b"\x85R",  # STACK_GLOBAL
    b"\x8c\x04exec\x8c\x08builtins0\x8c\x08builtins\x8c\x04exec\x93" + TEXT + b"\x85R",
    b"ccollections\nOrderedDict\n)\x81}b",  # NEWOBJ, BUILD
    b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00)))t R".replace(b" ", b""),
    b"ctorch._utils\n_rebuild_sparse_tensor\n(K\x00)tR",
    b"ctorch._utils\n_rebuild_qtensor\n(K\x00)tR",
    b"ctorch._utils\n_rebuild_wrapper_subclass\n(K\x00)tR",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(J\xff\xff\xff\x7ft(K\x01t\x89tR",
    b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\n" + TEXT + b"\x85}tR",
    b"ctorch\nTensor\n(J\xff\xff\xff\x7ftR",
    b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R",
    b"ctorch\nSize\n(J\xff\xff\xff\x7ftR",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\xff\xff\xff\x7ftQ",
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\xff\xff\xff\xfftQ",
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x06\x00\x00\x00../../X\x04\x00\x00\x00cudaK\x01tQ",
    b"Pjunk\n",  # PERSID
    b"\x82\x01",  # EXT1
    b"\x8d"
    + struct.pack(
        "<Q", 2**62
    ),  # BINUNICODE8, BINBYTES8, FRAME, BINUNICODE, LONG4 of sizes that are not there
    b"\x8e" + struct.pack("<Q", 2**40),
    b"\x95" + struct.pack("<Q", 2**63 - 1),
    b"X\xff\xff\xff\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\xff",
    b"I" + b"9" * 6000 + b"\n",
    b"\x8a\xff" + b"\x7f" * 255,
    b")" + b"\x85" * 300_000,  # tuples in tuples, alone and as a key
    b"})" + b"\x85" * 300_000 + b"Ns",
    b"(" * 100_000 + b"t" * 100_000,
    b"]" * 50_000 + b"a" * 49_999,
    b"h\xfe",  # GET of what was never put
    b"r\xff\xff\xff\xff",
    b"2" * 50_000,  # DUP
    b"0" * 50,
    b"1",
    b".",
    b"\x80\x7f",
]


def _bits(data: bytearray, random: Random) -> None:
    for _ in range(random.choice([1, 1, 2, 8, 64])):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _bytes(data: bytearray, random: Random) -> None:
    for _ in range(random.choice([1, 3, 20])):
        data[random.randrange(len(data))] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])


def _truncate(data: bytearray, random: Random) -> None:
    del data[
        random.choice([random.randrange(len(data)), len(data) - 1, min(len(data), random.randrange(30))]) :
    ]


def _extend(data: bytearray, random: Random) -> None:
    data += random.choice(
        [bytes(random.randrange(5000)), random.randbytes(random.randrange(1, 99)), data[:500]]
    )


def _cut(data: bytearray, random: Random) -> None:
    start = random.randrange(len(data))
    del data[start : start + random.randrange(1, 200)]


def _copy(data: bytearray, random: Random) -> None:
    start, to = random.randrange(len(data)), random.randrange(len(data))
    data[to:to] = data[start : start + random.randrange(1, 500)]


def _integer(data: bytearray, random: Random) -> None:
    form = random.choice(["<H", "<I", "<Q", ">I"])
    value = random.choice(INTEGERS) % 256 ** struct.calcsize(form)
    at = random.choice([0, random.randrange(len(data))])
    data[at : at + struct.calcsize(form)] = struct.pack(form, value)


def _begin(data: bytearray, random: Random) -> None:
    starts = [
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04",
        b"<html>",
        b"{}",
        b"version https://git-lfs.github.com/spec/",
    ]
    start = random.choice(starts)
    data[: random.choice([0, len(start)])] = start


GENERIC: list[Callable[[bytearray, Random], None]] = [
    _bits, _bits, _bytes, _truncate, _extend, _cut, _copy, _integer, _begin,
]  # fmt: skip


def by_chance(data: bytes, random: Random) -> bytes:
    """Damage that knows nothing of the format."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4])):
        if changed:
            random.choice(GENERIC)(changed, random)
    return bytes(changed)


def spliced(data: bytes, other: bytes, random: Random) -> bytes:
    """The beginning of one file with the end of another."""
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


# ---- safetensors


def header_edited(data: bytes, random: Random) -> bytes:
    """A safetensors file whose header says something else; its own length is right as a rule."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(random.choice([1, 1, 2, 5])):
        _edit_entry(header, random) if random.random() < 0.5 else _edit_metadata(header, random)
    text = json.dumps(header).encode()
    if random.random() < 0.05:
        text = random.choice(
            [b"[" * 200_000, b'{"a":' * 100_000, b"{}", b"", b"null", text + text, b'{"a":' + b"9" * 9999]
        )
    if random.random() < 0.1:
        body = random.choice([b"", body[: len(body) // 2], body + bytes(64), bytes(len(body))])
    claimed = random.choice(INTEGERS) % 2**64 if random.random() < 0.05 else len(text)
    return struct.pack("<Q", claimed) + text + body


def _edit_entry(header: dict[str, Any], random: Random) -> None:
    name = random.choice([key for key in header if key != "__metadata__"] or ["x"])
    entry = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    action = random.randrange(7)
    if action == 0:
        entry["dtype"] = random.choice(DTYPES)
    elif action == 1:
        entry["shape"] = random.choice([*VALUES, [random.choice(VALUES) for _ in range(random.randrange(5))]])
    elif action == 2 and isinstance(entry.get("shape"), list):
        entry["shape"] = [1] * random.choice([1, 40, 3000]) + entry["shape"]
    elif action == 3:
        entry["data_offsets"] = random.choice([*VALUES, [random.choice(INTEGERS), random.choice(INTEGERS)]])
    elif action == 4:
        header[random.choice(["", "x" * 5000, f"xor/{name}", f"index/{name}", "__metadata__", name[:-1]])] = (
            header.pop(name)
        )
    elif action == 5:
        header[f"{name}2"] = entry
    else:
        entry[random.choice([*entry, "x"])] = random.choice(VALUES)


def _edit_metadata(header: dict[str, Any], random: Random) -> None:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not metadata or random.random() < 0.05:
        header["__metadata__"] = random.choice(
            [{}, None, 7, {"mask_format": "1"}, {"patch_format": "1"}, {"a": 1}]
        )
        return
    key = random.choice(sorted(metadata))
    junk = [
        "",
        "NaN",
        "1e999",
        "9" * 6000,
        "[" * 60_000,
        '{"a":' * 60_000,
        "null",
        "{}",
        "[]",
        "sha256:" + "0" * 64,
    ]
    action = random.randrange(4)
    if action == 0:
        del metadata[key]
    elif action == 1:
        metadata[key] = random.choice(junk)
    else:
        try:
            inner = json.loads(metadata[key])
        except (ValueError, RecursionError, TypeError):
            metadata[key] = random.choice(junk)
            return
        metadata[key] = json.dumps(_edited(inner, random))
    metadata.pop("mu.fingerprint", None) if random.random() < 0.1 else None


def _edited(value: Any, random: Random) -> Any:
    """A value of JSON with one node of it replaced, taken away or given twice."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        if random.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return {**value, random.choice([key, key, key, key + "x"]): _edited(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        return [*value[:at], _edited(value[at], random), *value[at + random.choice([1, 1, 0]) :]]
    if isinstance(value, int) and random.random() < 0.4:
        return value + random.choice([-1, 1])
    return random.choice(
        [*VALUES, "float16", "int8", "quint4x2", "bits8", "complex64", "nn", "float4_e2m1fn_x2"]
    )


# ---- pickles, bare and in zip archives


def pickle_edited(data: bytes, random: Random) -> bytes:
    """A pickle (and what follows it) with opcodes put in, taken away, doubled, or given other numbers."""
    at = [0]
    try:
        for _ in range(5):
            stream = io.BytesIO(data)
            stream.seek(at[-1])
            at += [at[-1], *(int(position or 0) for _, _, position in pickletools.genops(stream))][1:]
            at.append(stream.tell())
    except (ValueError, OverflowError, MemoryError):
        pass
    for _ in range(random.choice([1, 1, 2])):
        start, end = sorted((random.choice(at), random.choice(at)))
        action = random.randrange(5)
        if action <= 1:
            data = data[:start] + random.choice(SNIPPETS) + data[start:]
        elif action == 2:
            data = data[:start] + _number(random) + data[start:].lstrip(b"KMJ")[1:]
        elif action == 3:
            data = data[:start] + data[end if end - start < 60 else start + 1 :]
        else:
            data = data[:start] + data[start:end] + data[start:]
    return data


def _number(random: Random) -> bytes:
    value = random.choice(INTEGERS)
    if random.random() < 0.5:
        return b"J" + struct.pack("<I", value % 2**32)
    raw = value.to_bytes(10, "little")
    return b"\x8a" + bytes([len(raw)]) + raw


def zip_edited(data: bytes, random: Random) -> bytes:
    """A torch file in which a pickle, a record, or the archive itself is another."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    compression = random.choice(
        [zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in members:
            if name.endswith("data.pkl") and random.random() < 0.8:
                content = pickle_edited(content, random)
            elif random.random() < 0.05:
                content = random.choice(
                    [b"", content[:-1], content * 2, bytes(3_000_000), random.randbytes(9), b"\xff" * 8]
                )
            if random.random() < 0.02:
                name = random.choice(
                    ["", "../x", "x/data.pkl", "a/b.pkl", "x/constants.pkl", name + "x", "/abs", "x" * 300]
                )
            if random.random() > 0.02:
                archive.writestr(zipfile.ZipInfo(name), content, compression)
    result = bytearray(packed.getvalue())
    if random.random() < 0.3:
        _edit_directory(result, random)
    return bytes(result)


def _edit_directory(data: bytearray, random: Random) -> None:
    """Another size, method, flag or place of a record in the archive's directory."""
    signature = random.choice([b"PK\x01\x02", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"])
    places = [at for at in range(len(data)) if data[at : at + 4] == signature]
    if places:
        at = random.choice(places) + random.choice([4, 6, 8, 10, 12, 16, 20, 24, 26, 28, 30, 42])
        form = random.choice(["<H", "<I"])
        data[at : at + struct.calcsize(form)] = struct.pack(
            form, random.choice([*INTEGERS, 12, 14, 99]) % 2**16 or 1
        )


def mutated(data: bytes, other: bytes, random: Random) -> bytes:
    """A file from a valid one: one or two kinds of damage that fit it."""
    kinds: list[Callable[[bytes, Random], bytes]] = [by_chance]
    if data[:4] == b"PK\x03\x04":
        kinds += [zip_edited, zip_edited, zip_edited]
    elif data[:1] == b"\x80":
        kinds += [pickle_edited, pickle_edited]
    else:
        kinds += [header_edited, header_edited, header_edited]
    data = random.choice(kinds)(data, random)
    if random.random() < 0.1:
        data = spliced(data, other, random)
    return by_chance(data, random) if random.random() < 0.1 else data
