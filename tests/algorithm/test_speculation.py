"""Acceptance of drafts: greedy prefixes, and exact distributions by chi-square over many draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode.algorithm.speculation import (
    ACCEPT,
    DRAFT,
    REDRAW,
    PlaceNoise,
    accept_greedy,
    accept_sampled,
    draw,
)

VOCABULARY, DRAWS = 5, 40_000
# One draw in a million of an exact rule is further off.
SIGMAS = 5.0


def distributions(places: int, sharpness: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(places, VOCABULARY, generator=generator)
    return logits.softmax(-1)


def chi_square_excess(tokens: torch.Tensor, chances: torch.Tensor) -> float:
    """How far the counts are from ``chances``, in standard deviations of the chi-square statistic."""
    expected = chances.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    assert not counts[expected == 0].any()
    held = expected > 0
    statistic = float(((counts - expected)[held] ** 2 / expected[held]).sum())
    freedom = int(held.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * max(freedom, 1))


def first_two(draft: torch.Tensor, dense: torch.Tensor, accept=accept_sampled):
    """The first two tokens of many rounds with one draft, whose places do not depend on history."""
    numbers = PlaceNoise(DRAWS, torch.device("cpu"))
    numbers.reserve(2)
    noise = numbers.at(torch.zeros(DRAWS, dtype=torch.int32), 0, 2)
    q, p = draft.expand(DRAWS, 1, -1), dense.expand(DRAWS, 2, -1)
    drafted = draw(q[:, 0], noise[:, 0, DRAFT])[:, None]
    verdict = accept(drafted, q, p, noise[:, :1, ACCEPT], noise[..., REDRAW])
    return verdict.tokens, verdict.counts


@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_greedy_keeps_the_agreed_prefix_and_one_more(length, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    drafted = torch.randint(0, 2, (batch, length), generator=generator)
    choices = torch.randint(0, 2, (batch, length + 1), generator=generator)
    verdict = accept_greedy(drafted, choices)
    for row in range(batch):
        kept = 0
        while kept < length and drafted[row, kept] == choices[row, kept]:
            kept += 1
        assert verdict.counts[row] == kept + 1
        told = verdict.tokens[row, : kept + 1].tolist()
        assert told == [*drafted[row, :kept].tolist(), int(choices[row, kept])]


@pytest.mark.parametrize("sharpness", [0.3, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_has_full_attentions_distribution(sharpness, seed):
    torch.manual_seed(seed)
    draft = distributions(1, sharpness, seed)
    dense = distributions(2, sharpness, seed + 100)
    tokens, counts = first_two(draft, dense)
    assert chi_square_excess(tokens[:, 0], dense[0]) < SIGMAS
    both = counts == 2
    assert 0.05 < both.double().mean() < 1
    assert chi_square_excess(tokens[both, 1], dense[1]) < SIGMAS
    kept = torch.minimum(draft[0], dense[0]).sum()
    assert both.double().mean() == pytest.approx(float(kept), abs=0.02)


def always(drafted, q, p, accept_noise, redraw_noise):
    return accept_sampled(drafted, q, p, torch.zeros_like(accept_noise), redraw_noise)


def redraws_from_p(drafted, q, p, accept_noise, redraw_noise):
    verdict = accept_sampled(drafted, q, p, accept_noise, redraw_noise)
    rejected = verdict.counts == 1
    verdict.tokens[rejected, 0] = draw(p[rejected, 0], redraw_noise[rejected, 0])
    return verdict


def keeps_by_p_alone(drafted, q, p, accept_noise, redraw_noise):
    return accept_sampled(drafted, torch.ones_like(q), p, accept_noise, redraw_noise)


@pytest.mark.parametrize("rule", [always, redraws_from_p, keeps_by_p_alone])
def test_the_chi_square_test_sees_a_wrong_rule(rule):
    tokens, _ = first_two(distributions(1, 1.0, 0), distributions(2, 1.0, 100), accept=rule)
    assert chi_square_excess(tokens[:, 0], distributions(2, 1.0, 100)[0]) > 20 * SIGMAS


def first_distribution(draft: torch.Tensor, dense: torch.Tensor, accept=accept_sampled):
    """Chances ``[V]`` of the first token: every draft, and a fine grid of both other random numbers."""
    grid = 400
    points = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    every = torch.cartesian_prod(torch.arange(VOCABULARY).double(), points, points)
    drafts, acceptance, redraw = every[:, 0].long(), every[:, 1], every[:, 2]
    rows = len(drafts)
    verdict = accept(
        drafts[:, None],
        draft.expand(rows, 1, -1),
        dense.expand(rows, 2, -1),
        acceptance[:, None],
        redraw[:, None].expand(-1, 2),
    )
    weights = draft[drafts].double() / grid**2
    return torch.zeros(VOCABULARY, dtype=torch.float64).index_add(0, verdict.tokens[:, 0], weights)


def with_uniform(drafted, q, p, accept_noise, redraw_noise):
    return accept_sampled(drafted, 0.95 * q + 0.05 / VOCABULARY, p, accept_noise, redraw_noise)


@pytest.mark.parametrize("seed", range(3))
def test_the_distribution_is_right_without_any_chance(seed):
    draft, dense = distributions(1, 2.0, seed)[0], distributions(1, 2.0, seed + 100)[0]
    # The grid's own error is some thousandths.
    assert (first_distribution(draft, dense) - dense).abs().sum() < 0.005
    for rule in (with_uniform, always, redraws_from_p, keeps_by_p_alone):
        assert (first_distribution(draft, dense, rule) - dense).abs().sum() > 0.009


def test_tokens_that_full_attention_rules_out_never_come():
    dense = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    tokens, counts = first_two(torch.tensor([[0.0, 0.1, 0.9, 0, 0]]), dense)
    assert set(tokens[:, 0].tolist()) == {0, 1}
    assert set(tokens[counts == 2, 1].tolist()) == {4}
    assert chi_square_excess(tokens[:, 0], dense[0]) < SIGMAS


def test_equal_distributions_keep_every_draft():
    chances = distributions(1, 1.0, 0)
    _, counts = first_two(chances, chances.repeat(2, 1))
    assert counts.eq(2).all()


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_drafts_that_are_not_wanted_count_as_never_drafted(length, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, length + 1, (batch,), generator=generator)
    numbers = torch.rand(batch, length + 1, 3, generator=generator, dtype=torch.float64)
    q = distributions(batch * length, 0.5, seed).view(batch, length, -1)
    p = distributions(batch * (length + 1), 0.5, seed + 1).view(batch, length + 1, -1)
    drafted = draw(q, numbers[:, :length, DRAFT])
    noise = numbers[:, :length, ACCEPT], numbers[..., REDRAW]
    verdict = accept_sampled(drafted, q, p, *noise, wanted=wanted)
    for row, most in enumerate(wanted.tolist()):
        one = slice(row, row + 1)
        short = (drafted[one, :most], q[one, :most], p[one, : most + 1])
        alone = accept_sampled(*short, noise[0][one, :most], noise[1][one, : most + 1])
        assert verdict.counts[row] == alone.counts[0]
        count = int(alone.counts[0])
        assert torch.equal(verdict.tokens[row, :count], alone.tokens[0, :count])


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-53])
def test_a_draw_never_takes_what_has_no_weight(noise):
    weights = torch.tensor([[0, 0.3, 0, 0.2, 0], [0, 0, 1e-30, 0, 0], [7, 0, 0, 0, 0]])
    index = draw(weights, torch.full((3,), noise, dtype=torch.float64))
    assert (weights.gather(1, index[:, None]) > 0).all()


def test_noise_belongs_to_a_place_and_takes_one_number_of_the_random_state():
    torch.manual_seed(3)
    noise = PlaceNoise(2, torch.device("cpu"))
    after = torch.rand(1)
    noise.reserve(9)
    early = noise.at(torch.tensor([0, 5]), 0, 4)
    noise.reserve(212)
    noise.at(torch.tensor([200, 7]), 3, 9)
    assert torch.equal(noise.at(torch.tensor([0, 5]), 0, 4), early)
    assert torch.equal(noise.at(torch.tensor([0, 4]), 1, 3)[1], early[1, :3])
    assert early.min() >= 0 and early.max() < 1 and len(early.unique()) == early.numel()
    torch.manual_seed(3)
    at_once = PlaceNoise(2, torch.device("cpu"))
    assert torch.equal(torch.rand(1), after)
    at_once.reserve(212)
    assert torch.equal(at_once.at(torch.tensor([0, 5]), 0, 4), early)
