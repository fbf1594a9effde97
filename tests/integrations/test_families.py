"""Every supported family, with either cache: exact at full budget, sparse below, then restored."""

import pytest
import torch
from reference import masked_logits
from runs import CACHES, SMALL, generate, logits_of
from snapshot import snapshot
from tiny import SUPPORTED, build, prompt

import tidaldecode
from tidaldecode import Role

PROMPT, TOKENS = 24, 6
LAST_LENGTH = PROMPT + TOKENS - 1  # what the last decode step attends to

families = pytest.mark.parametrize("family", SUPPORTED)
caches = pytest.mark.parametrize("cache", CACHES)


@caches
@families
def test_a_budget_of_the_whole_length_gives_the_logits_of_sdpa_bit_for_bit(family, cache):
    model = build(family)
    expected = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    with tidaldecode.enable(model, budget=LAST_LENGTH) as handle:
        found = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    assert Role.SPARSE in handle.plan
    assert torch.equal(logits_of(found), logits_of(expected))
    assert torch.equal(found.sequences, expected.sequences)


@caches
@families
def test_a_small_budget_changes_the_logits_of_decoded_tokens_only(family, cache):
    model = build(family)
    expected = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    before = snapshot(model)
    with tidaldecode.enable(model, **SMALL):
        found = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    assert torch.equal(found.logits[0], expected.logits[0])  # prefill is dense
    assert (found.logits[1] - expected.logits[1]).abs().max() > 1e-2
    assert snapshot(model) == before
    again = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    assert torch.equal(logits_of(again), logits_of(expected))


@caches
@families
def test_decoded_logits_are_those_of_a_masked_forward_over_the_whole_sequence(family, cache):
    model = build(family)
    with tidaldecode.enable(model, **SMALL) as handle:
        found = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    decoded = range(PROMPT, LAST_LENGTH)
    ids = found.sequences[:, :LAST_LENGTH]
    expected = masked_logits(model, ids, handle.plan, handle.config, decoded)
    torch.testing.assert_close(logits_of(found)[0], expected[PROMPT - 1 :], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["Gemma3", "Cohere2"])
def test_sliding_layers_of_a_hybrid_model_stay_with_the_host(family):
    model = build(family)
    with tidaldecode.enable(model) as handle:
        kinds = model.config.layer_types
        planned = [role is not Role.HOST for role in handle.plan]
    assert planned == [kind == "full_attention" for kind in kinds]
    assert str(handle.plan) == "-D-D-S-S-.-."


@caches
def test_one_token_less_than_the_length_already_drops_one(cache):
    model = build("Llama")
    expected = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    with tidaldecode.enable(model, budget=LAST_LENGTH - 1):
        found = generate(model, prompt(PROMPT), TOKENS, **CACHES[cache])
    assert torch.equal(logits_of(found)[:, :-1], logits_of(expected)[:, :-1])
    assert (found.logits[-1] - expected.logits[-1]).abs().max() > 1e-5
