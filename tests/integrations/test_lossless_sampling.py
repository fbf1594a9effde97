"""Sampled tokens of lossless decoding have full attention's distribution, whatever is drafted."""

from __future__ import annotations

import pytest
import torch
from lossless_runs import LOSSLESS
from runs import generate
from sampled_texts import PROMPT, SIGMAS, WARPERS, exact, excess, sample, surprise, tiny
from tiny import build, prompt

import tidaldecode
from tidaldecode.algorithm import chooser
from tidaldecode.algorithm.speculation import Verdict, accept_greedy
from tidaldecode.integrations.transformers.speculative_steps import SpeculativeSteps
from tidaldecode.proof.equality import RandomSteps


class SkewedSteps(SpeculativeSteps):
    """Drafts that are often wrong, and always in the same way."""

    def draft(self, *args):
        return super().draft(*args) + torch.tensor([1.5, -1.0, 0.0, 1.0, -1.5])


@pytest.mark.parametrize("name", WARPERS)
def test_texts_have_full_attentions_distribution(name):
    model, options = tiny(), WARPERS[name]
    chances = exact(model, **options)
    assert float(chances.sum()) == pytest.approx(1)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=2) as handle:
        handle.speculative_steps = SkewedSteps
        found = sample(model, **options)
        assert 0.2 < handle.stats().acceptance < 0.99  # both outcomes are met
    assert excess(found, chances) < SIGMAS


@pytest.mark.parametrize(
    ("k", "steps"), [(1, SkewedSteps), (3, RandomSteps), (2, SpeculativeSteps)]
)
@pytest.mark.distribution
def test_other_drafts_leave_the_distribution_as_it_is(k, steps):
    model = tiny()
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=k) as handle:
        handle.speculative_steps = steps
        found = sample(model, top_k=0)
    assert excess(found, exact(model, top_k=0)) < SIGMAS


@pytest.mark.distribution
def test_texts_are_neither_sharper_nor_flatter():
    model = tiny(spread=0.4)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=2) as handle:
        handle.speculative_steps = SkewedSteps
        found = sample(model, rows=3000, top_k=0)
    assert surprise(found, exact(model, top_k=0)) < 4


@pytest.mark.distribution
def test_plain_sampling_passes_the_same_test():
    model = tiny()
    assert excess(sample(model, top_k=0), exact(model, top_k=0)) < SIGMAS


def keep_all(drafted, draft_probs, dense_probs, *noise, wanted):
    last = dense_probs[:, -1].argmax(-1, keepdim=True)
    counts = torch.full((len(drafted),), drafted.shape[1] + 1)
    return Verdict(torch.cat([drafted, last], dim=1), counts)


def without_residual(drafted, draft_probs, dense_probs, *noise, wanted):
    return accept_greedy(drafted, dense_probs.argmax(-1))


def keeps_too_often(*args, wanted):
    *front, accept_noise, redraw_noise = args
    return RIGHT_RULE(*front, accept_noise**2, redraw_noise, wanted=wanted)


RIGHT_RULE = chooser.accept_sampled


@pytest.mark.parametrize("rule", [keep_all, without_residual, keeps_too_often])
@pytest.mark.distribution
def test_a_wrong_rule_is_seen(rule, monkeypatch):
    model = tiny()
    monkeypatch.setattr(chooser, "accept_sampled", rule)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=2) as handle:
        handle.speculative_steps = SkewedSteps
        found = sample(model, top_k=0)
    assert excess(found, exact(model, top_k=0)) > 2 * SIGMAS


def test_the_random_state_does_not_depend_on_what_was_drafted():
    model, left = tiny(), []
    for k, steps in ((1, None), (3, None), (3, RandomSteps), ("auto", None)):
        with tidaldecode.enable(model, **LOSSLESS, draft_tokens=k) as handle:
            if steps is not None:
                # Its drafts are random, too, and take from the state: put that back.
                handle.speculative_steps = quiet(steps)
            sample(model, rows=3)
            left.append(torch.get_rng_state())
    assert all(torch.equal(state, left[0]) for state in left)


def quiet(steps):
    class Quiet(steps):
        def draft(self, *args):
            with torch.random.fork_rng():
                return super().draft(*args)

    return Quiet


def test_a_seed_gives_the_same_text_again():
    model = build("Llama")
    options = {"tokens": 20, "do_sample": True, "output_logits": False}
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3):
        texts = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(generate(model, prompt(40, batch=2), **options).sequences)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0][0], texts[0][1])


def test_greedy_decoding_leaves_the_random_state_alone():
    model = build("Llama")
    before = torch.get_rng_state()
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3):
        generate(model, prompt(40), 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_rows_end_at_their_own_end_of_text():
    model = tiny()
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3):
        found = sample(model, rows=50, eos_token_id=3, pad_token_id=4, top_k=0)[:, PROMPT:]
    for row in found.tolist():
        if 3 in row:
            behind = row[row.index(3) + 1 :]
            assert behind == [4] * len(behind)
