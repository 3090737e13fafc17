"""The closed form of UCE against brute-force least squares, and which tokens are paired."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mu.algorithms.uce.editing import context_edit, edit_, edited_names, paired_tokens
from mu.ldm import LatentDiffusion
from mu.ldm.text_encoder import token_ids

LENGTH = 77


def drawn(count: int, seed: int, width: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 0.1), (3.0, 0.0, 2.0), (0.2, 5.0, 1e-3)])
def test_the_closed_form_is_the_least_squares_solution(scales: tuple[float, float, float]) -> None:
    """Each row of W, by torch.linalg.lstsq of the three sums written out as one system."""
    erase, preserve, lamb = scales
    weight = drawn(4, 0)  # (O, D)
    erased, substitutes, preserved = drawn(7, 1), drawn(7, 2), drawn(9, 3)
    system = torch.cat([erase**0.5 * erased, preserve**0.5 * preserved, lamb**0.5 * torch.eye(5).double()])
    wanted = torch.cat(
        [
            erase**0.5 * substitutes @ weight.T,
            preserve**0.5 * preserved @ weight.T,
            lamb**0.5 * weight.T,
        ]
    )
    solution = torch.linalg.lstsq(system, wanted).solution.T  # (O, D)
    edit = context_edit(erased, substitutes, preserved, erase_scale=erase, preserve_scale=preserve, lamb=lamb)
    assert torch.allclose(weight @ edit, solution, rtol=1e-9, atol=1e-9)


def test_it_is_the_formula_of_the_paper() -> None:
    weight, erased, substitutes, preserved = drawn(4, 0), drawn(3, 1), drawn(3, 2), drawn(6, 3)
    first, second = 0.1 * weight, 0.1 * torch.eye(5).double()
    for c, substitute in zip(erased, substitutes, strict=True):
        first = first + torch.outer(weight @ substitute, c)
        second = second + torch.outer(c, c)
    for c in preserved:
        first, second = first + torch.outer(weight @ c, c), second + torch.outer(c, c)
    edit = context_edit(erased, substitutes, preserved, erase_scale=1.0, preserve_scale=1.0, lamb=0.1)
    assert torch.allclose(weight @ edit, first @ torch.linalg.inv(second), rtol=1e-9, atol=1e-9)


def test_nothing_to_edit_changes_nothing() -> None:
    same = drawn(6, 1)
    edit = context_edit(same, same, drawn(9, 2), erase_scale=1.0, preserve_scale=1.0, lamb=0.1)
    assert torch.equal(edit, torch.eye(5).double())


def test_with_room_for_both_the_edit_is_made_and_the_rest_stays() -> None:
    """Fewer contexts than dimensions, and hardly any lambda: both are met exactly."""
    erased, substitutes, preserved = drawn(2, 1), drawn(2, 2), drawn(2, 3)
    edit = context_edit(erased, substitutes, preserved, erase_scale=1.0, preserve_scale=1.0, lamb=1e-9)
    assert torch.allclose(erased @ edit.T, substitutes, atol=1e-6)
    assert torch.allclose(preserved @ edit.T, preserved, atol=1e-6)


# ---- which tokens


def words(prompt: str, substitute: str) -> list[tuple[int, int]]:
    """The pairs as far as the end token."""
    return paired_tokens(prompt, substitute, length=LENGTH)[: len(token_ids([prompt])[0])]


@pytest.mark.parametrize(
    ("prompt", "substitute", "expected"),
    [
        ("a cat in art", "a dog in art", [(i, i) for i in range(6)]),
        # 0 start, 1 a, 2 high, 3 contrast, 4 cat, 5 end; 0 start, 1 a, 2 blob, 3 cat, 4 end.
        ("a high contrast cat", "a blob cat", [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (5, 4)]),
        ("a blob cat", "a high contrast cat", [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5)]),
        ("van gogh", "art", [(0, 0), (1, 1), (2, 1), (3, 2)]),
        ("van gogh", "", [(0, 0), (1, 1), (2, 1), (3, 1)]),  # the end token, where there are no words
        ("cat", "cat", [(0, 0), (1, 1), (2, 2)]),
        ("cat cat", "cat", [(0, 0), (1, 1), (2, 2), (3, 2)]),
    ],
)
def test_tokens_of_the_concept_are_paired_and_shared_ones_with_themselves(
    prompt: str, substitute: str, expected: list[tuple[int, int]]
) -> None:
    assert words(prompt, substitute) == expected


def test_padding_is_paired_in_order_after_the_end_token() -> None:
    assert paired_tokens("van gogh", "art", length=8)[3:] == [(3, 2), (4, 3), (5, 4), (6, 5), (7, 6)]
    assert paired_tokens("art", "van gogh", length=6)[2:] == [(2, 3), (3, 4), (4, 5), (5, 5)]


@pytest.mark.parametrize("prompts", [("van gogh", "art"), ("art", "van gogh"), ("cat " * 100, "dog " * 90)])
def test_all_places_of_the_context_are_paired_each_once(prompts: tuple[str, str]) -> None:
    pairs = paired_tokens(*prompts, length=LENGTH)
    assert [place for place, _ in pairs] == list(range(LENGTH))
    assert all(0 <= place < LENGTH for _, place in pairs)
    ends = [min(len(ids), LENGTH) - 1 for ids in token_ids(list(prompts))]
    assert pairs[ends[0]] == tuple(ends)
    assert all(other >= ends[1] for place, other in pairs if place > ends[0])


# ---- of a model


def test_the_weights_of_a_model_solve_the_sums_over_all_tokens_of_its_prompts(
    tiny_model: LatentDiffusion,
) -> None:
    """All 77 of "a cat" become those of "a dog"; all of "a tree" and, once for the one pair, of "" stay."""
    name = edited_names(tiny_model.unet)[0]
    with torch.no_grad():
        cat, dog, tree, empty = tiny_model.embed(["a cat", "a dog", "a tree", ""]).double()  # each (77, D)
    before = tiny_model.unet.get_parameter(name).detach().double().clone()  # (O, D)
    edit_(tiny_model, [("a cat", "a dog")], ["a tree"], erase_scale=2.0, preserve_scale=3.0, lamb=1.0)
    system = torch.cat([2**0.5 * cat, 3**0.5 * tree, 3**0.5 * empty, torch.eye(32).double()])
    wanted = torch.cat([2**0.5 * dog, 3**0.5 * tree, 3**0.5 * empty, torch.eye(32).double()]) @ before.T
    solution = torch.linalg.lstsq(system, wanted).solution.T
    after = tiny_model.unet.get_parameter(name).detach().double()
    assert torch.allclose(after, solution, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


def test_a_concept_that_is_its_own_substitute_leaves_every_bit(tiny_model: LatentDiffusion) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    norm = edit_(tiny_model, [("a cat", "a cat")], [], erase_scale=1.0, preserve_scale=1.0, lamb=0.1)
    assert norm == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
