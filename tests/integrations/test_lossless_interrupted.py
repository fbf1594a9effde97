"""An interruption leaves the cache of the last settled token, which can be continued."""

from __future__ import annotations

import pytest
import torch
from lossless_runs import (
    LOSSLESS,
    Collector,
    assert_same_states,
    dense_states,
    extended,
    new_cache,
    states,
)
from runs import CACHES, generate, left_padded
from tiny import build, prompt

import tidaldecode
from tidaldecode.integrations.transformers.speculative_steps import SpeculativeSteps

PROMPT, TOKENS = 40, 24
caches = pytest.mark.parametrize("cache", CACHES)


def batch():
    return left_padded([prompt(PROMPT), prompt(17, seed=1)])


def check_and_go_on(model, past, mask, columns, expected):
    """The cache holds what is known of the text densely, and the text goes on as it would have."""
    length = int(past.get_seq_length())
    known = expected[:, :length]
    wide = extended(mask, length)
    assert_same_states(states(past), dense_states(model, known, wide), wide)
    if hasattr(past.layers[0], "max_cache_len"):
        assert states(past, 96)[..., length:, :].abs().max() == 0
    shown = expected[:, : PROMPT + columns]
    left = TOKENS - columns
    for lossless in (True, False):
        mine = new_cache("dynamic", model)
        for layer in range(len(past.layers)):
            keys, values = past.layers[layer].keys, past.layers[layer].values
            mine.update(keys[:, :, :length].clone(), values[:, :, :length].clone(), layer)
        options = {"attention_mask": extended(mask, shown.shape[1]), "past_key_values": mine}
        if lossless:
            with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
                found = generate(model, shown, left, **options)
        else:
            found = generate(model, shown, left, **options)
        assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 5, 11])
@caches
def test_a_streamer_that_fails_leaves_the_cache_of_what_it_was_given(cache, at, error):
    model = build("Llama")
    ids, mask = batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask).sequences
    past, streamer = new_cache(cache, model), Collector(at, error)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4), pytest.raises(error):
        generate(model, ids, TOKENS, attention_mask=mask, past_key_values=past, streamer=streamer)
    assert torch.tensor(streamer.columns).T.equal(expected[:, PROMPT : PROMPT + at])
    assert past.get_seq_length() == PROMPT + at - 1
    check_and_go_on(model, past, mask, at, expected)


class Failing(SpeculativeSteps):
    """Raises once so many forwards have written what they should."""

    left = 0
    kind = "verify"

    def draft(self, *args):
        out = super().draft(*args)
        self._count("draft")
        return out

    def verify(self, *args):
        out = super().verify(*args)
        self._count("verify")
        return out

    def _count(self, kind):
        if kind == self.kind:
            type(self).left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "count"), [("draft", 1), ("draft", 2), ("draft", 9), ("verify", 1), ("verify", 4)]
)
@caches
def test_a_round_that_is_interrupted_never_was(cache, kind, count):
    model = build("Llama")
    ids, mask = batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask).sequences
    past, streamer = new_cache(cache, model), Collector()
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4) as handle:
        handle.speculative_steps = type("Once", (Failing,), {"left": count, "kind": kind})
        with pytest.raises(KeyboardInterrupt):
            generate(
                model, ids, TOKENS, attention_mask=mask, past_key_values=past, streamer=streamer
            )
    columns = len(streamer.columns)
    assert past.get_seq_length() == max(PROMPT + columns - 1, PROMPT)
    check_and_go_on(model, past, mask, columns, expected)


@caches
def test_a_layer_that_fails_in_the_middle_of_a_verification_leaves_the_rest_intact(cache):
    model = build("Llama")
    ids, mask = batch()
    expected = generate(model, ids, TOKENS, attention_mask=mask).sequences
    past, calls = new_cache(cache, model), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt

    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4):
        hook = model.model.layers[4].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, TOKENS, attention_mask=mask, past_key_values=past)
        hook.remove()
        assert model._tidal_handle is not None
    length = int(past.get_seq_length())
    assert PROMPT < length < PROMPT + TOKENS
    wide = extended(mask, length)
    assert_same_states(states(past), dense_states(model, expected[:, :length], wide), wide)


def test_what_was_done_before_an_interruption_is_counted():
    model = build("Llama")
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=4) as handle:
        with pytest.raises(RuntimeError):
            generate(model, prompt(PROMPT), TOKENS, streamer=Collector(9))
        assert handle.stats().tokens >= 8
