"""Lossless decoding gives full attention's own greedy tokens, and leaves its cache behind."""

from __future__ import annotations

import pytest
import torch
from lossless_runs import (
    LOSSLESS,
    Collector,
    assert_same_states,
    embedded,
    extended,
    new_cache,
    states,
)
from runs import CACHES, SMALL, generate, left_padded, logits_of
from tiny import build, prompt
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

import tidaldecode
from tidaldecode.integrations.transformers.speculative_steps import SpeculativeSteps
from tidaldecode.proof.equality import RandomSteps

PROMPT, TOKENS = 40, 30
caches = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture(scope="module")
def trained():
    return embedded()


def padded_batch():
    return left_padded([prompt(PROMPT), prompt(23, seed=1), prompt(9, seed=2), prompt(1, seed=3)])


def assert_equal_runs(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("family", "cache", "k", "selection"),
    [
        *(("Llama", cache, k, "round") for cache in CACHES for k in (1, 3, 8, "auto")),
        *((family, "dynamic", 3, "round") for family in ("Qwen3", "GPTNeoX", "Mixtral")),
        ("Qwen3", "static", 8, "round"),
        *(("Llama", cache, 3, "token") for cache in CACHES),
    ],
)
def test_a_padded_batch_gets_full_attentions_tokens_logits_and_cache(family, cache, k, selection):
    model = build(family)
    ids, mask = padded_batch()
    options = {"attention_mask": mask, **CACHES[cache]}
    expected = generate(model, ids, TOKENS, **options)
    settings = {**LOSSLESS, "draft_tokens": k, "draft_selection": selection}
    with tidaldecode.enable(model, **settings) as handle:
        found = generate(model, ids, TOKENS, **options)
        stats = handle.stats()
    assert_equal_runs(found, expected)
    kept = states(expected.past_key_values)
    assert_same_states(states(found.past_key_values), kept, extended(mask, kept.shape[3]))
    assert stats.drafted > 0 and stats.tokens >= 4 * (TOKENS - 1)
    if k != "auto":
        assert 0 < stats.accepted < stats.drafted  # rows did part


@pytest.mark.parametrize("k", [1, 4])
@caches
def test_random_drafts_change_nothing_but_the_speed(cache, k):
    model = build("Llama")
    ids, mask = padded_batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask, **CACHES[cache])
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=k) as handle:
        handle.speculative_steps = RandomSteps
        found = generate(model, ids, TOKENS, attention_mask=mask, **CACHES[cache])
        assert handle.stats().acceptance < 0.1
    assert_equal_runs(found, expected)


@pytest.mark.parametrize("name", ["paper", "lessismore", "streaming", "quest"])
def test_every_preset_drafts(name):
    model = build("Llama")
    ids, mask = padded_batch()
    config = tidaldecode.TidalConfig.preset(name, budget=8, mode="lossless", draft_tokens=3)
    if name == "quest":
        config = config.replace(page_tokens=4)
    expected = generate(model, ids, TOKENS, attention_mask=mask)
    with tidaldecode.enable(model, config):
        found = generate(model, ids, TOKENS, attention_mask=mask)
    assert_equal_runs(found, expected)


@pytest.mark.parametrize(
    ("budget", "k", "random"), [(20, 4, False), (64, 2, False), (256, 8, False), (20, 3, True)]
)
def test_the_trained_model_writes_the_same_text_for_mixed_lengths(trained, budget, k, random):
    model, text = trained
    rows = [text[None, start : start + n] for start, n in ((0, 1200), (3000, 500), (6000, 700))]
    ids, mask = left_padded(rows)
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with tidaldecode.enable(model, mode="lossless", budget=budget, draft_tokens=k) as handle:
        if random:
            handle.speculative_steps = RandomSteps
        found = model.generate(ids, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_it_stops_at_max_new_tokens_wherever_that_falls_in_a_round(tokens):
    model = build("Llama")
    expected = generate(model, prompt(PROMPT), tokens)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        found = generate(model, prompt(PROMPT), tokens)
    assert_equal_runs(found, expected)
    assert found.past_key_values.get_seq_length() == PROMPT + tokens - 1


@pytest.mark.parametrize("at", [0, 1, 2, 3, 7, 12])
@caches
def test_rows_end_at_their_own_end_of_text(cache, at):
    model = build("Llama")
    ids, mask = padded_batch()
    options = {"attention_mask": mask, **CACHES[cache]}
    free = generate(model, ids, TOKENS, **options).sequences[:, PROMPT:]
    ends = [int(free[0, at]), int(free[1, at + 3])]
    streams = [Collector(), Collector()]
    expected = generate(model, ids, TOKENS, eos_token_id=ends, streamer=streams[0], **options)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        found = generate(model, ids, TOKENS, eos_token_id=ends, streamer=streams[1], **options)
    assert_equal_runs(found, expected)
    assert streams[1].columns == streams[0].columns and streams[1].ended
    kept = states(expected.past_key_values)
    assert_same_states(states(found.past_key_values), kept, extended(mask, kept.shape[3]))


class Odd(StoppingCriteria):
    """Ends a row whose tokens sum to a multiple of 7, and notes all it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.tolist())
        return input_ids.sum(-1) % 7 == 0


@pytest.mark.parametrize("eos", [None, 5])
def test_criteria_of_ones_own_are_asked_the_same_questions(eos):
    model = build("Llama")
    ids, mask = padded_batch()
    asked, outputs = [], []
    for lossless in (False, True):
        criteria = Odd()
        options = {"attention_mask": mask, "stopping_criteria": StoppingCriteriaList([criteria])}
        if lossless:
            with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
                outputs.append(generate(model, ids, TOKENS, eos_token_id=eos, **options))
        else:
            outputs.append(generate(model, ids, TOKENS, eos_token_id=eos, **options))
        asked.append(criteria.asked)
    assert asked[1] == asked[0] and 2 < len(asked[0]) <= TOKENS
    assert_equal_runs(outputs[1], outputs[0])


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[7], [11, 13]]},
    "sequence_bias": {"sequence_bias": [[[9], 3.0], [[4, 5], 4.0]]},
    "suppress": {"suppress_tokens": [2, 3, 4], "begin_suppress_tokens": [8, 9]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(2, 60))},
    "min_length": {"min_length": PROMPT + 5, "eos_token_id": list(range(2, 60))},
    "forced_eos": {"forced_eos_token_id": 6, "eos_token_id": 6},
    "decay": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": [6, 7, 8]},
    "all": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [5]},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_that_look_back_are_replayed_on_the_draft(name):
    model = build("Llama")
    ids, mask = padded_batch()
    plain = generate(model, ids, TOKENS, attention_mask=mask)
    options = {"attention_mask": mask, "output_scores": True, **PROCESSORS[name]}
    expected = generate(model, ids, TOKENS, **options)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        found = generate(model, ids, TOKENS, **options)
    assert_equal_runs(found, expected)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    assert not torch.equal(plain.sequences, expected.sequences)  # it does something


@caches
def test_a_conversation_goes_on_from_the_cache(cache):
    model = build("Llama")
    ids, mask = left_padded([prompt(PROMPT), prompt(9, seed=1)])
    more = prompt(5, batch=2, seed=3)

    def talk():
        past = new_cache(cache, model)
        first = generate(model, ids, 8, attention_mask=mask, past_key_values=past).sequences
        longer = torch.cat([first, more], dim=1)
        wide = extended(mask, longer.shape[1])
        return generate(model, longer, 8, attention_mask=wide, past_key_values=past)

    expected = talk()
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3):
        found = talk()
    assert_equal_runs(found, expected)


def test_a_static_cache_keeps_nothing_of_rejected_drafts():
    model = build("Llama")
    past = new_cache("static", model)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=8):
        generate(model, prompt(PROMPT), TOKENS, past_key_values=past)
    length = int(past.get_seq_length())
    assert length == PROMPT + TOKENS - 1
    assert states(past, 96)[..., length:, :].abs().max() == 0


def test_a_text_within_the_budget_is_not_drafted():
    model = build("Llama")
    with tidaldecode.enable(model, mode="lossless", budget=128, draft_tokens=4) as handle:
        expected = generate(model, prompt(PROMPT), TOKENS)
        assert handle.stats().drafted == 0 and handle.stats().tokens_per_verify == 1
        assert handle.stats().kv_share == 1
    assert torch.equal(generate(model, prompt(PROMPT), TOKENS).sequences, expected.sequences)


def test_forwards_of_ones_own_are_full_attention_bit_for_bit():
    model, ids = build("Llama"), prompt(PROMPT)
    cache, other = new_cache("dynamic", model), new_cache("dynamic", model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        with tidaldecode.enable(model, **LOSSLESS):
            model(ids, past_key_values=other)
            found = model(ids[:, :1], past_key_values=other).logits
    assert torch.equal(found, expected)


def test_statistics_count_what_was_done():
    model = build("Llama")
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4) as handle:
        generate(model, prompt(PROMPT), TOKENS)
        once = handle.stats()
        generate(model, prompt(PROMPT), TOKENS)
        twice = handle.stats()
        full = [handle.reads.full(PROMPT + index) for index in range(1, TOKENS)]
    assert once.tokens == once.accepted + once.verified - (once.accepted + once.rounds - TOKENS + 1)
    assert once.tokens == TOKENS - 1 and once.verified == once.rounds
    assert once.dense_kv_bytes == sum(full)
    assert {name: 2 * value for name, value in vars(once).items()} == vars(twice)
    once.tokens = 0
    assert twice.tokens == 2 * (TOKENS - 1)


@pytest.mark.parametrize(("selection", "alike"), [("token", 5), ("round", 1)])
@caches
def test_drafts_are_what_sparse_decoding_would_have_said(cache, selection, alike):
    model, seen = build("Llama"), []

    class Seen(SpeculativeSteps):
        def draft(self, *args):
            seen.append(super().draft(*args))
            return seen[-1]

    ids, mask = padded_batch()
    options = {"attention_mask": mask, **CACHES[cache]}
    with tidaldecode.enable(model, **SMALL):
        sparse = generate(model, ids, 7, **options)
    settings = {**LOSSLESS, "draft_tokens": 5, "draft_selection": selection}
    with tidaldecode.enable(model, **settings) as handle:
        handle.speculative_steps = Seen
        generate(model, ids, 7, **options)
    found = torch.stack(seen[:alike], dim=1)
    torch.testing.assert_close(found, logits_of(sparse)[:, 1 : alike + 1], atol=2e-4, rtol=2e-4)


def test_arguments_may_be_given_in_order():
    model, streams = build("Llama"), [Collector(), Collector()]
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)
    order = [None, None, None, None, None]
    expected = model.generate(prompt(PROMPT), settings, *order, streams[0])
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3):
        found = model.generate(prompt(PROMPT), settings, *order, streams[1])
    assert torch.equal(found, expected)
    assert streams[1].columns == streams[0].columns and streams[1].ended


@pytest.mark.parametrize("limit", [PROMPT - 3, PROMPT + 6])
def test_a_shorter_limit_of_ones_own_counts(limit):
    model = build("Llama")
    criteria = StoppingCriteriaList([MaxLengthCriteria(limit)])
    expected = generate(model, prompt(PROMPT), TOKENS, stopping_criteria=criteria)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        found = generate(model, prompt(PROMPT), TOKENS, stopping_criteria=criteria)
    assert_equal_runs(found, expected)
