"""Captured rounds that sample, or process scores: the eager loop's texts, and the right distribution."""

from __future__ import annotations

import importlib

import pytest
import torch
from lossless_runs import LOSSLESS, Collector
from runs import generate, left_padded
from sampled_texts import SIGMAS, WARPERS, exact, excess, sample, tiny
from tiny import build, prompt
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tidaldecode
from tidaldecode import graph_generate
from tidaldecode.algorithm import chooser
from tidaldecode.algorithm.chooser import Chooser
from tidaldecode.algorithm.speculation import PlaceNoise, Verdict
from tidaldecode.errors import ShortOfMemoryError
from tidaldecode.integrations.transformers import step_pool
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds
from tidaldecode.integrations.transformers.processing import Processing
from tidaldecode.integrations.transformers.round_choice import RoundChoice
from tidaldecode.integrations.transformers.row_ends import RowEnds
from tidaldecode.proof.rounds import RandomRounds

TOKENS, ROWS = 30, 600
GRAPH = importlib.import_module("tidaldecode.integrations.transformers.lossless_graph")
OPTIONS = {"do_sample": True, "output_logits": False, "return_dict_in_generate": False}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(step_pool, "CAPACITY_UNIT", 32)


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


def padded_batch():
    return left_padded([prompt(40), prompt(23, seed=1), prompt(9, seed=2), prompt(1, seed=3)])


def both_loops(model, tokens=TOKENS, seed=3, settings=None, **options):
    """Text, counts, what a streamer saw and the random state afterwards, eager and captured."""
    ids, mask = padded_batch()
    found = []
    for loop in ({}, {"custom_generate": graph_generate}):
        streamer = Collector()
        with tidaldecode.enable(model, **{**LOSSLESS, **(settings or {})}) as handle:
            torch.manual_seed(seed)
            own = {**OPTIONS, **loop, "streamer": streamer, "token_streamer": streamer, **options}
            text = generate(model, ids, tokens, attention_mask=mask, **own)
            stats = handle.stats()
        counts = (stats.rounds, stats.verified, stats.accepted, stats.tokens)
        assert streamer.ended
        found.append((text.tolist(), counts, streamer.columns, torch.get_rng_state().tolist()))
    return found


@pytest.mark.parametrize("selection", ["round", "token"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_seed_gives_the_eager_loops_text(llama, k, selection):
    settings = {"draft_tokens": k, "draft_selection": selection}
    eager, captured = both_loops(llama, settings=settings)
    assert captured == eager
    # Drafts are kept and rejected, so rows part.
    assert 0 < captured[1][2] < k * captured[1][1]


@pytest.mark.parametrize("family", ["Qwen3", "Mixtral"])
def test_other_families_give_the_eager_loops_text(family):
    eager, captured = both_loops(build(family), settings={"draft_tokens": 3})
    assert captured == eager


@pytest.mark.parametrize(
    "warpers",
    [
        {"temperature": 0.5},
        {"temperature": 1.4, "top_k": 5},
        {"top_p": 0.7, "top_k": 0},
        {"typical_p": 0.8, "epsilon_cutoff": 0.02, "suppress_tokens": [3, 7]},
        {"eta_cutoff": 0.1, "min_p": 0.05, "renormalize_logits": True},
    ],
)
def test_processors_of_scores_act_as_in_the_eager_loop(llama, warpers):
    eager, captured = both_loops(llama, settings={"draft_tokens": 3}, **warpers)
    assert captured == eager


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 9, 62])
def test_a_text_ends_the_same_wherever_its_limit_falls_in_a_round(llama, tokens):
    eager, captured = both_loops(llama, tokens=tokens, settings={"draft_tokens": 4})
    assert captured == eager


@pytest.mark.parametrize("at", [0, 2, 7])
def test_rows_end_at_their_own_end_of_text(llama, at):
    settings = {"draft_tokens": 3}
    free, _ = both_loops(llama, settings=settings)
    ends = [free[0][0][40 + at], free[0][1][40 + at + 4]]
    eager, captured = both_loops(llama, settings=settings, eos_token_id=ends)
    assert captured == eager
    assert any(0 in row[40:] for row in captured[0])  # padding behind the end of a row


def test_a_text_within_the_budget_is_sampled_without_drafts(llama):
    eager, captured = both_loops(llama, settings={"budget": 128, "draft_tokens": 3})
    assert captured == eager and captured[1][2] == 0


def test_greedy_rounds_take_processors_of_scores(llama):
    ids, mask = padded_batch()
    options = {**OPTIONS, "do_sample": False, "suppress_tokens": list(range(30, 70))}
    wanted = generate(llama, ids, TOKENS, attention_mask=mask, **options)
    plain = generate(llama, ids, TOKENS, attention_mask=mask, **{**OPTIONS, "do_sample": False})
    eager, captured = both_loops(llama, settings={"draft_tokens": 3}, **options)
    assert captured == eager and captured[0] == wanted.tolist() != plain.tolist()


def test_calls_of_all_kinds_share_the_steps(llama):
    ids, mask = padded_batch()
    kinds = ({"do_sample": False}, {"temperature": 0.7}, {"do_sample": False}, {"temperature": 0.7})
    texts = []
    with tidaldecode.enable(llama, **LOSSLESS, draft_tokens=3) as handle:
        for kind in kinds:
            torch.manual_seed(1)
            options = {**OPTIONS, **kind, "custom_generate": graph_generate}
            texts.append(generate(llama, ids, 12, attention_mask=mask, **options))
        with handle.rounds.borrow(4, 1) as steps:
            assert len(steps._verify) == 2  # one for each kind
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])
    assert not torch.equal(texts[0], texts[1])


class Skewed(RoundChoice):
    """Drafts that are often wrong, and always in the same way."""

    def draft(self, logits, index):
        return super().draft(logits + torch.tensor([1.5, -1.0, 0.0, 1.0, -1.5]), index)


def captured_texts(model, k, rounds=CapturedRounds, **options):
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=k) as handle:
        handle.captured_rounds = rounds
        found = sample(model, ROWS, custom_generate=graph_generate, **options)
        return found, handle.stats()


@pytest.mark.distribution
def test_texts_have_full_attentions_distribution(monkeypatch):
    model, options = tiny(), WARPERS["top_k"]
    monkeypatch.setattr(GRAPH, "RoundChoice", Skewed)
    found, stats = captured_texts(model, 2, **options)
    assert 0.2 < stats.acceptance < 0.99  # both outcomes are met
    assert excess(found, exact(model, **options)) < SIGMAS


@pytest.mark.distribution
def test_random_drafts_leave_the_distribution_as_it_is():
    model = tiny()
    found, _ = captured_texts(model, 3, rounds=RandomRounds, top_k=0)
    assert excess(found, exact(model, top_k=0)) < SIGMAS


def keep_all(drafted, draft_probs, dense_probs, *noise, wanted):
    last = dense_probs[:, -1].argmax(-1, keepdim=True)
    counts = torch.full((len(drafted),), drafted.shape[1] + 1)
    return Verdict(torch.cat([drafted, last], dim=1), counts)


def drafts_noise(drafted, draft_probs, dense_probs, accept_noise, redraw_noise, wanted):
    # The number that drew the token at a place decides its acceptance too.
    sums = draft_probs.cumsum(-1).gather(-1, drafted[..., None])[..., 0]
    return RIGHT_RULE(drafted, draft_probs, dense_probs, sums, redraw_noise, wanted=wanted)


RIGHT_RULE = chooser.accept_sampled


@pytest.mark.parametrize("rule", [keep_all, drafts_noise])
@pytest.mark.distribution
def test_a_wrong_rule_is_seen(rule, monkeypatch):
    model = tiny()
    monkeypatch.setattr(GRAPH, "RoundChoice", Skewed)
    monkeypatch.setattr(chooser, "accept_sampled", rule)
    found, _ = captured_texts(model, 2, top_k=0)
    assert excess(found, exact(model, top_k=0)) > 2 * SIGMAS


def test_the_random_state_does_not_depend_on_what_was_drafted():
    model, left = tiny(), []
    for k in (1, 3, "auto"):
        with tidaldecode.enable(model, **LOSSLESS, draft_tokens=k):
            sample(model, 3, custom_generate=graph_generate)
        left.append(torch.get_rng_state())
    assert all(torch.equal(state, left[0]) for state in left)


def test_a_call_that_had_to_make_room_gives_the_same_text(monkeypatch):
    model, texts, failed = tiny(), [], []
    prefill = CapturedRounds.prefill

    def once(self, *args):
        if self.batch == 3 and not failed:
            failed.append(True)
            raise ShortOfMemoryError("memory: too little")
        return prefill(self, *args)

    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=2):
        texts.append(sample(model, 3, custom_generate=graph_generate))
    monkeypatch.setattr(CapturedRounds, "prefill", once)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=2):
        sample(model, 2, custom_generate=graph_generate)
        texts.append(sample(model, 3, custom_generate=graph_generate))
    assert failed and torch.equal(*texts)


def test_rows_at_their_limit_draw_nothing_new_and_stay():
    prompt_columns, limit, k, batch = 10, 14, 5, 3
    ends = RowEnds.make(batch, torch.device("cpu"))
    ends.limit.fill_(limit)
    ends.known.copy_(torch.tensor([14, 13, 11], dtype=torch.int32))
    before = ends.newest.clone()
    choice = RoundChoice(
        Chooser(PlaceNoise(batch, torch.device("cpu")), limit - prompt_columns),
        Processing(LogitsProcessorList()),
        ends,
        prompt_columns,
    )
    choice.reserve(limit + k + 1)
    logits = torch.zeros(batch, k + 1, 7)
    drafts = [choice.draft(logits[:, at], at) for at in range(k)]
    drafted = torch.cat([token for token, _ in drafts], dim=1)
    verdict = choice.judge(drafted, [chances for _, chances in drafts], logits)
    # Equal chances keep every draft that is wanted: none for a row's last token, nor behind it.
    assert verdict.counts.tolist() == [1, 1, 3]
    ends.advance(verdict.tokens, verdict.counts)
    assert ends.known.tolist() == [14, 14, 14]
    assert torch.equal(ends.newest[0], before[0])


@pytest.mark.parametrize("sampled", [True, False])
def test_nothing_is_asked_of_the_device(sampled):
    # A meta tensor has no values: whatever the host would wait for fails on it.
    batch, k, vocabulary, meta = 4, 3, 50, torch.device("meta")
    noise = None
    if sampled:
        noise = PlaceNoise(batch, torch.device("cpu"))
        noise.reserve(64)
        noise._numbers = noise._numbers.to(meta)
    processors = LogitsProcessorList(
        [
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
            SuppressTokensLogitsProcessor([3, 4], device="meta"),
        ]
    )
    ends = RowEnds.make(batch, meta)
    choice = RoundChoice(Chooser(noise, 40), Processing(processors), ends, 10)
    logits = torch.empty(batch, k + 1, vocabulary, device=meta)
    choice.first(logits[:, 0])
    drafts = [choice.draft(logits[:, at], at) for at in range(k)]
    drafted = torch.cat([token for token, _ in drafts], dim=1)
    verdict = choice.judge(drafted, [chances for _, chances in drafts], logits)
    ends.advance(verdict.tokens, verdict.counts)
    assert verdict.tokens.shape == (batch, k + 1) and verdict.tokens.is_meta
    with pytest.raises(RuntimeError):
        verdict.tokens.tolist()
