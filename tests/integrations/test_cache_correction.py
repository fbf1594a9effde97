"""A corrected cache holds what a dense prefill of the same tokens would have left."""

from __future__ import annotations

import pytest
import torch
from lossless_runs import assert_same_states, dense_states, extended, new_cache, states
from runs import CACHES, SMALL, generate, left_padded
from tiny import build, prompt

import tidaldecode
from tidaldecode import TidalError

PROMPT, TOKENS = 30, 22
caches = pytest.mark.parametrize("cache", CACHES)


def batch():
    return left_padded([prompt(PROMPT), prompt(17, seed=1), prompt(9, seed=2)])


def differs(found, wanted) -> float:
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("every", [1, 4, 7, 500])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@caches
def test_a_corrected_cache_is_full_attentions(cache, family, every):
    model = build(family)
    ids, mask = batch()
    past = new_cache(cache, model)
    with tidaldecode.enable(model, **SMALL, correct_every=every) as handle:
        output = generate(model, ids, TOKENS, attention_mask=mask, past_key_values=past)
        length = int(past.get_seq_length())
        before = states(past)
        addresses = [layer.keys.data_ptr() for layer in past.layers]
        assert handle.correct() == (length - PROMPT) % every
        assert handle.correct() == 0
        assert [layer.keys.data_ptr() for layer in past.layers] == addresses  # in place
    assert length == PROMPT + TOKENS - 1 == int(past.get_seq_length())
    wide = extended(mask, length)
    wanted = dense_states(model, output.sequences[:, :length], wide)
    assert_same_states(states(past), wanted, wide)
    done = PROMPT + (length - PROMPT) // every * every
    assert_same_states(before[..., :done, :], wanted[..., :done, :], wide[:, :done])
    if done < length:
        assert differs(before[..., done:, :], wanted[..., done:, :]) > 1e-2


@caches
def test_without_correction_the_cache_is_polluted(cache):
    model = build("Llama")
    past = new_cache(cache, model)
    with tidaldecode.enable(model, **SMALL):
        output = generate(model, prompt(PROMPT), TOKENS, past_key_values=past)
    known = output.sequences[:, :-1]
    assert differs(states(past), dense_states(model, known, torch.ones_like(known))) > 1e-2


@caches
def test_a_corrected_row_of_a_batch_is_the_row_alone(cache):
    model = build("Llama")
    ids, mask = batch()
    with tidaldecode.enable(model, **SMALL, correct_every=5):
        together = generate(model, ids, TOKENS, attention_mask=mask, **CACHES[cache])
        for row, size, seed in ((0, PROMPT, 0), (1, 17, 1), (2, 9, 2)):
            alone = generate(model, prompt(size, seed=seed), TOKENS, **CACHES[cache])
            assert torch.equal(together.sequences[row, -TOKENS:], alone.sequences[0, -TOKENS:])


@caches
def test_the_tokens_after_a_correction_build_on_it(cache):
    """Decoding by hand: what follows a correction is what follows a dense prefill."""
    model, ids = build("Llama"), prompt(PROMPT + 8)

    def logits_after(every):
        past = new_cache(cache, model)
        with torch.no_grad(), tidaldecode.enable(model, **SMALL, correct_every=every):
            model(ids[:, :PROMPT], past_key_values=past)
            for at in range(PROMPT, PROMPT + 8):
                out = model(ids[:, at : at + 1], past_key_values=past)
        return out.logits[0, -1]

    past = new_cache(cache, model)
    with torch.no_grad(), tidaldecode.enable(model, **SMALL):
        model(ids[:, :-1], past_key_values=past)
        wanted = model(ids[:, -1:], past_key_values=past).logits[0, -1]
    torch.testing.assert_close(logits_after(7), wanted, atol=2e-4, rtol=2e-4)
    assert differs(logits_after(100), wanted) > 1e-2


@caches
def test_a_longer_prompt_corrects_before_it_is_built_upon(cache):
    model, more = build("Llama"), prompt(6, seed=5)
    past = new_cache(cache, model)
    with tidaldecode.enable(model, **SMALL, correct_every=500) as handle:
        first = generate(model, prompt(PROMPT), 9, past_key_values=past).sequences
        longer = torch.cat([first, more], dim=1)
        second = generate(model, longer, 2, past_key_values=past).sequences
        handle.correct()
    known = second[:, : int(past.get_seq_length())]
    ones = torch.ones_like(known)
    assert_same_states(states(past), dense_states(model, known, ones), ones)


def test_tokens_that_fit_the_budget_are_not_polluted():
    model = build("Llama")
    with tidaldecode.enable(model, budget=128, correct_every=3) as handle:
        past = new_cache("dynamic", model)
        generate(model, prompt(PROMPT), TOKENS, past_key_values=past)
        assert handle.correct() == 0


def test_caches_are_corrected_each_by_itself():
    model = build("Llama")
    pasts = [new_cache("dynamic", model) for _ in range(2)]
    with tidaldecode.enable(model, **SMALL, correct_every=500) as handle:
        for number, past in enumerate(pasts):
            generate(model, prompt(PROMPT, seed=number), 5 + number, past_key_values=past)
        assert handle.correct(pasts[1]) == 5
        assert handle.correct(pasts[1]) == 0
        assert handle.correct() == 4


def test_a_cache_that_is_gone_is_not_held():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL, correct_every=500) as handle:
        generate(model, prompt(PROMPT), 5, return_dict_in_generate=False, output_logits=False)
        assert handle.correct() == 0


def test_a_cropped_cache_is_corrected_as_far_as_it_goes():
    model = build("Llama")
    past = new_cache("dynamic", model)
    with tidaldecode.enable(model, **SMALL, correct_every=500) as handle:
        output = generate(model, prompt(PROMPT), 9, past_key_values=past)
        past.crop(-3)
        assert handle.correct() == 5
    known = output.sequences[:, : past.get_seq_length()]
    ones = torch.ones_like(known)
    assert_same_states(states(past), dense_states(model, known, ones), ones)


@caches
def test_an_interrupted_correction_can_be_made_up_for(cache):
    model, calls = build("Llama"), []
    past = new_cache(cache, model)

    def fail(module, args):
        calls.append(1)
        raise KeyboardInterrupt

    with tidaldecode.enable(model, **SMALL, correct_every=500) as handle:
        output = generate(model, prompt(PROMPT), TOKENS, past_key_values=past)
        hook = model.model.layers[4].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            handle.correct()
        hook.remove()
        length = int(past.get_seq_length())
        assert length == PROMPT + TOKENS - 1 and calls == [1]
        assert handle.correct() == TOKENS - 1
    known = output.sequences[:, :length]
    ones = torch.ones_like(known)
    assert_same_states(states(past), dense_states(model, known, ones), ones)


def test_correction_goes_with_caches_of_inference_mode():
    model, ids = build("Llama"), prompt(PROMPT)
    past = new_cache("dynamic", model)
    with tidaldecode.enable(model, **SMALL, correct_every=500) as handle:
        with torch.inference_mode():
            model(ids, past_key_values=past)
            model(ids[:, :1], past_key_values=past)
        assert handle.correct() == 1


def test_a_cache_that_grew_by_other_means_is_refused():
    model, ids = build("Llama"), prompt(PROMPT)
    past = new_cache("dynamic", model)
    with torch.no_grad(), tidaldecode.enable(model, **SMALL, correct_every=500) as handle:
        model(ids, past_key_values=past)
        model(ids[:, :1], past_key_values=past)
        for layer in past.layers:
            layer.update(layer.keys[:, :, -1:], layer.values[:, :, -1:])
        with pytest.raises(TidalError, match="cache: expected 31 tokens, the last 1 of them"):
            handle.correct()
        with pytest.raises(
            TidalError, match="expected the next of 1 rows in column 31, got 1 rows"
        ):
            model(ids[:, :1], past_key_values=past)


def test_sampling_and_every_granularity_go_with_correction():
    model = build("Llama")
    for name in ("paper", "lessismore", "streaming"):
        config = tidaldecode.TidalConfig.preset(name, budget=8, correct_every=4)
        past = new_cache("dynamic", model)
        with tidaldecode.enable(model, config) as handle:
            options = {"do_sample": True, "past_key_values": past}
            output = generate(model, prompt(PROMPT), TOKENS, **options)
            handle.correct()
        known = output.sequences[:, :-1]
        ones = torch.ones_like(known)
        assert_same_states(states(past), dense_states(model, known, ones), ones)
