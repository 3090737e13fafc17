from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mu.algorithms.saliency_unlearning.mask_file import (
    MaskError,
    check_mask,
    load_mask,
    load_mask_metadata,
    save_mask,
)
from tests.forked_commands import Commands


def some_mask() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"z.weight": (3, 5, 2), "a.bias": (8,), "one": (), "m": (17,)}
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def test_round_trip_keeps_values_shapes_order_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mask.safetensors"
    metadata = {
        "concept": "True",  # a string that would also be JSON
        "style": "Fluent_Flat",
        "threshold": 0.5,
        "pool": "unet",
        "model_fingerprint": "sha256:abc",
        "draws_per_image": 2,
        "categories": ["a", "b"],
        "nothing": None,
    }
    mask = some_mask()
    save_mask(mask, path, metadata)
    loaded = load_mask(path)
    assert list(loaded) == list(mask)
    for name, marked in mask.items():
        assert loaded[name].dtype == torch.bool
        assert loaded[name].shape == marked.shape
        assert torch.equal(loaded[name], marked)
    counts = {"kept": sum(int(m.sum()) for m in mask.values()), "total": 30 + 8 + 1 + 17}
    assert load_mask_metadata(path) == {**metadata, **counts}


def test_the_same_mask_is_the_same_file(tmp_path: Path) -> None:
    """To the byte, whatever order the metadata was given in; safetensors alone leaves that order to chance."""
    mask = {"b": torch.tensor([True, False]), "a": torch.ones(3, 3, dtype=torch.bool)}
    metadata = {"concept": 'Blåbær "\\\n\u2028', **{f"key{i}": i for i in range(20)}}
    save_mask(mask, tmp_path / "first.safetensors", metadata)
    content = (tmp_path / "first.safetensors").read_bytes()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        save_mask(mask, path, dict(reversed(metadata.items())))
        assert path.read_bytes() == content
    assert load_mask_metadata(path)["concept"] == metadata["concept"]
    assert list(load_mask(path)) == ["b", "a"]


def test_an_entry_takes_one_bit_least_significant_first(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    marked = torch.zeros(10, dtype=torch.bool)
    marked[torch.tensor([0, 3, 9])] = True
    save_mask({"w": marked}, path, {})
    assert load_file(path)["w"].tolist() == [0b00001001, 0b00000010]
    save_mask({"w": torch.ones(80_000, dtype=torch.bool)}, path, {})
    assert 10_000 < path.stat().st_size < 11_000
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["shapes"] == '{"w": [80000]}'


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8, torch.bool])
def test_the_authors_file_of_zeros_and_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    mask = some_mask()
    torch.save({name: marked.to(dtype) for name, marked in mask.items()}, tmp_path / "with_0.5.pt")
    loaded = load_mask(tmp_path / "with_0.5.pt")
    assert list(loaded) == list(mask)
    assert all(
        torch.equal(loaded[name], marked) and loaded[name].dtype == torch.bool
        for name, marked in mask.items()
    )
    assert load_mask_metadata(tmp_path / "with_0.5.pt") == {}


@pytest.mark.parametrize("bad", [2.0, 0.5, -1.0, float("nan"), float("inf")])
def test_promise_07_values_other_than_zero_and_one_are_refused(tmp_path: Path, bad: float) -> None:
    torch.save({"w": torch.tensor([0.0, 1.0, bad])}, tmp_path / "mask.pt")
    with pytest.raises(MaskError, match="w has values other than 0 and 1"):
        load_mask(tmp_path / "mask.pt")
    save_file({"w": torch.tensor([0.0, 1.0, bad])}, tmp_path / "mask.safetensors")
    with pytest.raises(MaskError, match="w has values other than 0 and 1"):
        load_mask(tmp_path / "mask.safetensors")


def test_promise_07_a_mask_that_marks_nothing_is_refused(tmp_path: Path) -> None:
    save_mask({"w": torch.zeros(9, dtype=torch.bool)}, tmp_path / "mask.safetensors", {})
    with pytest.raises(MaskError, match="no weight is marked"):
        load_mask(tmp_path / "mask.safetensors")
    torch.save({"w": torch.zeros(9)}, tmp_path / "mask.pt")
    with pytest.raises(MaskError, match="no weight is marked"):
        load_mask(tmp_path / "mask.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"w": torch.ones(3), "x": Harm()}, tmp_path / "mask.pt")
    with pytest.raises(MaskError, match="mkdir"):
        load_mask(tmp_path / "mask.pt")
    assert not (tmp_path / "harmed").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    save_mask(some_mask(), path, {"concept": "Noto"})
    whole = path.read_bytes()
    for content, what in (
        (b"", "empty"),
        (whole[:-3], "truncated"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged"),
        (whole[:40], "truncated"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ):
        path.write_bytes(content)
        with pytest.raises(MaskError, match=what):
            load_mask(path)
    with pytest.raises(MaskError, match="no such file"):
        load_mask(tmp_path / "absent.safetensors")
    with pytest.raises(MaskError, match="no such mask"):
        load_mask_metadata(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"shapes": '{"w": [11]}'},
            "damaged",
        ),  # the 11th bit would be taken from the padding: the count still agrees
        ({"shapes": '{"w": [17]}'}, "shape"),
        ({"shapes": '{"v": [10]}'}, "disagree on v, w"),
        ({"shapes": '{"w": "10"}'}, "lacks the shapes"),
        ({"shapes": "[]"}, "lacks the shapes"),
        ({"kept": "4"}, "metadata says 4"),
        ({"kept": "many"}, "lacks"),
        ({"mask_format": "2"}, "mask format 2"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, str], what: str) -> None:
    metadata = {"mask_format": "1", "shapes": '{"w": [10]}', "kept": "3", "total": "10"}
    bits = torch.tensor([0b00001001, 0b00000110], dtype=torch.uint8)
    if "shapes" not in change or "11" not in change["shapes"]:
        bits[1] = 0b00000010
    save_file({"w": bits}, tmp_path / "mask.safetensors", metadata={**metadata, **change})
    with pytest.raises(MaskError, match=what):
        load_mask(tmp_path / "mask.safetensors")


def test_bits_beyond_the_entries_are_refused(tmp_path: Path) -> None:
    metadata = {"mask_format": "1", "shapes": '{"w": [10]}', "kept": "3", "total": "10"}
    save_file({"w": torch.tensor([9, 6], dtype=torch.uint8)}, tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(MaskError, match="beyond its 10 entries"):
        load_mask(tmp_path / "m.safetensors")


def test_a_checkpoint_is_not_a_mask(tmp_path: Path) -> None:
    save_file({"w": torch.randn(4)}, tmp_path / "model.safetensors")
    with pytest.raises(MaskError, match="not a mask"):
        load_mask(tmp_path / "model.safetensors")
    with pytest.raises(MaskError, match="no mask"):
        load_mask_metadata(tmp_path / "model.safetensors")


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    for mask, metadata, what in (
        ({"w": torch.tensor([1.0, float("nan")])}, {}, "float32, not bool"),
        (some_mask(), {"threshold": float("nan")}, "JSON"),
        (some_mask(), {"saliency": torch.ones(2)}, "JSON"),
        (some_mask(), {"kept": 5}, "kept"),
    ):
        with pytest.raises(MaskError, match=what):
            save_mask(mask, path, metadata)
    with pytest.raises(MaskError, match=r"\.pt"):
        save_mask(some_mask(), tmp_path / "mask.pt", {})
    assert list(tmp_path.iterdir()) == []


def test_a_mask_may_state_its_own_counts(tmp_path: Path) -> None:
    save_mask({"w": torch.tensor([True, False])}, tmp_path / "m.safetensors", {"kept": 1, "total": 2})
    assert load_mask_metadata(tmp_path / "m.safetensors") == {"kept": 1, "total": 2}


def test_a_full_disk_leaves_the_previous_mask(tmp_path: Path, commands: Commands) -> None:
    """A real limit on the size of files, as a full disk would stop the write."""
    path = tmp_path / "masks" / "mask.safetensors"
    save_mask(some_mask(), path, {"concept": "before"})
    command = commands.call("save_large_mask", str(path), tmp_path / "result", max_file_bytes=100 << 10)
    assert command.wait() == 3, command.output()
    assert str(path) in command.output()
    assert load_mask_metadata(path)["concept"] == "before"
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(2, 2)


def fitting_mask() -> dict[str, Tensor]:
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in TwoLayers().named_parameters()}


def test_a_mask_of_this_model_fits() -> None:
    check_mask(
        fitting_mask(), TwoLayers(), metadata={"model_fingerprint": "sha256:1"}, fingerprint="sha256:1"
    )
    check_mask(
        fitting_mask(), TwoLayers(), metadata={}, fingerprint="sha256:1"
    )  # the authors' files have none


def test_promise_07_masks_of_other_models_are_refused() -> None:
    lacking = fitting_mask()
    del lacking["b.bias"]
    with pytest.raises(MaskError, match=r"1 missing \(b\.bias\)"):
        check_mask(lacking, TwoLayers())
    prefixed = {f"model.{name}": marked for name, marked in fitting_mask().items()}
    with pytest.raises(MaskError, match=r"4 missing .*4 unknown \(model\.a\.weight"):
        check_mask(prefixed, TwoLayers())
    with pytest.raises(MaskError, match=r"b\.weight \(2, 3\) instead of \(2, 2\)"):
        check_mask({**fitting_mask(), "b.weight": torch.ones(2, 3, dtype=torch.bool)}, TwoLayers())
    with pytest.raises(MaskError, match="not bool"):
        check_mask({**fitting_mask(), "b.weight": torch.ones(2, 2)}, TwoLayers())
    with pytest.raises(MaskError, match="no weight is marked"):
        check_mask({name: ~marked for name, marked in fitting_mask().items()}, TwoLayers())
    with pytest.raises(MaskError, match=r"sha256:1.*sha256:2"):
        check_mask(
            fitting_mask(), TwoLayers(), metadata={"model_fingerprint": "sha256:1"}, fingerprint="sha256:2"
        )


@pytest.mark.parametrize(
    "text", ["9" * 6000, "[" * 60_000, '{"w": [0, 4611686018427387904, 4611686018427387904]}']
)
def test_metadata_that_would_stop_the_parser_is_refused(tmp_path: Path, text: str) -> None:
    metadata = {"mask_format": "1", "shapes": text, "kept": "1", "total": "1"}
    save_file({"w": torch.ones(1, dtype=torch.uint8)}, tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(MaskError, match="lacks the shapes"):
        load_mask(tmp_path / "m.safetensors")


def test_a_tensor_of_too_many_dimensions_is_no_mask(tmp_path: Path) -> None:
    save_file({"w": torch.ones([1] * 70)}, tmp_path / "m.safetensors")
    with pytest.raises(MaskError, match="w has 70 dimensions"):
        load_mask(tmp_path / "m.safetensors")
