"""Patches: exact both ways to the bit, refused where they do not fit, in any order where they share no entry."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mu.ldm.ema import ema_name
from mu.ldm.patch import (
    Patch,
    PatchError,
    apply_patch,
    apply_patches,
    base_fingerprint,
    bits_of,
    load_patch,
    make_patch,
    patch_checkpoint,
    remove_patch,
    save_patch,
)
from mu.ldm.tensor_file import CheckpointError, read_state_dict, write_state_dict
from mu.ldm.unet_dtype import WithUNetDtype

REFERENCE = Path(__file__).parents[1] / "reference" / "sd_v1_state_dict_shapes.json"
PATCH_V1 = REFERENCE.with_name("patch_v1.safetensors")
UNET = "model.diffusion_model."
WEIGHT, BIAS, WIDE = f"{UNET}a.weight", f"{UNET}a.bias", f"{UNET}b.weight"
TYPES = (torch.float32, torch.float16, torch.bfloat16)

Tensors = dict[str, Tensor]


def base(dtype: torch.dtype = torch.float32, *, ema: bool = False, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {WEIGHT: (5, 7), BIAS: (5,), WIDE: (100, 41)}
    tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    if ema:
        tensors |= {ema_name(key): (tensor.float() * 1.01) for key, tensor in tensors.items()}
        tensors["model_ema.num_updates"] = torch.tensor(5)
    return {**tensors, "first_stage_model.w": torch.ones(3, dtype=dtype)}


def moved(tensors: Tensors, where: dict[str, slice | list[int]], by: float = 0.5) -> Tensors:
    """A copy in which the flat positions `where` of some tensors are larger by `by`."""
    result = {key: tensor.clone() for key, tensor in tensors.items()}
    for key, positions in where.items():
        result[key].view(-1)[positions] += by
    return result


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(bits_of(one[key]), bits_of(other[key]))
        for key in one
    )


def through_file(patch: Patch, path: Path) -> Patch:
    save_patch(patch, path)
    return load_patch(path)


# ---- both ways


@pytest.mark.parametrize("dtype", TYPES)
def test_any_bits_come_and_go_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """-0.0 against 0.0, NaNs of different payloads, infinities, denormals: bits, not values, are kept."""
    bits = bits_of(torch.zeros((), dtype=dtype)).dtype
    lowest = torch.iinfo(bits).min
    nan = int(bits_of(torch.tensor(math.nan, dtype=dtype)))
    odd = [
        0,
        lowest,
        nan,
        nan + 1,
        nan | lowest,
        1,
        2,
        lowest + 1,
        int(bits_of(torch.tensor(math.inf, dtype=dtype))),
    ]
    pairs = torch.tensor(list(itertools.product(odd, odd)), dtype=bits)  # (81, 2)
    before, after = ({WEIGHT: pairs[:, i].contiguous().view(dtype)} for i in (0, 1))
    patch = through_file(make_patch(before, after), tmp_path / "p.safetensors")
    assert patch.weights_changed == 81 - 9
    assert same(apply_patch(before, patch), after)
    assert same(remove_patch(after, patch), before)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_form_of_marks(dtype: torch.dtype, tmp_path: Path) -> None:
    before = base(dtype)
    after = moved(before, {WEIGHT: slice(0, 20), BIAS: slice(None), WIDE: [0, 4099]})
    patch = make_patch(before, after, metadata={"concept": "Noto", "threshold": 0.5})
    forms = {key: (part.bits is not None, part.index is not None) for key, part in patch.tensors.items()}
    assert forms == {WEIGHT: (True, False), BIAS: (False, False), WIDE: (False, True)}
    read = through_file(patch, tmp_path / "p.safetensors")
    assert (read.metadata, read.has_ema) == ({"concept": "Noto", "threshold": 0.5}, False)
    assert read.base_fingerprint == base_fingerprint(before)
    kept = {key: tensor.clone() for key, tensor in before.items()}
    assert same(apply_patch(before, read), after)
    assert same(before, kept)
    assert same(remove_patch(after, read), before)
    again = tmp_path / "again.safetensors"
    save_patch(read, again)
    assert again.read_bytes() == (tmp_path / "p.safetensors").read_bytes()


def test_disjoint_patches_come_and_go_in_any_order() -> None:
    before = base()
    one = make_patch(before, moved(before, {WEIGHT: slice(0, 9), BIAS: [0]}))
    two = make_patch(before, moved(before, {WEIGHT: slice(9, 30), WIDE: [7]}, by=-2.0))
    both = moved(moved(before, {WEIGHT: slice(0, 9), BIAS: [0]}), {WEIGHT: slice(9, 30), WIDE: [7]}, by=-2.0)
    for first, second in ((one, two), (two, one)):
        result, combined = apply_patches(before, [first, second])
        assert combined is None
        assert same(result, both)
        assert same(remove_patch(remove_patch(both, first), second), before)
    assert same(remove_patch(both, one), apply_patch(before, two))


# ---- overlap


def test_overlap_is_refused_with_its_count() -> None:
    before = base()
    one = make_patch(before, moved(before, {WEIGHT: slice(0, 9), WIDE: slice(0, 100)}))
    two = make_patch(before, moved(before, {WEIGHT: slice(6, 30), WIDE: slice(90, 99)}, by=3.0))
    with pytest.raises(PatchError, match=rf"both change 12 entries of 2 tensors: {WEIGHT}, {WIDE};"):
        apply_patches(before, [one, two])
    with pytest.raises(PatchError, match=r"do not hold the values that it was made from.*Another patch may"):
        apply_patch(apply_patch(before, one), two)


@pytest.mark.parametrize("dtype", TYPES)
def test_overlap_can_be_added_up_and_taken_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Independent of the order, also of three; an entry of one patch alone gets its value to the bit."""
    before = base(dtype, ema=True)
    patches = []
    for first, by in ((0, 0.1), (10, 7.3), (20, -3.0)):
        after = moved(before, {WEIGHT: slice(first, first + 15)}, by=by)
        copy = ema_name(WEIGHT)
        after[copy].view(-1)[first : first + 15] = after[WEIGHT].view(-1)[first : first + 15].float()
        patches.append(make_patch(before, after))
    results = [apply_patches(before, order, overlap="add") for order in itertools.permutations(patches)]
    after, combined = results[0]
    assert all(same(after, other) for other, _ in results)
    parts = [apply_patch(before, patch)[WEIGHT].double().view(-1) for patch in patches]
    old, new = before[WEIGHT].double().view(-1), after[WEIGHT].view(-1)
    assert torch.equal(new[10:15], (parts[0] + parts[1] - old)[10:15].to(dtype))
    assert torch.equal(new[20:25], (parts[1] + parts[2] - old)[20:25].to(dtype))
    for patch, alone in zip(parts, (slice(0, 10), slice(15, 20), slice(25, 35)), strict=True):
        assert torch.equal(new[alone].double(), patch[alone])
    changed = after[WEIGHT] != before[WEIGHT]
    assert torch.equal(after[ema_name(WEIGHT)][changed], after[WEIGHT][changed].float())
    assert combined is not None
    assert same(remove_patch(after, through_file(combined, tmp_path / "c.safetensors")), before)


# ---- EMA copies


def test_ema_copies_in_the_patch_come_and_go_with_the_weights() -> None:
    before = base(torch.float16, ema=True)
    after = moved(before, {WEIGHT: [1, 2]})
    after[ema_name(WEIGHT)].view(-1)[[1, 2]] = after[WEIGHT].view(-1)[[1, 2]].float()
    patch = make_patch(before, after)
    assert (patch.has_ema, patch.weights_changed, len(patch.tensors)) == (True, 2, 2)
    assert same(apply_patch(before, patch), after)
    assert same(remove_patch(after, patch), before)
    without = {key: tensor for key, tensor in before.items() if not key.startswith("model_ema.")}
    result = apply_patch(without, patch)
    assert same(result, {key: after[key] for key in without})
    assert same(remove_patch(result, patch), without)


def test_ema_copies_that_the_patch_does_not_know_are_updated_and_can_be_restored() -> None:
    before = base(ema=True)
    without = {key: tensor for key, tensor in before.items() if not key.startswith("model_ema.")}
    patch = make_patch(without, moved(without, {WEIGHT: [1, 2]}))
    after, combined = apply_patches(before, [patch])
    expected = moved(before, {WEIGHT: [1, 2]})
    expected[ema_name(WEIGHT)].view(-1)[[1, 2]] = expected[WEIGHT].view(-1)[[1, 2]]
    assert same(after, expected)
    assert combined is not None
    assert same(remove_patch(after, combined), before)
    with pytest.raises(PatchError, match="has EMA copies of its weights"):
        remove_patch(after, patch)


# ---- what is refused


def test_what_does_not_fit_is_refused() -> None:
    before = base()
    after = moved(before, {WEIGHT: [3], WIDE: [5]})
    patch = make_patch(before, after)
    other = base(seed=1)
    with pytest.raises(PatchError) as told:
        apply_patch(other, patch)
    assert "2 of its 2 tensors" in str(told.value)
    assert base_fingerprint(before) in str(told.value)
    assert base_fingerprint(other) in str(told.value)
    with pytest.raises(PatchError, match="already applied"):
        apply_patch(after, patch)
    with pytest.raises(PatchError, match="is not applied to"):
        remove_patch(before, patch)
    with pytest.raises(PatchError, match="cannot be removed"):
        remove_patch(moved(after, {WEIGHT: [3]}), patch)
    with pytest.raises(PatchError, match=r"torch.float16 \(5, 7\)"):
        apply_patch({key: tensor.half() for key, tensor in before.items()}, patch)
    with pytest.raises(PatchError, match="has none"):
        apply_patch({WEIGHT: before[WEIGHT]}, patch)
    with pytest.raises(PatchError, match="different bases"):
        apply_patches(before, [patch, make_patch(other, moved(other, {BIAS: [0]}))])
    with pytest.raises(PatchError, match="only one of both"):
        make_patch(before, {WEIGHT: before[WEIGHT]})
    for wrong in (before[WEIGHT].int(), before[WEIGHT][1:]):
        with pytest.raises(PatchError, match="no patch can be made"):
            make_patch(before, {**before, WEIGHT: wrong})


def test_an_entry_elsewhere_does_not_matter() -> None:
    """The base's other entries may have changed: by a patch that shares none, or by another network's training."""
    before = base()
    patch = make_patch(before, moved(before, {WEIGHT: [3]}))
    assert same(
        apply_patch(moved(before, {WEIGHT: [4]}), patch), moved(moved(before, {WEIGHT: [4]}), {WEIGHT: [3]})
    )


def test_a_file_of_the_first_version_is_read_applied_and_removed_to_the_bit(tmp_path: Path) -> None:
    """Written by it: bits, positions and whole tensors, EMA copies, fp16 that became fp32."""
    shapes = {WEIGHT: (5, 7), BIAS: (5,), WIDE: (100, 41)}
    before: Tensors = {
        key: (torch.arange(float(math.prod(shape))) / 64).view(shape).half() for key, shape in shapes.items()
    }
    before |= {ema_name(key): tensor * 2 for key, tensor in before.items()}
    places: dict[str, slice | list[int]] = {WEIGHT: slice(0, 20), BIAS: slice(None), WIDE: [3, 4099]}
    places |= {ema_name(key): where for key, where in places.items()}
    after = moved(in_dtype(before, torch.float32), places, by=1e-5)
    patch = load_patch(PATCH_V1)
    assert patch.metadata == {"template": "style", "template_name": "Noto"}
    assert patch.weights_changed == 27
    assert same(apply_patch(before, patch), after)
    assert same(remove_patch(after, patch), before)
    save_patch(make_patch(before, after, metadata=patch.metadata), tmp_path / "again.safetensors")
    with (
        safe_open(PATCH_V1, framework="pt") as old,
        safe_open(tmp_path / "again.safetensors", framework="pt") as new,
    ):
        assert new.metadata() == old.metadata()  # with the SHA-256 of the tensors


@pytest.fixture
def patch_path(tmp_path: Path) -> Path:
    before = base()
    after = moved(before, {WEIGHT: slice(0, 20), WIDE: [3, 9]})
    save_patch(make_patch(before, after), tmp_path / "a.patch.safetensors")
    return tmp_path / "a.patch.safetensors"


def test_truncated_and_foreign_files_are_refused(patch_path: Path, tmp_path: Path) -> None:
    content = patch_path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(PatchError, match="no patch could be read"):
            load_patch(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PatchError, match="SHA-256"):
        load_patch(tmp_path / "cut.safetensors")
    with pytest.raises(PatchError, match="there is no such file"):
        load_patch(tmp_path / "absent.safetensors")
    write_state_dict(base(), tmp_path / "model.safetensors")
    with pytest.raises(PatchError, match="is no patch"):
        load_patch(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("says", "tensors", "metadata"),
    [
        (
            "beyond its 35 entries",
            {f"bits/{WEIGHT}": torch.tensor([255, 255, 15, 0, 128], dtype=torch.uint8)},
            {},
        ),
        ("marks 19 entries", {f"bits/{WEIGHT}": torch.tensor([255, 255, 7, 0, 0], dtype=torch.uint8)}, {}),
        ("not ascending", {f"index/{WIDE}": torch.tensor([9, 3], dtype=torch.int32)}, {}),
        ("not ascending", {f"index/{WIDE}": torch.tensor([3, 4100], dtype=torch.int32)}, {}),
        ("not ascending", {f"index/{WIDE}": torch.tensor([-1, 3], dtype=torch.int32)}, {}),
        ("do not change", {f"xor/{WIDE}": torch.tensor([0, 3], dtype=torch.int32)}, {}),
        ("not a row of", {f"xor/{WIDE}": torch.tensor([1, 3], dtype=torch.int16)}, {}),
        ("marks its entries twice", {f"bits/{WIDE}": torch.zeros(513, dtype=torch.uint8)}, {}),
        ("nothing is told of", {f"xor/{BIAS}": torch.tensor([1], dtype=torch.int32)}, {}),
        ("patch format 2", {}, {"patch_format": "2"}),
        ("does not describe a patch", {}, {"tensors": '{"x": 1}'}),
        ("does not describe a patch", {}, {"base_fingerprint": '"sha256:0"'}),
        ("metadata says 23", {}, {"weights_changed": "23"}),
        ("is no JSON", {}, {"concept": "Noto"}),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    patch_path: Path, says: str, tensors: Tensors, metadata: dict[str, str]
) -> None:
    stored, described = read_state_dict(patch_path)
    described.pop("format")
    write_state_dict({**stored, **tensors}, patch_path, {**described, **metadata})
    with pytest.raises(PatchError, match=says):
        load_patch(patch_path)


def test_values_that_lead_elsewhere_are_refused(patch_path: Path) -> None:
    """Altered with a matching SHA-256 of the file: the result is compared with what the patch notes of it."""
    stored, described = read_state_dict(patch_path)
    described.pop("format")
    write_state_dict(
        {**stored, f"xor/{WIDE}": torch.tensor([1, 3], dtype=torch.int32)}, patch_path, described
    )
    with pytest.raises(PatchError, match="is damaged: its values do not lead"):
        apply_patch(base(), load_patch(patch_path))


# ---- a UNet that was written in another dtype


def in_dtype(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.clone() for name, tensor in WithUNetDtype(tensors, dtype).items()}


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("ema", [False, True])
def test_a_patch_into_a_wider_dtype_comes_and_goes_exactly(
    narrow: torch.dtype, ema: bool, tmp_path: Path
) -> None:
    before = base(narrow, ema=ema)
    after = moved(in_dtype(before, torch.float32), {WEIGHT: slice(0, 9), WIDE: [7]}, by=1e-5)
    assert {tensor.dtype for name, tensor in after.items() if name.startswith(UNET)} == {torch.float32}
    patch = through_file(make_patch(before, after), tmp_path / "p.safetensors")
    assert patch.weights_changed == 10
    assert patch.base_fingerprint == base_fingerprint(before)
    assert patch.cast == dict.fromkeys((WEIGHT, BIAS, WIDE), (narrow, torch.float32))
    assert same(apply_patch(before, patch), after)
    assert same(remove_patch(after, patch), before)
    with pytest.raises(PatchError, match="already applied"):
        apply_patch(after, patch)
    other = torch.float64
    with pytest.raises(PatchError, match=f"was {narrow} in its base and torch.float32 after, .* {other}"):
        apply_patch(in_dtype(before, other), patch)


def test_patches_into_a_wider_dtype_come_and_go_in_any_order() -> None:
    """As long as one is left in the file, its values need the wider dtype."""
    before = base(torch.float16, ema=True)
    wide = in_dtype(before, torch.float32)
    places: list[dict[str, slice | list[int]]] = [{WEIGHT: slice(0, 9), BIAS: [0]}, {WEIGHT: slice(9, 30)}]
    first, second = (make_patch(before, moved(wide, where, by=1e-5)) for where in places)
    both = moved(moved(wide, places[0], by=1e-5), places[1], by=1e-5)
    applied, combined = apply_patches(before, [first, second])
    assert combined is None
    assert same(applied, both)
    assert same(remove_patch(both, first), moved(wide, places[1], by=1e-5))
    for one, other in ((first, second), (second, first)):
        assert same(remove_patch(remove_patch(both, one), other), before)
        assert same(apply_patch(remove_patch(both, one), one), both)


def test_patches_into_a_wider_dtype_add_up(tmp_path: Path) -> None:
    before = base(torch.float16)
    wide = in_dtype(before, torch.float32)
    patches = [make_patch(before, moved(wide, {WEIGHT: slice(i, i + 9)}, by=1e-5)) for i in (0, 4)]
    summed, combined = apply_patches(before, patches, overlap="add")
    assert combined is not None
    step = (wide[WEIGHT] + 1e-5) - wide[WEIGHT]
    expected = (wide[WEIGHT].double() + 2 * step.double()).float().view(-1)[4:9]
    assert torch.equal(summed[WEIGHT].view(-1)[4:9], expected)
    assert same(remove_patch(summed, through_file(combined, tmp_path / "p.safetensors")), before)


def test_a_patch_into_a_narrower_dtype_is_applied_and_cannot_be_removed(tmp_path: Path) -> None:
    before = base()
    after = moved(in_dtype(before, torch.float16), {WEIGHT: [3]})
    patch = through_file(make_patch(before, after), tmp_path / "p.safetensors")
    assert same(apply_patch(before, patch), after)
    with pytest.raises(PatchError, match=r"wrote 3 tensors: .* in torch.float16, which rounded .*float32"):
        remove_patch(after, patch)


def test_ema_copies_that_a_patch_does_not_know_follow_into_its_dtype() -> None:
    """In their own one, the small change would be rounded away: they would still have what was forgotten."""
    before = base(torch.float16)
    after = moved(in_dtype(before, torch.float32), {WEIGHT: slice(None)}, by=1e-5)
    patch = make_patch(before, after)
    copies = {ema_name(name): before[name].clone() for name in (WEIGHT, BIAS, WIDE)}
    applied, combined = apply_patches({**before, **copies}, [patch])
    assert torch.equal(applied[ema_name(WEIGHT)], after[WEIGHT])
    assert torch.equal(applied[ema_name(WIDE)], before[WIDE].float())
    assert combined is not None
    assert same(remove_patch(applied, combined), {**before, **copies})


def test_patches_into_different_dtypes_are_not_applied_together() -> None:
    before = base(torch.float16)
    plain = make_patch(before, moved(before, {WEIGHT: [3]}))
    wider = make_patch(before, moved(in_dtype(before, torch.float32), {WIDE: [3]}))
    with pytest.raises(PatchError, match="the same save_dtype"):
        apply_patches(before, [plain, wider])
    with pytest.raises(PatchError, match=r"changes .*a\.weight, torch.float16 .* has torch.float32"):
        apply_patch(apply_patch(before, wider), plain)


@pytest.mark.parametrize(
    "cast",
    [
        [],
        {"first_stage_model.w": ["float16", "float32"]},
        {BIAS: ["float16"]},
        {BIAS: ["float32", "float32"]},
        {BIAS: ["int16", "float32"]},
        {BIAS: ["load", "float32"]},
        {WEIGHT: ["float32", "float16"]},  # its values are of float32
    ],
)
def test_a_cast_that_is_none_is_refused(cast: Any, patch_path: Path) -> None:
    stored, described = read_state_dict(patch_path)
    described.pop("format")
    write_state_dict(stored, patch_path, {**described, "cast": json.dumps(cast)})
    with pytest.raises(PatchError, match="does not describe a patch"):
        load_patch(patch_path)


# ---- checkpoints


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_checkpoint_comes_back_as_it_was(suffix: str, patch_path: Path, tmp_path: Path) -> None:
    before, there, back = (tmp_path / f"{name}.{suffix}" for name in ("before", "there", "back"))
    write_state_dict(base(), before, {"modelspec.title": "x"})
    result = patch_checkpoint(before, there, [patch_path])
    assert result == {"wrote": there, "entries": 22}
    assert same(read_state_dict(there)[0], moved(base(), {WEIGHT: slice(0, 20), WIDE: [3, 9]}))
    with pytest.raises(PatchError, match="is there already"):
        patch_checkpoint(there, back.with_name(before.name), [patch_path], remove=True)
    patch_checkpoint(there, back, [patch_path], remove=True)
    assert same(read_state_dict(back)[0], base())
    assert read_state_dict(back)[1] == read_state_dict(before)[1]
    if suffix == "safetensors":
        assert back.read_bytes() == before.read_bytes()
    patch_checkpoint(back, back, [patch_path], overwrite=True)
    assert same(read_state_dict(back)[0], read_state_dict(there)[0])


def test_nothing_is_written_of_what_does_not_fit(patch_path: Path, tmp_path: Path) -> None:
    write_state_dict(base(seed=1), tmp_path / "other.safetensors")
    with pytest.raises(PatchError, match="is not a patch of"):
        patch_checkpoint(tmp_path / "other.safetensors", tmp_path / "out.safetensors", [patch_path])
    write_state_dict(
        {"conv_in.weight": torch.ones(1), "down_blocks.x": torch.ones(1)}, tmp_path / "u.safetensors"
    )
    with pytest.raises(PatchError, match="UNet in diffusers' names"):
        patch_checkpoint(tmp_path / "u.safetensors", tmp_path / "out.safetensors", [patch_path])
    with pytest.raises(PatchError, match="gives a file"):
        patch_checkpoint(tmp_path / "other.safetensors", tmp_path / "folder", [patch_path])
    with pytest.raises(CheckpointError, match="there is no such file"):
        patch_checkpoint(tmp_path / "absent.ckpt", tmp_path / "out.ckpt", [patch_path])
    assert not list(tmp_path.glob("out*"))


# ---- sizes


def test_size_for_stable_diffusion_v1() -> None:
    """Cross-attention in an fp16 file: below 0.1 GB even where the mask leaves none of its weights out."""
    shapes: dict[str, list[int]] = json.loads(REFERENCE.read_text(encoding="utf-8"))
    sizes = [
        math.prod(shape) for name, shape in shapes.items() if ".attn2." in name and name.startswith(UNET)
    ]
    assert (len(sizes), sum(sizes)) == (80, 43_962_560)
    marks = sum((size + 7) // 8 for size in sizes)
    assert 2 * sum(sizes) + marks == 93_420_440 <= 100_000_000
    assert 2 * (sum(sizes) // 2) + marks == 49_457_880  # half of them kept
    assert 4 * (sum(sizes) // 2) + marks == 93_420_440  # half of them, fp32 file


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_a_file_is_as_large_as_that_arithmetic_says(share: float, tmp_path: Path) -> None:
    size = 80_000
    before: dict[str, Any] = {WEIGHT: torch.zeros(size, dtype=torch.float16)}
    count = int(share * size)
    after = moved(
        before, {WEIGHT: torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].tolist()}
    )
    save_patch(make_patch(before, after), tmp_path / "p.safetensors")
    marks = {0.01: 4 * count, 0.5: size // 8, 1.0: 0}[share]
    assert 0 < (tmp_path / "p.safetensors").stat().st_size - 2 * count - marks < 2000


@pytest.mark.parametrize("kind", ["all", "index"])
def test_a_patch_that_claims_terabytes_is_refused_without_making_room(tmp_path: Path, kind: str) -> None:
    before = {WEIGHT: torch.zeros(200)}
    after = {WEIGHT: torch.ones(200)} if kind == "all" else moved(before, {WEIGHT: [7]})
    save_patch(make_patch(before, after), tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    told = json.loads(metadata["tensors"])
    told[WEIGHT]["shape"] = [1 << 44]
    save_file(stored, tmp_path / "p.safetensors", metadata={**metadata, "tensors": json.dumps(told)})
    if kind == "all":
        with pytest.raises(PatchError, match="marks 17592186044416 entries and has values for 200"):
            load_patch(tmp_path / "p.safetensors")
        return
    patch = load_patch(tmp_path / "p.safetensors")  # one position may be marked in any tensor
    with pytest.raises(PatchError, match="is not a patch of"):
        apply_patch(before, patch)
