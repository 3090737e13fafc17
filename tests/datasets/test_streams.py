from __future__ import annotations

import hashlib

import torch

from mu.datasets.streams import draw, generator, initial_noise, order, passes

SHAPE = (4, 8, 8)


def test_generator_is_seeded_by_the_hash_of_the_four() -> None:
    digest = hashlib.sha256(b'[3, "mask", 2, "Noto/Cats/1.png|A Cats image"]').digest()
    expected = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    found = generator(3, "mask", 2, "Noto/Cats/1.png|A Cats image")
    assert torch.equal(torch.randn(5, generator=found), torch.randn(5, generator=expected))


def test_draw_repeats_and_depends_on_each_of_the_four() -> None:
    first = draw(0, "mask", 0, "a", shape=SHAPE, num_timesteps=1000)
    again = draw(0, "mask", 0, "a", shape=SHAPE, num_timesteps=1000)
    assert first.timestep == again.timestep
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.posterior_noise, again.posterior_noise)
    assert not torch.equal(first.noise, first.posterior_noise)
    for other in [(1, "mask", 0, "a"), (0, "forget", 0, "a"), (0, "mask", 1, "a"), (0, "mask", 0, "b")]:
        assert not torch.equal(first.noise, draw(*other, shape=SHAPE, num_timesteps=1000).noise)


def test_draw_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(0, "mask", 0, "a", shape=SHAPE, num_timesteps=1000)
    initial_noise("Noto", "Cats", 188, SHAPE)
    order(0, "forget", 0, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_timesteps_are_uniform_over_all_of_the_schedule() -> None:
    times = torch.tensor(
        [draw(0, "mask", epoch, "a", shape=(1,), num_timesteps=10).timestep for epoch in range(4000)]
    )
    counts = torch.bincount(times, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 320  # 400 +- 4 standard deviations of 19
    assert counts.max() < 480


def test_noise_of_images_is_unit_normal_and_uncorrelated() -> None:
    noise = torch.stack([initial_noise("Noto", "Cats", seed, SHAPE).flatten() for seed in range(200)])
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    correlation = torch.corrcoef(noise) - torch.eye(200)
    assert float(correlation.abs().max()) < 0.4


def test_initial_noise_tells_style_object_and_seed_apart() -> None:
    first = initial_noise("Noto", "Cats", 188, SHAPE)
    assert torch.equal(first, initial_noise("Noto", "Cats", 188, SHAPE))
    for other in [("Blob", "Cats", 188), ("Noto", "Dogs", 188), ("Noto", "Cats", 288), ("NotoC", "ats", 188)]:
        assert not torch.equal(first, initial_noise(*other, SHAPE))


def test_passes_visit_every_row_once_a_pass_and_are_cut_anywhere() -> None:
    whole = list(passes(0, "retain", 5, start=0, stop=15))
    assert [number for number, _ in whole] == [0] * 5 + [1] * 5 + [2] * 5
    for number in range(3):
        assert sorted(place for _, place in whole[5 * number : 5 * number + 5]) == [0, 1, 2, 3, 4]
    pieces = [list(passes(0, "retain", 5, start=first, stop=first + 3)) for first in range(0, 15, 3)]
    assert [pair for piece in pieces for pair in piece] == whole
    assert len({tuple(place for _, place in whole[first : first + 5]) for first in (0, 5, 10)}) == 3
