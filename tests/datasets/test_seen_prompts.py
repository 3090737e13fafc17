"""Of a long prompt the model sees the beginning: that is said, and prompts must differ there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.datasets.index import DataError, ForgetRetain, Row
from mu.datasets.seen_prompts import check_seen_apart, cut_notes
from mu.ldm import LatentDiffusion
from mu.ldm.text_encoder import token_ids, tokenize
from tests.conftest import TINY_V2

LONG = " ".join(["street"] * 75)
"""75 words of one token each: with start and end token exactly what is read."""


def rows(forget: str, retain: str, substitute: str) -> ForgetRetain:
    return ForgetRetain(
        (Row(Path("1.jpg"), "1.jpg", forget, "", "", "x", substitute),),
        (Row(Path("2.jpg"), "2.jpg", retain, "", "", "y"),),
    )


def test_tokens_are_counted_with_start_and_end() -> None:
    (ids,) = token_ids([LONG])
    assert len(ids) == 77
    assert ids == tokenize([LONG])[0].tolist()
    assert token_ids(["", f"{LONG} lamp"])[1][:76] == tokenize([f"{LONG} lamp"])[0].tolist()[:76]
    assert token_ids([]) == []


def test_promise_30_prompts_that_are_cut_are_counted_and_the_first_is_named(
    tiny_model: LatentDiffusion,
) -> None:
    params = tiny_model.params
    assert cut_notes(params, ["a cat", LONG, "a cat"]) == []
    (note,) = cut_notes(params, ["a cat", LONG, f"{LONG} lamp", f"{LONG} one two"])
    assert note == (
        "2 of 4 prompts are longer than the 77 tokens that a text encoder reads, and are cut; the first is "
        f"'{LONG[:60]}...' with 78 tokens, read as far as '... {LONG[-60:].strip()}'"
    )


@pytest.mark.parametrize("sections", [{}, TINY_V2])
def test_promise_30_prompts_that_differ_only_after_the_cut_are_refused(
    make_tiny_model: Callable[..., LatentDiffusion], sections: dict[str, Any]
) -> None:
    model = make_tiny_model(**sections)
    wasp, rose = f"{LONG} with a wasp", f"{LONG} with a rose"
    assert torch.equal(model.embed([wasp]), model.embed([rose]))  # one and the same to the model
    with pytest.raises(DataError, match="1 prompts cannot be told apart") as raised:
        check_seen_apart(rows(wasp, rose, "a lawn"), model.params)
    assert "(to retain) is to the text encoder the same as" in str(raised.value)
    assert "the first 77 tokens" in str(raised.value)
    with pytest.raises(DataError, match=r"\(substitute\) is to the text encoder the same as"):
        check_seen_apart(rows(wasp, "a rose", rose), model.params)
    with pytest.raises(DataError, match="2 prompts cannot be told apart"):
        check_seen_apart(rows(wasp, rose, f"{LONG} lamp"), model.params)
    early = f"a wasp {LONG}"
    assert not torch.equal(model.embed([early]), model.embed([rose]))
    check_seen_apart(rows(early, rose, "a lawn"), model.params)
