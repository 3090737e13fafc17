"""Images sampled and encoded by two processes: the files, the tensors and the errors of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import rank_work
import torch

from mu.launch import on_ranks
from mu.ldm import LatentDiffusion, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "forked_ranks")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_two_processes_prepare_what_one_does(
    make_tiny_model: Callable[..., LatentDiffusion], tiny_yaml: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(make_tiny_model(), checkpoint)
    one, two = (
        start((str(tiny_yaml), str(checkpoint), str(tmp_path / name)))
        for start, name in (
            (rank_work.prepare, "one"),
            (lambda task: on_ranks(rank_work.prepare, task, "cpu,cpu"), "two"),
        )
    )
    assert one["sampled"] == two["sampled"] == [3, 7, 0]
    for found, encoded in ((one, [10]), (two, [5, 5])):
        assert found["encoded"] == found["encoded again"] == encoded
        assert found["same"]
        assert found["same contexts"]
        assert found["kept"]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one["moments"], two["moments"], strict=True))
    assert one["contexts"].keys() == two["contexts"].keys()
    assert all(torch.equal(one["contexts"][prompt], tensor) for prompt, tensor in two["contexts"].items())

    (message, _), *others = two["bad images"]
    assert others == [(message, True)]
    assert "3 images cannot be used" in message
    assert [name for number in range(10) if (name := f"{number}.png") in message] == [
        "2.png",
        "5.png",
        "6.png",
    ]
    assert message.replace("/two/", "/one/") == one["bad images"][0][0]
    (message, in_all), other = two["bad model"]
    assert (message, in_all) == other
    assert in_all
    assert "NaN" in message
    # The other one has done its share, and what is not finite is not written.
    assert len(list((tmp_path / "two" / "nan").rglob("*.png"))) == 6
    assert not list((tmp_path / "two" / "bad").rglob("*.safetensors"))

    written, expected = files(tmp_path / "two"), files(tmp_path / "one")
    assert {name for name in written.keys() ^ expected.keys() if not name.startswith("nan/")} == set()
    assert sum(name.endswith(".png") for name in expected) > 10
    for name, content in expected.items():
        assert written[name] == content, name
