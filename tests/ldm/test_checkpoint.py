"""What users may rely on when weights are read and written. Files are damaged, processes killed, disks filled."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mu.ldm import CheckpointError, LatentDiffusion, load_model, save_checkpoint
from mu.ldm.checkpoint import load_state_dict
from mu.ldm.tensor_file import fingerprint, read_state_dict, write_state_dict
from tests.forked_commands import Commands

SUFFIXES = [".ckpt", ".pth", ".pt", ".safetensors"]
ModelMaker = Callable[..., LatentDiffusion]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert left[key].shape == right[key].shape, key
        assert bits(left[key]) == bits(right[key]), key


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "a.half": torch.randn(3, generator=generator).half(),
        "b.bf16": torch.randn(2, 2, 2, generator=generator).bfloat16(),
        "b.scalar": torch.tensor(3.5),
        "b.steps": torch.arange(4),
        "c.empty": torch.zeros(0, 3),
    }


# ---- reading and writing ----


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new folder" / f"model{suffix}"
    write_state_dict(some_tensors(), path, {"concept": "Cats"})
    tensors, metadata = read_state_dict(path)
    assert_same_bits(tensors, some_tensors())
    assert metadata["concept"] == "Cats"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_programs_read_what_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_state_dict(some_tensors(), tmp_path / "m.safetensors")
    write_state_dict(some_tensors(), tmp_path / "m.ckpt")
    assert_same_bits(load_file(tmp_path / "m.safetensors"), some_tensors())
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert_same_bits(content["state_dict"], some_tensors())


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_both_formats_of_torch_save_bare_or_nested(tmp_path: Path, zip_format: bool, nested: bool) -> None:
    content = {"state_dict": some_tensors(), "global_step": 7} if nested else some_tensors()
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zip_format)
    tensors, metadata = read_state_dict(tmp_path / "m.ckpt")
    assert_same_bits(tensors, some_tensors())
    assert metadata == ({"global_step": "7"} if nested else {})


@pytest.mark.parametrize("header_bytes", [ord("<"), ord("{"), 0x80, ord("v"), ord("P")])
def test_safetensors_is_recognised_whatever_its_length_looks_like(tmp_path: Path, header_bytes: int) -> None:
    # The file begins with its header's length, whose lowest byte may be the first byte of another format.
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header = header.ljust(header_bytes if header_bytes > len(header) else header_bytes + 256)
    assert len(header) % 256 == header_bytes
    values = struct.pack("<ff", 1.0, 2.0)
    (tmp_path / "renamed.ckpt").write_bytes(struct.pack("<Q", len(header)) + header + values)
    assert read_state_dict(tmp_path / "renamed.ckpt")[0]["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_views_and_shared_tensors_are_written_whole_and_small(tmp_path: Path, suffix: str) -> None:
    base = torch.arange(100_000.0).reshape(100, 1000)
    tied = torch.ones(50)
    tensors = {"row": base[3], "column": base[:, 5], "t": base[:4, :6].T, "tied": tied, "also": tied}
    write_state_dict(tensors, tmp_path / f"m{suffix}")
    read, _ = read_state_dict(tmp_path / f"m{suffix}")
    assert_same_bits(read, tensors)
    assert (tmp_path / f"m{suffix}").stat().st_size < 20_000  # not the 400,000 bytes of the base


def test_a_new_file_has_the_permissions_of_the_umask_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    old_mask = os.umask(0o027)
    try:
        write_state_dict(some_tensors(), path)
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o600)
        write_state_dict(some_tensors(), path)
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old_mask)


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "real.ckpt")
    write_state_dict(some_tensors(), tmp_path / "link.ckpt")
    assert (tmp_path / "link.ckpt").is_symlink()
    assert_same_bits(read_state_dict(tmp_path / "real.ckpt")[0], some_tensors())


def test_a_suffix_that_is_not_known_and_tensors_without_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'\.bin' is not known; known: \.ckpt"):
        write_state_dict(some_tensors(), tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"cannot write x: the tensor is on the meta device"):
        write_state_dict({"x": torch.zeros(2, device="meta")}, tmp_path / "m.ckpt")
    assert list(tmp_path.iterdir()) == []


# ---- fingerprint ----


def test_fingerprint_is_that_of_names_dtypes_shapes_and_values() -> None:
    tensors = some_tensors()
    same = fingerprint(tensors)
    assert same == fingerprint({name: tensors[name].clone() for name in reversed(tensors)})
    changed = [
        {**tensors, "a.weight": tensors["a.weight"] + 0.0 * tensors["a.weight"] + 1e-7},
        {**tensors, "a.weight": tensors["a.weight"].reshape(7, 5)},
        {**tensors, "a.half": tensors["a.half"].view(torch.bfloat16)},
        {**{k: v for k, v in tensors.items() if k != "a.weight"}, "a.weights": tensors["a.weight"]},
    ]
    assert len({same, *map(fingerprint, changed)}) == 5
    assert same.startswith("sha256:")
    assert len(same) == len("sha256:") + 64


def test_fingerprint_does_not_depend_on_the_dtype_in_memory(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    half = {key: value.half() for key, value in tiny_model.state_dict().items()}
    write_state_dict(half, tmp_path / "half.safetensors")
    models = [
        load_model(tiny_yaml, tmp_path / "half.safetensors", dtype=d) for d in (torch.float32, torch.float16)
    ]
    of_unets = {
        fingerprint(
            model.unet.state_dict(),
            dtypes={k.removeprefix("model.diffusion_model."): d for k, d in model.file_dtypes.items()},
        )
        for model in models
    }
    prefix = "model.diffusion_model."
    of_file = fingerprint({k.removeprefix(prefix): v for k, v in half.items() if k.startswith(prefix)})
    assert of_unets == {of_file}


# ---- files that are refused (PROMISES 1 to 4) ----


class RunsCode:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class Evaluates(RunsCode):
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


@pytest.mark.parametrize("form", ["zip", "zip named safetensors", "old", "protocol 0", "protocol 4"])
@pytest.mark.parametrize(("payload", "name"), [(RunsCode, r"posix\.system"), (Evaluates, r"builtins\.eval")])
def test_promise_01_a_pickle_that_would_run_code_is_refused_by_name(
    tmp_path: Path, form: str, payload: type[RunsCode], name: str
) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / ("m.safetensors" if "safetensors" in form else "m.ckpt")
    content = {"state_dict": some_tensors(), "callbacks": [payload(mark)]}
    if form.startswith("protocol"):
        path.write_bytes(pickle.dumps({"callbacks": payload(mark)}, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(CheckpointError, match=f"nothing of it was run: its pickle asks for {name}"):
        read_state_dict(path)
    assert not mark.exists()
    if form == "zip":  # the file is not harmless in itself
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_a_name_under_torch_is_refused_too(tmp_path: Path) -> None:
    class Loads:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return torch.load, ("other.pt",)

    torch.save({"state_dict": some_tensors(), "x": Loads()}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"asks for torch\.serialization\.load"):
        read_state_dict(tmp_path / "m.ckpt")


def test_an_allowance_made_by_another_program_part_is_not_used(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": some_tensors(), "x": Evaluates(mark)}, tmp_path / "m.ckpt")
    with torch.serialization.safe_globals([eval]), pytest.raises(CheckpointError, match=r"builtins\.eval"):
        read_state_dict(tmp_path / "m.ckpt")
    assert not mark.exists()


@pytest.mark.parametrize("zip_format", [True, False])
def test_promise_02_lightning_objects_are_read_past_without_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zip_format: bool
) -> None:
    def pretend(module: str, name: str, base: type = object) -> type:
        made = type(name, (base,), {"__module__": module})
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], name, made)
        return made

    with monkeypatch.context() as monkeypatch:
        checkpoint = pretend("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
        attributes = pretend("lightning.utilities.parsing", "AttributeDict", dict)
        config = pretend("omegaconf.dictconfig", "DictConfig")
        callback, node = checkpoint(), config()
        callback.best_model_score = torch.ones(3)
        node._content = {"lr": 0.1}
        content = {
            "epoch": 3,
            "callbacks": {checkpoint: {"best": callback}},
            "hyper_parameters": attributes(base_lr=1e-4, config=node),
            "state_dict": some_tensors(),
        }
        torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zip_format)
    # The pretended modules are gone: nothing may look them up.
    before = set(torch.serialization.get_safe_globals())
    tensors, metadata = read_state_dict(tmp_path / "m.ckpt")
    assert_same_bits(tensors, some_tensors())
    assert metadata["epoch"] == "3"
    assert set(torch.serialization.get_safe_globals()) == before


def test_promise_02_a_lightning_object_is_not_run_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    module = types.ModuleType("pytorch_lightning")
    module.run = lambda command: os.system(command)  # type: ignore[attr-defined]
    module.run.__module__, module.run.__qualname__ = module.__name__, "run"
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Calls:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return module.run, (f"touch {mark}",)  # type: ignore[attr-defined]

    torch.save({"state_dict": some_tensors(), "x": Calls()}, tmp_path / "m.ckpt")
    assert_same_bits(read_state_dict(tmp_path / "m.ckpt")[0], some_tensors())
    assert not mark.exists()


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 123\n"
)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>", "web page"),
        (b"\n  <html><body>404</body></html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (LFS_POINTER, "Git-LFS pointer.*git lfs pull"),
    ],
)
def test_promise_03_what_is_no_checkpoint_is_called_by_its_name(
    tmp_path: Path, suffix: str, content: bytes, says: str
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"{path.name} is.*{says}" if not says.startswith("is") else says
    ):
        read_state_dict(path)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_promise_03_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("m.safetensors" if form == "safetensors" else "m.ckpt")
    if form == "safetensors":
        write_state_dict(some_tensors(), path)
    else:
        torch.save({"state_dict": some_tensors()}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for length in sorted({10, 100, len(whole) // 3, len(whole) // 2, len(whole) - 40, len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated.*get the file again"):
            read_state_dict(path)


def test_a_folder_a_missing_file_another_archive_and_another_object(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing\.ckpt: there is no such file"):
        read_state_dict(tmp_path / "nothing.ckpt")
    with zipfile.ZipFile(tmp_path / "compvis.zip", "w") as archive:
        archive.writestr("style50/compvis.ckpt", b"weights")
    with pytest.raises(CheckpointError, match="unpack it first"):
        read_state_dict(tmp_path / "compvis.zip")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "jit.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_state_dict(tmp_path / "jit.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 1}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds no state dict; its top-level keys are 'model', 'epoch'"):
        read_state_dict(tmp_path / "model.pt")
    torch.save({"state_dict": {"a": torch.zeros(1), "b": [1]}}, tmp_path / "mixed.pt")
    with pytest.raises(CheckpointError, match="entry 'b' is a list, not a tensor"):
        read_state_dict(tmp_path / "mixed.pt")


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        json.dumps(entry(shape=[3])),
        json.dumps(entry(dtype="F99")),
        json.dumps(entry(data_offsets=[4, 12])),
        json.dumps(entry(data_offsets=[8, 0])),
        json.dumps(entry(data_offsets="all")),
        json.dumps({"a": 1}),
        "[1, 2]",
        "{" * 40,
        "\xff\xfe" * 20,
    ],
)
def test_promise_04_malformed_safetensors_is_a_clean_error(tmp_path: Path, header: str) -> None:
    raw = header.encode("latin-1")
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(CheckpointError, match=r"m\.safetensors is (not a valid safetensors file|truncated)"):
        read_state_dict(path)
    path.write_bytes(struct.pack("<Q", 1 << 50) + raw)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_promise_04_a_flipped_bit_is_found_in_a_file_written_here(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    tensors = {"w": torch.linspace(1, 2, 1000)}
    write_state_dict(tensors, path)
    content = bytearray(path.read_bytes())
    at = content.find(tensors["w"][500:510].numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not have the SHA-256 that the file carries"):
        read_state_dict(path)


# ---- keys (PROMISES 5) ----


def test_weights_keep_the_dtype_of_the_file(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    # UNet in fp16, text encoder in bf16, autoencoder in fp32; trained in fp32.
    dtypes = {"model": torch.float16, "cond_stage_model": torch.bfloat16, "first_stage_model": torch.float32}
    in_file = {
        k: v.to(dtypes.get(k.split(".")[0], torch.float32)) for k, v in tiny_model.state_dict().items()
    }
    write_state_dict(in_file, tmp_path / "in.ckpt")
    model = load_model(tiny_yaml, tmp_path / "in.ckpt")
    assert model.unet.input_blocks[0][0].weight.dtype == torch.float32
    changed = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    with torch.no_grad():
        model.get_parameter(changed)[0, 0] += 1.0
    for suffix in SUFFIXES:
        save_checkpoint(model, tmp_path / f"out{suffix}")
        written, _ = read_state_dict(tmp_path / f"out{suffix}")
        assert written[changed].dtype == torch.float16
        assert not torch.equal(written[changed], in_file[changed])
        assert_same_bits(
            {k: v for k, v in written.items() if k != changed},
            {k: v for k, v in in_file.items() if k != changed},
        )


def test_a_half_precision_file_does_not_coarsen_the_schedule(
    tmp_path: Path, tiny_yaml: Path, tiny_model: LatentDiffusion
) -> None:
    write_state_dict({k: v.half() for k, v in tiny_model.state_dict().items()}, tmp_path / "half.ckpt")
    model = load_model(tiny_yaml, tmp_path / "half.ckpt")
    assert torch.equal(model.alphas_cumprod, tiny_model.alphas_cumprod)
    assert not torch.equal(model.alphas_cumprod.half().float(), model.alphas_cumprod)


def test_the_schedule_of_an_fp32_file_is_kept_to_the_bit(tmp_path: Path, tiny_model: LatentDiffusion) -> None:
    given = dict(tiny_model.state_dict())
    given["betas"] = torch.nextafter(given["betas"], torch.tensor(1.0))  # another program's rounding
    load_state_dict(tiny_model, given, source="m.ckpt")
    save_checkpoint(tiny_model, tmp_path / "out.safetensors")
    assert_same_bits(read_state_dict(tmp_path / "out.safetensors")[0], given)


def test_another_schedule_is_refused(tiny_model: LatentDiffusion, make_tiny_model: ModelMaker) -> None:
    other = make_tiny_model(linear_start=0.0001, linear_end=0.02)
    with pytest.raises(CheckpointError, match=r"m\.ckpt: the noise schedule.*linear_start"):
        load_state_dict(tiny_model, other.state_dict(), source="m.ckpt")


def test_promise_05_keys_that_may_be_absent_or_ignored(
    tiny_model: LatentDiffusion, make_tiny_model: ModelMaker
) -> None:
    full = {k: v.clone() for k, v in make_tiny_model(seed=1).state_dict().items()}
    given = {k: v for k, v in full.items() if v.shape != (1000,)}
    assert len(full) - len(given) == 12
    given |= {
        "model_ema.decay": torch.tensor(0.99),
        "model_ema.num_updates": torch.tensor(5),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(32, 4, 3, 3),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.logit_scale": torch.tensor(float("inf")),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    load_state_dict(tiny_model, given, source="m.ckpt")
    assert_same_bits(dict(tiny_model.state_dict()), full)
    assert "model_ema.decay" not in tiny_model.file_dtypes


def test_text_encoder_names_of_newer_transformers(
    tiny_model: LatentDiffusion, make_tiny_model: ModelMaker
) -> None:
    full = make_tiny_model(seed=1).state_dict()
    given = {k.replace("transformer.text_model.", "transformer."): v for k, v in full.items()}
    assert given.keys() != full.keys()
    load_state_dict(tiny_model, given, source="m.ckpt")
    assert_same_bits(dict(tiny_model.state_dict()), dict(full))


def test_promise_05_keys_that_do_not_fit_are_listed_and_nothing_is_loaded(
    tiny_model: LatentDiffusion,
) -> None:
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    given = {k: v + 1 for k, v in before.items() if v.shape != (1000,)}
    prefix = "model.diffusion_model."
    for i in (1, 3):
        del given[f"{prefix}output_blocks.{i}.0.in_layers.0.weight"]
    for i in range(8):
        given[f"surprise.{i}"] = torch.zeros(1)
    given[f"{prefix}out.2.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(tiny_model, given, source="m.ckpt")
    message = str(caught.value)
    assert "m.ckpt is not a checkpoint of this model" in message
    assert f"2 missing ({prefix}output_blocks.1.0.in_layers.0.weight, " in message
    assert "8 unexpected (surprise.0, surprise.1, surprise.2, surprise.3, surprise.4, ...)" in message
    assert f"1 of another shape ({prefix}out.2.bias: (5,) in the file, (4,) in the model)" in message
    assert_same_bits(dict(tiny_model.state_dict()), before)


@pytest.mark.parametrize("tower", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_promise_05_every_single_weight_must_be_there(tiny_model: LatentDiffusion, tower: str) -> None:
    full = dict(tiny_model.state_dict())
    for key in [key for key in full if key.startswith(tower)][::10]:
        with pytest.raises(CheckpointError, match="1 missing"):
            load_state_dict(tiny_model, {k: v for k, v in full.items() if k != key}, source="m.ckpt")


def test_a_checkpoint_of_another_model_is_refused(
    tiny_yaml: Path, tmp_path: Path, make_tiny_model: ModelMaker
) -> None:
    save_checkpoint(make_tiny_model(unconditional=True), tmp_path / "unconditional.ckpt")
    with pytest.raises(CheckpointError, match=r"unconditional\.ckpt is .* without its text encoder"):
        load_model(tiny_yaml, tmp_path / "unconditional.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_read_nor_written(
    tmp_path: Path, tiny_model: LatentDiffusion, value: float
) -> None:
    bad = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    key = "first_stage_model.decoder.conv_in.weight"
    bad[key][0, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match=f"{key} holds NaN or Inf"):
        load_state_dict(tiny_model, bad, source="m.ckpt")
    with torch.no_grad():
        tiny_model.get_parameter(key)[0, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match=f"not written: {key} holds NaN or Inf"):
        save_checkpoint(tiny_model, tmp_path / "m.ckpt")
    assert not (tmp_path / "m.ckpt").exists()


def test_a_weight_too_large_for_the_file_is_not_written(tmp_path: Path, tiny_model: LatentDiffusion) -> None:
    load_state_dict(tiny_model, {k: v.half() for k, v in tiny_model.state_dict().items()}, source="half.ckpt")
    with torch.no_grad():
        tiny_model.unet.out[2].bias[0] = 1e5
    with pytest.raises(
        CheckpointError, match=r"out\.2\.bias holds NaN or Inf \(too large for torch\.float16\)"
    ):
        save_checkpoint(tiny_model, tmp_path / "m.ckpt")


# ---- kills and full disks (PROMISES 15 and 16) ----


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path, suffix: str, commands: Commands) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    path = folder / f"m{suffix}"
    process = commands.call("write_forever", str(path), tmp_path / "result")
    while not path.exists():
        assert process.poll() is None, process.output()
        time.sleep(0.01)
    caught_in_the_middle, looks, deadline = 0, 0, time.monotonic() + 300
    while caught_in_the_middle < 4 and time.monotonic() < deadline:
        time.sleep(0.002 + 0.0017 * (looks % 11))
        looks += 1
        os.kill(process.pid, signal.SIGSTOP)  # what is on disk now is what a kill at this moment leaves
        caught_in_the_middle += len(list(folder.iterdir())) > 1
        tensors, _ = read_state_dict(path)
        assert len({tensor[i].item() for tensor in tensors.values() for i in (0, -1)}) == 1
        os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.wait()
    assert caught_in_the_middle == 4
    version = {tensor[0].item() for tensor in read_state_dict(path)[0].values()}
    assert len(version) == 1
    write_state_dict({"after": torch.zeros(1)}, path)
    assert list(read_state_dict(path)[0]) == ["after"]


def assert_a_failed_save_harms_nothing(folder: Path, said: str, suffix: str) -> None:
    (told,) = [line for line in said.splitlines() if f"m{suffix} could not be written" in line]
    assert "4,000,000 bytes are needed, " in told
    assert [file.name for file in folder.iterdir()] == [f"m{suffix}"]  # no temporary file
    assert_same_bits(read_state_dict(folder / f"m{suffix}")[0], some_tensors())


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_failed_write_keeps_the_previous_file(tmp_path: Path, suffix: str, commands: Commands) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_state_dict(some_tensors(), folder / f"m{suffix}")
    command = commands.call(
        "save_too_much", str(folder / f"m{suffix}"), tmp_path / "result", max_file_bytes=1 << 20
    )
    assert command.wait() == 1, command.output()
    assert_a_failed_save_harms_nothing(folder, command.output(), suffix)


def test_promise_16_a_full_disk_keeps_the_previous_file(tmp_path: Path) -> None:
    """Of both formats, each on a disk of 1 MB."""
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = 'mount -t tmpfs -o size=1m none "$1"'
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*own_mounts, mount, "sh", str(tmp_path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a disk of 1 MB cannot be mounted here")
    suffixes = (".ckpt", ".safetensors")
    for suffix in suffixes:
        (tmp_path / f"disk{suffix}").mkdir()
        write_state_dict(some_tensors(), tmp_path / f"m{suffix}")
    # The disks are gone with their namespace, so what is on them is copied out, hidden files too.
    script = """
        cd "$1"; rc=0
        for s in .ckpt .safetensors; do mount -t tmpfs -o size=1m none disk$s; cp m$s disk$s; done
        "$2" -c "$3" disk.ckpt/m.ckpt disk.safetensors/m.safetensors || rc=$?
        for s in .ckpt .safetensors; do cp -r disk$s after$s; done
        exit $rc
    """
    result = subprocess.run(
        [*own_mounts, script, "sh", str(tmp_path), sys.executable, SAVE_BOTH],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[1, 1]\n"
    for suffix in suffixes:
        assert_a_failed_save_harms_nothing(tmp_path / f"after{suffix}", result.stderr, suffix)


SAVE_BOTH = """
import sys
from rank_work import save_too_much
codes = []
for path in sys.argv[1:]:
    try:
        save_too_much(path)
    except SystemExit as ended:
        codes.append(ended.code)
print(codes)
"""


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/sub/m\.ckpt could not be written"):
        write_state_dict(some_tensors(), tmp_path / "file" / "sub" / "m.ckpt")


# ---- files that crash or fill the memory of whoever reads them ----


def with_pickle(path: Path, content: bytes) -> Path:
    """A file of torch.save whose pickle is another."""
    torch.save({"a": torch.arange(10.0)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)
    return path


def test_a_pickle_of_tuples_in_tuples_does_not_end_the_process(tmp_path: Path) -> None:
    """To hash them, as a key is, overflows the C stack."""
    path = with_pickle(tmp_path / "m.ckpt", b"\x80\x02})" + b"\x85" * 3_000_000 + b"Ns.")
    with pytest.raises(CheckpointError, match="tuples in tuples, more than 100 deep"):
        read_state_dict(path)


@pytest.mark.parametrize("length", [b"\x8d" + struct.pack("<Q", 1 << 40), b"X\xff\xff\xff\xff"])
def test_a_text_longer_than_the_file_is_not_made_room_for(tmp_path: Path, length: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"claims a value of [0-9,]+ bytes, more than the file has"):
        read_state_dict(with_pickle(tmp_path / "m.ckpt", b"\x80\x02" + length + b"abc."))


def test_tensors_that_claim_more_than_the_file_has_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="claim more than 16 times"):
        read_state_dict(tmp_path / "m.ckpt")


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/data/0", bytes(5_000_000))
    with pytest.raises(CheckpointError, match="zip bomb"):
        read_state_dict(tmp_path / "m.ckpt")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="is a pipe or device"):
        read_state_dict(tmp_path / "m.ckpt")
